"""The algebra of rows that two neighbours may both have, as where ZeRO cuts within a row."""

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
    """Shards whose first row may also be the last of another: sums leave out a row that does not begin here.

    Args:
        twice: rows at the beginning that are counted elsewhere, 0 or 1.
        mine: the elements of something like the whole matrix that no other process has, None if it is nothing like it;
            None: here are some columns of a matrix.
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

    def project(self, basis: Tensor, g: Tensor) -> Tensor:
        return super().project(self._once(basis, -2, -2), self._once(g, -2, -2))

    def sketch(self, g: Tensor, thin: Tensor) -> Tensor:
        return super().sketch(self._once(g, -1, -1), self._once(thin, -1, -2))

    def random_sketch(self, g: Tensor, width: int, drawn: Drawn) -> Tensor:
        once = self._once(g, -1, -1)
        skipped = g.shape[-1] - once.shape[-1]
        return super().random_sketch(once, width, lambda some: drawn(slice(some.start + skipped, some.stop + skipped)))

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return super().inner(self._once(x, -1, -1), self._once(y, -1, -2))

    def size(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        own = None if self._mine is None or factors is not None else self._mine(x)
        if own is None:
            return super().size(x, factors)
        # Here x may be the weight, of which this process has the elements of its own range and no others.
        total = self._completed(own.double().square().sum(-1)[..., None, None], *self.pieces)
        count = math.prod(map(int, self.shape(x)))
        return (total / count).sqrt().to(torch.promote_types(x.dtype, torch.float32))

    def energy(self, x: Tensor, dim: int, power: int = 2) -> Tensor:
        return super().energy(self.once(x, dim), dim, power)

    def norm(self, x: Tensor, dim: int | tuple[int, ...], factors: Tensor | None = None) -> Tensor:
        if factors is not None and factors.shape[-1] > 1:  # one per column
            factors = self._once(factors, -1, -1)
        return super().norm(self._counted(x, dim), dim, factors)

    def mean(self, x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        return super().mean(self._counted(x, dim), dim)

    def once(self, g: Tensor, dim: int) -> Tensor:
        return self._once(g, dim, dim)

    def completed(self, r: Tensor, rows: Tensor) -> Tensor:
        if -2 in self.pieces:
            r = r.masked_fill((rows < self.twice).unsqueeze(-1), 0)
        return super().completed(r, rows)

    def projected(self) -> Algebra:
        return self if -1 in self.pieces else WHOLE

    def columns(self, g: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Algebra, Tensor]:
        shards, block = super().columns(g, spans)
        if -1 not in self.pieces:
            return self, block
        start = self.pieces[-1].start
        twice = self.twice if any(first <= start < last for first, last in spans) else 0
        return type(self)(cast(Shards, shards).pieces, None, self.traffic, twice), block

    def _lines(self, side: int) -> tuple[Callable[..., Tensor], int]:
        complete, first = super()._lines(side)

        def total(summed: Callable[..., Tensor], *thin: Tensor) -> Tensor:
            return complete(summed, *(self._once(x, side, -2) for x in thin))

        return total, first

    def _joined(self, y: Tensor, side: int) -> Tensor:
        y = self._once(y, side, -2)
        piece = self.pieces[side]
        whole = y.new_zeros(*y.shape[:-2], piece.whole, y.shape[-1])
        end = piece.start + piece.length
        whole[..., end - y.shape[-2] : end, :] = y
        return self._completed(whole, side)

    def _counted(self, x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        for one in self.pieces.keys() & dims(dim):
            x = self._once(x, one, one)
        return x

    def _once(self, x: Tensor, side: int, dim: int) -> Tensor:
        """Without the row that is counted elsewhere, if dimension `dim` of x is that side of the matrix, and cut."""
        return x.narrow(dim, self.twice, x.shape[dim] - self.twice) if self.twice and side in self.pieces else x
