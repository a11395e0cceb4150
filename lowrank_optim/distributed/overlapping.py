"""Implement the algebra of matrices whose neighboring ranks may share a row, because ZeRO has cut inside it.

A rank works on every row that its range of elements touches (see `fragments.py`). Where a cut divides a row, the row is
the last one of a rank and the first one of the next rank. Products of rows are fine that way, but sums over ranks would
count the shared row twice. So the rank that does *not* have the first element of the row drops it: `twice` is 1 there,
and each method narrows its operands by that row before it sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from ..recipe.algebra import WHOLE, Algebra, Drawn
from .lockstep import Peers
from .pieces import Piece
from .shards import Shards, Traffic, dims


class Overlapping(Shards):
    """The algebra of shards whose first row may also be the last row of another rank, which then counts it.

    Args:
        pieces, both, traffic: see `Shards`. A piece includes the shared rows; a row is a column of the turned matrix
            if side -1 is cut.
        twice: the number of leading local rows that another rank counts, 0 or 1.
        mine: a function that returns the elements of a tensor (..., m', n') that are in the range of this rank, and
            None for a tensor of another shape. It is None where the algebra is for chosen columns of a matrix.
    """

    def __init__(
        self,
        pieces: Mapping[int, Piece],
        both: Peers | None,
        traffic: Traffic,
        twice: int = 0,
        mine: Callable[[Tensor], Tensor | None] | None = None,
    ) -> None:
        super().__init__(pieces, both, traffic)
        self.twice, self._mine = twice, mine

    # Products that are summed over the cut side: both operands lose the shared row, or column, along that side. The
    # results, such as R (r, n'), have the shape that they have in `Shards`.

    def project(self, basis: Tensor, g: Tensor) -> Tensor:
        return super().project(self._once(basis, -2, -2), self._once(g, -2, -2))

    def sketch(self, g: Tensor, thin: Tensor) -> Tensor:
        return super().sketch(self._once(g, -1, -1), self._once(thin, -1, -2))

    def random_sketch(self, g: Tensor, width: int, drawn: Drawn) -> Tensor:
        # `drawn` counts rows of the random matrix (n', width) from the first local column; the narrowed G starts later.
        once = self._once(g, -1, -1)
        skipped = g.shape[-1] - once.shape[-1]
        return super().random_sketch(once, width, lambda rows: drawn(slice(rows.start + skipped, rows.stop + skipped)))

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return super().inner(self._once(x, -1, -1), self._once(y, -1, -2))

    def size(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        own = None if self._mine is None or factors is not None else self._mine(x)
        if own is None:
            return super().size(x, factors)
        # x may be the weight, of which this rank has the elements of its own range only, also in edge rows.
        total = self._completed(own.double().square().sum(-1)[..., None, None], *self.pieces)
        count = math.prod(map(int, self.shape(x)))
        return (total / count).sqrt().to(torch.promote_types(x.dtype, torch.float32))

    # Reductions: x loses the shared row only along dimensions that are summed. Norms of rows that are not summed over,
    # for example, are complete on both ranks that share a row.

    def energy(self, x: Tensor, dim: int, power: int = 2) -> Tensor:
        return super().energy(self.once(x, dim), dim, power)

    def norm(self, x: Tensor, dim: int | tuple[int, ...], factors: Tensor | None = None) -> Tensor:
        if factors is not None and factors.shape[-1] > 1:  # (..., 1, n'): a factor for each column
            factors = self._once(factors, -1, -1)
        return super().norm(self._counted(x, dim), dim, factors)

    def mean(self, x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        return super().mean(self._counted(x, dim), dim)

    def once(self, g: Tensor, dim: int) -> Tensor:
        return self._once(g, dim, dim)

    def completed(self, r: Tensor, rows: Tensor) -> Tensor:
        # R (r, n) was made of local rows. Its rows that come from the shared row of G are added by the other rank.
        if -2 in self.pieces:
            r = r.masked_fill((rows < self.twice).unsqueeze(-1), 0)
        return super().completed(r, rows)

    def projected(self) -> Algebra:
        # Where columns are cut, R (r, n') shares a column as G does. Where rows are cut, R is whole on every rank.
        return self if -1 in self.pieces else WHOLE

    def columns(self, g: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Algebra, Tensor]:
        shards, block = super().columns(g, spans)
        if -1 not in self.pieces:
            return self, block
        # The chosen columns have a shared column only if the first local column is among them.
        start = self.pieces[-1].start
        twice = self.twice if any(first <= start < last for first, last in spans) else 0
        return type(self)(cast(Shards, shards).pieces, None, self.traffic, twice), block

    def _lines(self, side: int) -> tuple[Callable[..., Tensor], int]:
        # Operators of `ops` sum over rows of their thin arguments (m', k): the shared row is dropped before.
        complete, first = super()._lines(side)

        def total(summed: Callable[..., Tensor], *thin: Tensor) -> Tensor:
            return complete(summed, *(self._once(x, side, -2) for x in thin))

        return total, first

    def _joined(self, y: Tensor, side: int) -> Tensor:
        # As in `Shards`, but the rows that remain after the shared one are the last rows of the piece.
        y = self._once(y, side, -2)
        piece = self.pieces[side]
        whole = y.new_zeros(*y.shape[:-2], piece.whole, y.shape[-1])
        end = piece.start + piece.length
        whole[..., end - y.shape[-2] : end, :] = y
        return self._completed(whole, side)

    def _counted(self, x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        """Return x (..., m', n') without the shared row along the dimensions that are to be summed."""
        for side in self.pieces.keys() & dims(dim):
            x = self._once(x, side, side)
        return x

    def _once(self, x: Tensor, side: int, dim: int) -> Tensor:
        """Return x without the row that another rank counts, as a view; x itself if there is none.

        Args:
            x: a tensor whose dimension `dim` runs along a side of the matrix.
            side: that side, -2 or -1. x stays as it is if the side is not cut.
        """
        return x.narrow(dim, self.twice, x.shape[dim] - self.twice) if self.twice and side in self.pieces else x
