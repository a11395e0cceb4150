"""Writing an update to the weights: `W <- keep W - change`, where `keep = 1 - lr wd` is what weight decay leaves of W.

A weight in the working dtype is updated in place. A weight in 16 bits never exists in 32 bits as a whole. For each
block of columns the change is made in float32, and one pass over the block in W decays, adds and rounds it. This is
possible because the columns of the turned W do not depend on each other once the direction D is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from .. import ops
from ..ops import reference
from ..ops.blocks import Columns, blocks
from ..ops.philox import Places, Stream, numbers_of
from ..ops.schema import kernel
from ..recipe.recipe import Clock, Recipe, State, Update
from ..recipe.weights import COMPENSATION, WEIGHT
from .chunk import Chunk

Noise = tuple[int, Stream, int, int]  # key, stream, number of the first element of x, and step from row to row


def apply_(recipe: Recipe, w: Tensor, st: State, change: Update, keep: Clock, columns: Columns | None = None) -> None:
    """Update W `(m, n)` or `(b, m, n)` in place: `W <- keep W - change`. If keep is 0, w is not read.

    Args:
        columns: w consists of these columns of the matrix alone, while the tensors of `change` are whole.
    """
    # A product takes its factor `beta` as a number only, so a keep on the device decays W in a pass of its own. A
    # number is applied by the first pass over W that follows.
    if isinstance(keep, Tensor):
        w.mul_(keep)
        keep = 1.0
    # A gain per column (1, n), or per matrix, multiplies the rest in passing, without a second (m, n) tensor.
    scaled = change.rest is not None and isinstance(change.rest_gain, Tensor)
    if scaled:
        _take_scaled_(w, cast(Tensor, change.rest), cast(Tensor, change.rest_gain), keep, columns)
        keep = 1.0
    elif change.d is None:
        # No later pass applies keep. A buffer that was never written may hold NaN, which 0 W would keep.
        w.mul_(keep) if keep else w.zero_()
    if change.d is not None:
        # The product itself adds to W, so up(D) = P D (m, n) is no tensor: W <- keep W - gain P D.
        recipe.basis.add_up_(w, change.d, st, alpha=-cast(float, change.gain), beta=keep, columns=columns)
    if change.rest is not None and not scaled:
        w.add_(change.rest if columns is None else columns.of(change.rest), alpha=-cast(float, change.rest_gain))
    if change.entries is not None:
        _take_entries_(w, *change.entries, columns)


def _take_scaled_(w: Tensor, rest: Tensor, gain: Tensor, keep: float, columns: Columns | None) -> None:
    """Update W in place: `W <- keep W - rest gain`, with a gain that is a tensor."""
    if columns is not None:
        rest, gain = columns.of(rest), gain if not gain.dim() or gain.shape[-1] == 1 else columns.of(gain)
    ops.take_scaled_(w, rest, gain, keep)


def apply_narrow_(recipe: Recipe, chunk: Chunk, like: Tensor, st: State, change: Update, keep: Clock) -> None:
    """Update the 16-bit weights of a chunk, block by block: `W <- round(keep W - change)`.

    Args:
        like: a tensor with the shape of the turned W and the dtype of the arithmetic.
    """
    turned = chunk.plans[0].side == "right" and not chunk.partial
    # One buffer serves all blocks. The first block is the largest one.
    memory = None
    for columns in blocks(like.shape, like.device.type):
        shape = columns.of(like).shape
        memory = like.new_empty(shape.numel()) if memory is None else memory
        flat = memory[: shape.numel()]
        # The block has the strides of W in memory. Columns of a turned W are rows of the parameter, so x (m, k) is then
        # a transposed view of (k, m).
        x = flat.view(*shape[:-2], shape[-1], shape[-2]).mT if turned else flat.view(shape)
        # With keep 0, x becomes minus the change. Decay is left to the pass that rounds, where W is read anyway.
        apply_(recipe, x, st, change, 0.0, columns)
        for i, part in enumerate(chunk._split(x)):
            _write_(chunk, i, part.mT if turned else part, keep, columns, turned)


def _write_(chunk: Chunk, i: int, x: Tensor, keep: Clock, columns: Columns, turned: bool) -> None:
    """Round some columns of parameter number i in place: `W <- round(keep W + x)`, as `bf16_update` says.

    Args:
        x: the tensor that is added to these columns, with the strides of the parameter.
        columns: the columns of the turned matrix.
        turned: whether these are rows of the parameter.
    """
    p, plan, owed = chunk.params[i], chunk.plans[i], chunk.states[i].get(COMPENSATION)
    if not p.numel():
        return
    # As rows (-1, width) of the parameter. Noise is numbered by the position in the whole parameter, so that blocks,
    # slices and shards round as one pass over all of W would.
    width = x.shape[-1] if turned else columns.whole
    origin, pitch = _numbers(chunk._number(WEIGHT, math.prod(plan.matrix)), width)
    noisy = p.dtype == torch.bfloat16 and chunk.group["bf16_update"] == "stochastic"
    for row, first, piece in _pieces(x, columns, turned):
        w, compensation = (None if y is None else y.view(-1, width)[row : row + len(piece)] for y in (p, owed))
        noise = plan.key, ops.stream_of(WEIGHT, chunk.time), origin + row * pitch + first, pitch
        add_rounded_(cast(Tensor, w), piece, keep, first=first, owed=compensation, noise=noise if noisy else None)


def _pieces(x: Tensor, columns: Columns, turned: bool) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (row, column, x) for each part of x whose rows follow each other in the parameter."""
    # Columns of a turned W are rows of the parameter. In a stack, x (b, k, m) has k rows of each of b matrices, and
    # other columns are between them.
    rows = x.reshape(-1, x.shape[-1])
    if not turned or columns.stop - columns.first == columns.whole:
        yield 0, 0 if turned else columns.first, rows
    else:
        for k, matrix_rows in enumerate(torch.split(rows, columns.stop - columns.first)):
            yield k * columns.whole + columns.first, 0, matrix_rows


