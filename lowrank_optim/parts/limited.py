"""Fill the residual slot with gradients scaled as Adam scales the subspace, and limit their growth (Fira, APOLLO)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..ops.reference.pieces import PIECE
from ..recipe.algebra import Algebra
from ..recipe.recipe import Clock, Recipe, Residual, State, Update
from ..recipe.store import Exact, Shape, Spec
from .store import Float32

HITS = "limiter_hits"  # state key: how often the residual was shortened
FLOOR = 1e-3  # root mean square below which a residual says nothing about the size of the next one
_TINY = 1e-8  # keeps the ratio finite for a column of R that is zero


@dataclass(frozen=True)
class _Limited(Residual):
    """A residual that grows at most by a given factor from one step to the next.

    Sizes are root mean squares, about 1 as those of Adam's directions. The limiter does not remember a size below
    `FLOOR`. As published, a zero gradient caps all later residuals at 1 % of growth per step from zero, and so freezes
    them for two thousand steps.

    Args:
        granularity: "channel", one ratio per column of the turned matrix, or "tensor", one for the whole matrix.
        limit: the largest growth factor; None: no limit.
    """

    granularity: Literal["channel", "tensor"] = "channel"
    limit: float | None = 1.01

    def spec(self, shape: Shape) -> dict[str, Spec]:
        if self.limit is None:
            return {}
        return {"residual_size": Spec((1, 1), store=Float32()), HITS: Spec((1, 1), store=Exact(torch.int32))}

    def workspace(self, shape: Shape, coordinates: int) -> int:
        return (
            2 * coordinates + 8 * shape[1] + min(shape[0] * shape[1], PIECE)
        )  # the last term: squares that are summed

    def _ratio(self, algebra: Algebra, d: Tensor, gain: Clock, lengths: Tensor) -> Tensor:
        """Return how much the rule in the subspace scales a gradient, `|D| / |R|`.

        Args:
            algebra: of R.
            d: direction without its gain, `(..., r, n)`.
            gain: the direction is `gain d`.
            lengths: norms of the columns of R, `(..., 1, n)`.

        Returns:
            `(..., 1, n)`, or `(..., 1, 1)` for the granularity "tensor".
        """
        if self.granularity == "channel":
            return algebra.norm(d, -2) * gain / (lengths + _TINY)
        both = (-2, -1)
        return algebra.norm(d, both) * gain / (algebra.norm(lengths, both) + _TINY)

    def _limited(self, st: State, limit: float, size: Tensor) -> Tensor:
        """Return the factor `(..., 1, 1)`, at most 1, that keeps a residual of this size from growing too fast.

        The remembered size and the counter of shortened residuals are updated.
        """
        before = st["residual_size"]
        most = torch.where(before > 0, limit * before, size)
        shortened = torch.minimum(size, most)
        st[HITS].add_(shortened < size)
        st["residual_size"].copy_(torch.where(shortened >= FLOOR, shortened, before))
        return torch.where(size > 0, shortened / size.clamp(min=torch.finfo(size.dtype).tiny), 1.0)


@dataclass(frozen=True)
class NormScaled(_Limited):
    """The complement of the gradient, each column scaled as much as Adam scales the part in the subspace (Fira).

    Args:
        code_scale: None: the form of the paper, with the complement `G - P R`. The `scale` of the group: the form of
            the authors' code, which uses `G - scale P R` and does not multiply it by scale afterwards.
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
        # The complement S = G - part P R (m, n) is not formed: P D + S f / part = P (D - R f) + G f / part.
        return Update(torch.addcmul(d * gain, r, factors, value=-1), 1.0, g, factors / part)

    @staticmethod
    def _size(algebra: Algebra, inside: Algebra, g: Tensor, lengths: Tensor, factors: Tensor, part: float) -> Tensor:
        """Return the root mean square `(..., 1, 1)` of the scaled complement, without forming it.

        P is orthonormal, so by Pythagoras column j of `G - part P R` has the square
        `|G_j|^2 - (2 part - part^2) |R_j|^2`.
        """
        squares = algebra.energy(g, -2).unsqueeze(-2) - (2 * part - part**2) * lengths.square()
        columns = squares.clamp_(min=0).sqrt_() * factors
        m, n = algebra.shape(g)
        return inside.norm(columns, (-2, -1)) / math.sqrt(int(m) * int(n))


@dataclass(frozen=True)
class Rescaled(_Limited):
    """The whole gradient, scaled as much as Adam scales its projection to a random subspace (APOLLO).

    The update has no other term, and the gradient is not copied.

    Args:
        front: factor on the gradient before the limiter.
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
