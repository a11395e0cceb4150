"""Several processes for one test: they meet in a file, run a function of a module, and leave."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tests.cases import gradients


def meet(rank: int, world: int, folder: str) -> None:
    """Over gloo, in a file, for which nobody else can be quicker than for a port."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)


def spawn(worker: Any, world: int, *args: Any, meet: Any = meet) -> Any:
    """What `worker(rank, world, *args)` returns on rank 0 of `world` processes that know each other."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_entry, (world, folder, meet, worker, args), nprocs=world)
        return torch.load(f"{folder}/returned.pt", weights_only=False)


def _entry(rank: int, world: int, folder: str, meet: Any, worker: Any, args: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    meet(rank, world, folder)
    returned = worker(rank, world, *args)
    if rank == 0:
        torch.save(returned, f"{folder}/returned.pt")
    dist.barrier()
    dist.destroy_process_group()


def message(kind: type[BaseException], call: Any, *args: Any, **kwargs: Any) -> str:
    """What a call says when it raises; "" if it does not."""
    try:
        call(*args, **kwargs)
    except kind as error:
        return str(error)
    return ""


def same_everywhere(tensors: Any) -> bool:
    """Have all ranks the same bits?"""
    for x in tensors:
        first = x.detach().clone()
        dist.broadcast(first, 0)
        if not torch.equal(first, x):
            return False
    return True


class Chosen(nn.Module):
    """Its parameters have the gradients that it is given: tall, wide, square, a vector."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in (("tall", (24, 10)), ("wide", (9, 22)), ("square", (12, 12)), ("bias", (13,))):
            self.register_parameter(name, nn.Parameter(torch.randn(shape).to(dtype)))

    def forward(self, grads: list[Tensor]) -> Tensor:
        return torch.stack([(p * g).sum() for p, g in zip(self.parameters(), grads, strict=True)]).sum()


def shared_gradients(model: nn.Module, steps: int) -> list[list[Tensor]]:
    """Gradients of each step that two ranks can share without rounding: g - 1/8 and g + 1/8 are bfloat16, as g is."""
    kept = [gradients(tuple(p.shape), steps) for p in model.parameters()]
    return [[(some[step] * 8).round().clamp(-60, 60) / 8 for some in kept] for step in range(steps)]
