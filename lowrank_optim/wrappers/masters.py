"""Whole master weights of a module's parameters, for work between steps such as merges.

DeepSpeed trains float32 weights in tensors of its own. After each step it rounds them into the parameters, so a change
of the parameters alone would be lost.
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
    """Replace parameters of a module by their whole master weights within the context, and keep writes to them.

    Parameters in flat tensors are gathered, so they should be small, such as factors. All ranks must enter the context
    and write the same values.

    Args:
        keys: names of the parameters within `module`.
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
    for part, x in zip(spread, whole, strict=True):
        _put(part, x)


def largest(spread: Mapping[Tensor, Spread], numbers: Tensor) -> Tensor:
    """Return the elementwise maximum of `numbers` over the ranks that share `spread`; all of them must call it."""
    return total(numbers, next(iter(spread.values())).peers, dist.ReduceOp.MAX)


def _gathered(spread: Sequence[Spread]) -> list[Tensor]:
    """Return whole parameters of a group, gathered by one all-reduce.

    Each element is nonzero on one rank only, so the sum changes no bit.
    """
    if not spread:
        return []
    first, shapes = spread[0], [shape_of(source.range.param) for source in spread]
    sizes = [math.prod(shape) for shape in shapes]
    x = torch.zeros(sum(sizes), dtype=first.flat.dtype, device=first.range.param.device)
    for part, source in zip(torch.split(x, sizes), spread, strict=True):
        part[source.whole] = source.flat.detach()[source.here]
    parts = torch.split(total(x, first.peers), sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _put(part: Spread, whole: Tensor) -> None:
    """Write the local part of a whole parameter to its flat tensor."""
    own = whole.reshape(-1)[part.whole]
    part.flat.detach()[part.here].copy_(own)
    shard = getattr(part.range.param, "ds_tensor", None)
    if shard is not None:  # DeepSpeed may have copied this flat tensor to the shard already, before stepping another
        shard.detach()[: len(own)].copy_(own)