def _numbers(start: int | Places, width: int) -> tuple[int, int]:
    """Return the noise number of the first element of a parameter, and the pitch from one of its rows to the next."""
    if not isinstance(start, Places):
        return start, width
    pitch = start.run + start.gap
    return start.base + start.start // start.run * pitch, pitch


def _take_entries_(w: Tensor, place: Tensor, values: Tensor, columns: Columns | None) -> None:
    """Subtract single entries from W, given by flat positions `(k,)` or `(b, k)` in the whole matrix.

    Entries of other columns are subtracted as zeros. Selecting them would need their number, for which the host would
    wait.
    """
    # w has some columns (m, k) of the matrix (m, n), but positions count in the whole matrix, row by row.
    n = w.shape[-1] if columns is None else columns.whole
    row, column = place.long() // n, place.long() % n
    if columns is not None:
        values = values * ((column >= columns.first) & (column < columns.stop))
        column = (column - columns.first).clamp_(0, w.shape[-1] - 1)
    # Values are accumulated: clamped positions may repeat, and add zero.
    where = [row, column]
    if w.dim() > 2:
        where.insert(0, torch.arange(len(w), device=w.device).unsqueeze(-1).expand_as(row))
    w.index_put_(tuple(where), -values, accumulate=True)


def add_rounded_(
    w: Tensor,
    x: Tensor,
    keep: float | Tensor,
    *,
    first: int = 0,
    owed: Tensor | None = None,
    noise: Noise | None = None,
) -> None:
    """Update weights by `W <- keep W + x`, and round once: to nearest, with Kahan compensation, or stochastically.

    Args:
        w: (rows, width), bfloat16, or float16 without noise.
        x: (rows, columns), float32. It is added to the columns of w from `first` on; the remaining columns stay.
        keep: the factor that weight decay leaves, as a number or as a tensor of one number on the device.
        owed: like w, the rounding errors so far, which are added before rounding and replaced by the new ones (Kahan).
        noise: the random numbers of stochastic rounding, one per element of x.
    """
    number, factor = (1.0, keep) if isinstance(keep, Tensor) else (keep, None)
    find = kernel if w.dtype == torch.bfloat16 else lambda name: getattr(reference, name)
    if owed is not None:
        find("add_kahan_")(w, owed, x, number, factor, first)
    elif noise is not None:
        key, stream, start, pitch = noise
        kernel("add_stochastic_")(w, x, number, *numbers_of(key, stream), start, pitch, factor, first)
    else:
        find("add_nearest_")(w, x, number, factor, first)
