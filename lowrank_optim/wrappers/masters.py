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

from ..distributed.lockstep import total
from ..engine.table import ParameterTable, Spread
from ..recipe.plan import shape_of


@contextmanager
def masters(table: ParameterTable, module: nn.Module, keys: Sequence[str]) -> Iterator[None]:
    """Within, these parameters of a module are what is trained of them, whole, and what is written to that stays.

    What lies in flat tensors is gathered, so it should be thin: all ranks enter, and must write the same.
    """
    held = cast(dict[str, Any], module._parameters)
    params = {key: held[key] for key in keys}
    cut = [key for key, p in params.items() if p in table.spread]
    spread = [table.spread[params[key]] for key in cut]
    whole = _gathered(spread)
    copies = {key: table.of_parameter(p)[0] for key, p in params.items() if key not in cut}
    held.update({**copies, **dict(zip(cut, whole, strict=True))})
    try:
        yield
    finally:
        held.update(params)
    for one, x in zip(spread, whole, strict=True):
        _put(one, x)


def largest(spread: Mapping[Tensor, Spread], numbers: Tensor) -> Tensor:
    """Of each number the largest of all ranks that share some parameters, which all call it."""
    return total(numbers, next(iter(spread.values())).peers, dist.ReduceOp.MAX)


def _gathered(spread: Sequence[Spread]) -> list[Tensor]:
    """Parameters of one group, whole; in one all-reduce, in which each element has one summand."""
    if not spread:
        return []
    first, shapes = spread[0], [shape_of(one.range.param) for one in spread]
    sizes = [math.prod(shape) for shape in shapes]
    x = torch.zeros(sum(sizes), dtype=first.flat.dtype, device=first.range.param.device)
    for part, one in zip(torch.split(x, sizes), spread, strict=True):
        part[one.whole] = one.flat.detach()[one.here]
    parts = torch.split(total(x, first.peers), sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _put(one: Spread, whole: Tensor) -> None:
    own = whole.reshape(-1)[one.whole]
    one.flat.detach()[one.here].copy_(own)
    shard = getattr(one.range.param, "ds_tensor", None)
    if shard is not None:  # where this flat tensor was published before another one was stepped
        shard.detach()[: len(own)].copy_(own)
