"""One head per process: what the processes tell each other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def place() -> tuple[int, int]:
    """(rank, number of processes)."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            'heads="ranks" gives every process one head, and torch.distributed is not initialised; call '
            "torch.distributed.init_process_group first, or give a number of heads for one process"
        )
    return dist.get_rank(), dist.get_world_size()


def gathered(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor (1, ...) of every process, (N, ...), in the order of ranks; sent together."""
    own = torch.cat([x.flatten() for x in tensors])
    everyone = own.new_empty(dist.get_world_size() * own.numel())
    dist.all_gather_into_tensor(everyone, own)
    pieces = torch.split(everyone.view(-1, own.numel()), [x.numel() for x in tensors], 1)
    return [piece.reshape(-1, *x.shape[1:]) for piece, x in zip(pieces, tensors, strict=True)]


def summed_(x: Tensor) -> Tensor:
    """The sum of x over all processes, in place, the same bits everywhere: one process adds up, all get its result."""
    dist.reduce(x, 0)
    dist.broadcast(x, 0)
    return x


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether it is so on any process."""
    answer = torch.tensor(float(flag), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer)


def same_everywhere(x: Tensor) -> bool:
    """Whether a number, `()` in float64, is the same on all processes."""
    (all_,) = gathered([x.view(1)])
    return bool((all_ == all_[0]).all())
