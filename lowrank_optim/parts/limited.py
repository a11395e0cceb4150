"""Residuals whose length the subspace decides, and the limiter of their growth (Fira, APOLLO)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..ops.reference import PIECE
from ..recipe.algebra import Algebra
from ..recipe.recipe import Clock, Recipe, Residual, State, Update
from ..recipe.store import Exact, Shape, Spec
from .store import Float32

HITS = "limiter_hits"  # how often a residual was shortened
FLOOR = 1e-3  # root mean square below which a residual says nothing about the size of the next one
_TINY = 1e-8


@dataclass(frozen=True)
class _Limited(Residual):
    """A residual that may grow by at most the factor `limit` from one step to the next; None: without limit.

    Sizes are those of Adam's directions, about 1 per entry. One below `FLOOR` is not remembered: as published, a zero
    gradient caps all later residuals at 1 % of growth per step from zero, and freezes them for two thousand steps.
    """

    granularity: Literal["channel", "tensor"] = "channel"
    limit: float | None = 1.01

    def spec(self, shape: Shape) -> dict[str, Spec]:
        if self.limit is None:
            return {}
        return {"residual_size": Spec((1, 1), store=Float32()), HITS: Spec((1, 1), store=Exact(torch.int32))}

    def workspace(self, shape: Shape, coordinates: int) -> int:
        return 2 * coordinates + 8 * shape[1] + min(shape[0] * shape[1], PIECE)  # the last: squares that are summed

    def _ratio(self, algebra: Algebra, d: Tensor, gain: Clock, lengths: Tensor) -> Tensor:
        """How much the subspace's rule scales a gradient: per column of the turned matrix, or over all.

        lengths: of the columns of R.
        """
        if self.granularity == "channel":
            return algebra.norm(d, -2) * gain / (lengths + _TINY)
        both = (-2, -1)
        return algebra.norm(d, both) * gain / (algebra.norm(lengths, both) + _TINY)

    def _limited(self, st: State, limit: float, size: Tensor) -> Tensor:
        """What a residual of some size is to be multiplied by, so that it does not grow too fast."""
        before = st["residual_size"]
        most = torch.where(before > 0, limit * before, size)
        shortened = torch.minimum(size, most)
        st[HITS].add_(shortened < size)
        st["residual_size"].copy_(torch.where(shortened >= FLOOR, shortened, before))
        return torch.where(size > 0, shortened / size.clamp(min=torch.finfo(size.dtype).tiny), 1.0)


@dataclass(frozen=True)
class NormScaled(_Limited):
    """Fira: the rest of the gradient, scaled column by column as much as Adam scales the part in the subspace.

    Args:
        code_scale: None for the paper's form; `scale` of the group for that of its authors' code, which takes
            `G - scale P R` for the rest, and does not multiply it by scale afterwards.
    """

    code_scale: float | None = None

    def after(
        self, algebra: Algebra, recipe: Recipe, st: State, g: Tensor, r: Tensor, d: Tensor, gain: Clock
    ) -> Update:
        inside, part = recipe.basis.inside(algebra), self.code_scale or 1.0
        lengths = inside.norm(r, -2)
        factors = self._ratio(inside, d, gain, lengths)
        if self.limit is not None:
            size = self._size(algebra, inside, g, lengths, factors, part)
            factors = factors * self._limited(st, self.limit, size)
        # The rest S = G - part P R is not formed: up(D) + S f / part = up(D - R f) + G f / part.
        return Update(torch.addcmul(d * gain, r, factors, value=-1), 1.0, g, factors / part)

    @staticmethod
    def _size(algebra: Algebra, inside: Algebra, g: Tensor, lengths: Tensor, factors: Tensor, part: float) -> Tensor:
        """Of the rest, by Pythagoras: P is orthonormal, so a column of it has `|G_j|^2 - (2 part - part^2) |R_j|^2`."""
        squares = algebra.energy(g, -2).unsqueeze(-2) - (2 * part - part**2) * lengths.square()
        columns = squares.clamp_(min=0).sqrt_() * factors
        m, n = algebra.shape(g)
        return inside.norm(columns, (-2, -1)) / math.sqrt(int(m) * int(n))


@dataclass(frozen=True)
class Rescaled(_Limited):
    """APOLLO: the whole gradient, scaled by what Adam does in a random subspace, and nothing else. It is not copied.

    Args:
        front: a factor before the limiter.
    """

    front: float = 1.0
    lifts: ClassVar[bool] = False

    def after(
        self, algebra: Algebra, recipe: Recipe, st: State, g: Tensor, r: Tensor, d: Tensor, gain: Clock
    ) -> Update:
        inside = recipe.basis.inside(algebra)
        factors = self._ratio(inside, d, gain, inside.norm(r, -2)) * self.front
        if self.limit is not None:
            factors = factors * self._limited(st, self.limit, algebra.size(g, factors))
        return Update(None, rest=g, rest_gain=factors)
