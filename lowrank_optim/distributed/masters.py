"""What a wrapper trains in the place of some parameters of a module, whole, for work between steps.

Under DeepSpeed that is in float32 and elsewhere, and the parameters themselves are rounded copies of it, which come
after our step: what is written to them alone would be lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..plan import shape_of
from .deepspeed import Range
from .fragments import peers_in
from .lockstep import total
from .stand_ins import StandIns


@contextmanager
def masters(stand_ins: StandIns, module: nn.Module, keys: Sequence[str]) -> Iterator[None]:
    """Within, these parameters of a module are what is trained of them, whole, and what is written to that stays.

    What lies in flat tensors is gathered, so it should be thin: all ranks enter, and must write the same.
    """
    held = cast(dict[str, Any], module._parameters)
    params = {key: held[key] for key in keys}
    cut = {key: p for key, p in params.items() if p in stand_ins.ranges}
    whole = _gathered([(p, *stand_ins.ranges[p]) for p in cut.values()])
    copies = {key: stand_ins.of_parameter(p)[0] for key, p in params.items() if key not in cut}
    held.update({**copies, **dict(zip(cut, whole, strict=True))})
    try:
        yield
    finally:
        held.update(params)
    for p, x in zip(cut.values(), whole, strict=True):
        _put(p, *stand_ins.ranges[p], x)


def largest(ranges: Mapping[Tensor, tuple[Tensor, Range]], numbers: Tensor) -> Tensor:
    """Of each number the largest of all ranks that share some parameters, which all call it."""
    _, here = next(iter(ranges.values()))
    return total(numbers, peers_in(here.group, numbers.device), dist.ReduceOp.MAX)


def _gathered(cut: Sequence[tuple[Tensor, Tensor, Range]]) -> list[Tensor]:
    """Parameters of one group, where they are and whole; in one all-reduce, in which each element has one summand."""
    if not cut:
        return []
    sizes, (p, flat, one) = [math.prod(shape_of(p)) for p, *_ in cut], cut[0]
    x = torch.zeros(sum(sizes), dtype=flat.dtype, device=p.device)
    for part, (_, flat, here) in zip(torch.split(x, sizes), cut, strict=True):
        part[here.start : here.start + here.length] = _own(flat, here)
    parts = torch.split(total(x, peers_in(one.group, x.device)), sizes)
    return [part.view(shape_of(p)) for part, (p, *_) in zip(parts, cut, strict=True)]


def _put(p: Tensor, flat: Tensor, here: Range, whole: Tensor) -> None:
    own = whole.reshape(-1)[here.start : here.start + here.length]
    _own(flat, here).copy_(own)
    shard = getattr(p, "ds_tensor", None)
    if shard is not None:  # where this flat tensor was published before another one was stepped
        shard.detach()[: here.length].copy_(own)


def _own(flat: Tensor, here: Range) -> Tensor:
    return flat.detach()[here.offset : here.offset + here.length]
