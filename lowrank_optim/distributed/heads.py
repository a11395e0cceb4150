"""Exchange the factors of low-rank heads between processes, where every process trains one head."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def place() -> tuple[int, int]:
    """Return (rank, number of processes); raise a ValueError without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            'heads="ranks" gives every process one head, and torch.distributed is not initialized; call '
            "torch.distributed.init_process_group first, or give a number of heads for one process"
        )
    return dist.get_rank(), dist.get_world_size()


def gathered(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors of all N processes: each (1, ...) becomes (N, ...), in the order of ranks.

    All processes call it, with tensors of the same shapes and dtype.
    """
    # One all-gather for all tensors: (elements,) from each process becomes (N, elements).
    own = torch.cat([x.flatten() for x in tensors])
    everyone = own.new_empty(dist.get_world_size() * own.numel())
    dist.all_gather_into_tensor(everyone, own)
    pieces = torch.split(everyone.view(-1, own.numel()), [x.numel() for x in tensors], 1)
    return [piece.reshape(-1, *x.shape[1:]) for piece, x in zip(pieces, tensors, strict=True)]


def summed_(x: Tensor) -> Tensor:
    """Replace x by its sum over all processes, with the same bits on each of them."""
    # An all-reduce may add in another order on each process. Here rank 0 adds up, and all processes get its result.
    dist.reduce(x, 0)
    dist.broadcast(x, 0)
    return x


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any process. All processes call it; `device` is where the backend works."""
    # A flag is sent as float32, which every backend can reduce.
    answer = torch.tensor(float(flag), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer)


def same_everywhere(x: Tensor) -> bool:
    """Whether a number, a tensor `()` in float64, is the same on all processes. All processes call it."""
    (all_,) = gathered([x.view(1)])
    return bool((all_ == all_[0]).all())
