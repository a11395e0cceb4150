"""`W <- keep W - change`: in place, or where W is in 16 bits some columns at a time, with one rounding at the end.

A weight in 16 bits never exists in 32 as a whole. For each block of columns the change is made in float32, and one pass
over the block in W decays, adds and rounds it (`ops/apply.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from .. import ops
from ..ops.blocks import Columns, blocks
from ..ops.philox import Places
from ..recipe.recipe import Clock, Recipe, State, Update
from ..recipe.weights import COMPENSATION, WEIGHT
from .chunk import Chunk


def apply_(recipe: Recipe, w: Tensor, st: State, change: Update, keep: Clock, columns: Columns | None = None) -> None:
    """`W <- keep W - change`. Where keep is 0, w is not read. `columns`: w has only these of the matrix."""
    if isinstance(keep, Tensor):
        w.mul_(keep)
        keep = 1.0
    scaled = change.rest is not None and isinstance(change.rest_gain, Tensor)
    if scaled:
        _take_scaled_(w, cast(Tensor, change.rest), cast(Tensor, change.rest_gain), keep, columns)
        keep = 1.0
    elif change.d is None:
        w.mul_(keep) if keep else w.zero_()
    if change.d is not None:
        recipe.basis.add_up_(w, change.d, st, alpha=-cast(float, change.gain), beta=keep, columns=columns)
    if change.rest is not None and not scaled:
        w.add_(change.rest if columns is None else columns.of(change.rest), alpha=-cast(float, change.rest_gain))
    if change.entries is not None:
        _take_entries_(w, *change.entries, columns)


def _take_scaled_(w: Tensor, rest: Tensor, gain: Tensor, keep: float, columns: Columns | None) -> None:
    """`W <- keep W - rest gain`."""
    if columns is not None:
        rest, gain = columns.of(rest), gain if not gain.dim() or gain.shape[-1] == 1 else columns.of(gain)
    ops.take_scaled_(w, rest, gain, keep)


def apply_narrow_(recipe: Recipe, chunk: Chunk, like: Tensor, st: State, change: Update, keep: Clock) -> None:
    """The same for the weights of a chunk as they are kept. `like`: of the shape of W, in the dtype of arithmetic."""
    turned = chunk.plans[0].side == "right" and not chunk.partial
    memory = None
    for columns in blocks(like.shape, like.device.type):
        shape = columns.of(like).shape
        memory = like.new_empty(shape.numel()) if memory is None else memory
        flat = memory[: shape.numel()]
        x = flat.view(*shape[:-2], shape[-1], shape[-2]).mT if turned else flat.view(shape)  # as W lies in memory
        apply_(recipe, x, st, change, 0.0, columns)
        for i, part in enumerate(chunk._split(x)):
            _write_(chunk, i, part.mT if turned else part, keep, columns, turned)


def _write_(chunk: Chunk, i: int, x: Tensor, keep: Clock, columns: Columns, turned: bool) -> None:
    """`W <- round(keep W + x)` in some columns of parameter number i, as `bf16_update` says."""
    p, plan, owed = chunk.params[i], chunk.plans[i], chunk.states[i].get(COMPENSATION)
    if not p.numel():
        return
    width = x.shape[-1] if turned else columns.whole
    origin, pitch = _numbers(chunk._number(WEIGHT, math.prod(plan.matrix)), width)
    noisy = p.dtype == torch.bfloat16 and chunk.group["bf16_update"] == "stochastic"
    for row, first, piece in _pieces(x, columns, turned):
        w, rest = (None if y is None else y.view(-1, width)[row : row + len(piece)] for y in (p, owed))
        noise = plan.key, ops.stream_of(WEIGHT, chunk.time), origin + row * pitch + first, pitch
        ops.add_rounded_(cast(Tensor, w), piece, keep, first=first, owed=rest, noise=noise if noisy else None)


def _pieces(x: Tensor, columns: Columns, turned: bool) -> Iterator[tuple[int, int, Tensor]]:
    """(row, column, x) of what lies together in the rows of a parameter, which turned columns are."""
    rows = x.reshape(-1, x.shape[-1])
    if not turned or columns.stop - columns.first == columns.whole:
        yield 0, 0 if turned else columns.first, rows
    else:
        for k, some in enumerate(torch.split(rows, columns.stop - columns.first)):
            yield k * columns.whole + columns.first, 0, some


def _numbers(start: int | Places, width: int) -> tuple[int, int]:
    """The number of the first element of a parameter, and from one of its rows to the next."""
    if not isinstance(start, Places):
        return start, width
    pitch = start.run + start.gap
    return start.base + start.start // start.run * pitch, pitch


def _take_entries_(w: Tensor, place: Tensor, values: Tensor, columns: Columns | None) -> None:
    """Single entries; those of other columns as zeros, so that which ones they are stays on the device."""
    n = w.shape[-1] if columns is None else columns.whole
    row, column = place.long() // n, place.long() % n
    if columns is not None:
        values = values * ((column >= columns.first) & (column < columns.stop))
        column = (column - columns.first).clamp_(0, w.shape[-1] - 1)
    where = [row, column]
    if w.dim() > 2:
        where.insert(0, torch.arange(len(w), device=w.device).unsqueeze(-1).expand_as(row))
    w.index_put_(tuple(where), -values, accumulate=True)
