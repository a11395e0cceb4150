"""What of `G - P P^T G`, the part of the gradient outside the subspace?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..recipe.algebra import Algebra
from ..recipe.recipe import Clock, Recipe, Residual, State, Update
from ..recipe.store import Shape, Spec, Store

_NOISE = 16  # units of rounding below which a residual is none


@dataclass(frozen=True)
class Drop(Residual):
    """Nothing: the update stays in the subspace (GaLore)."""

    thin: ClassVar[bool] = True

    def after(
        self, algebra: Algebra, recipe: Recipe, st: State, g: Tensor, r: Tensor, d: Tensor, gain: Clock
    ) -> Update:
        return Update(d, gain)


@dataclass(frozen=True)
class Raw(Residual):
    """The rest as it is: `up(D) + weight (G - up(R))`. Subspace-Momentum (weight 1), Flora (weight 1 - beta1).

    Written as `up(D - weight R) + weight G`, which needs no (m, n) tensor.

    Args:
        corrected: the bias correction of D applies to the rest as well, because it is a part of the same average.
        clip: the root mean square to which the whole update is shortened, as Adafactor does; None: not.
    """

    weight: float = 1.0
    corrected: bool = False
    clip: float | None = None

    def workspace(self, shape: Shape, coordinates: int) -> int:
        return 3 * coordinates

    def after(
        self, algebra: Algebra, recipe: Recipe, st: State, g: Tensor, r: Tensor, d: Tensor, gain: Clock
    ) -> Update:
        weight = self.weight * gain if self.corrected else self.weight
        update = Update(d * gain - r * weight, 1.0, g, weight)
        if self.clip is None:
            return update
        whole = update.whole(recipe, st, g, recipe.scales_first)
        return Update(None, rest=whole, rest_gain=1 / (algebra.size(whole) / self.clip).clamp_(min=1))


@dataclass(frozen=True)
class Sign(Residual):
    """Its signs, `ratio` times as long as a step of Adam in the subspace: no state, and full rank (FRUGAL).

    What rounding leaves of a gradient that lies in the subspace has no sign.
    """

    ratio: float = 1.0

    def workspace(self, shape: Shape, coordinates: int) -> int:
        return round(2.25 * math.prod(shape)) + 64

    def after(
        self, algebra: Algebra, recipe: Recipe, st: State, g: Tensor, r: Tensor, d: Tensor, gain: Clock
    ) -> Update:
        rest = g.clone()
        recipe.basis.add_up_(rest, r, st, alpha=-1, beta=1)
        noise = algebra.largest(g)[..., None, None] * (_NOISE * torch.finfo(g.dtype).eps)
        return Update(d, gain, rest.masked_fill_(rest.abs() <= noise, 0).sign_(), self.ratio)


@dataclass(frozen=True)
class ErrorFeedback(Residual):
    """It is kept and added to the next gradient, so that nothing is lost, only late (DCT-AdamW, LDAdam).

    Costs a tensor of the size of the matrix, which `store` may shrink.

    Args:
        momentum: also what the moments lose when they are turned, times this; beta / (1 - beta) makes it exact.
    """

    store: Store
    momentum: float = 0.0
    feeds_back: ClassVar[bool] = True

    def spec(self, shape: Shape) -> dict[str, Spec]:
        return {"error": Spec(shape, store=self.store)}

    def workspace(self, shape: Shape, coordinates: int) -> int:
        return math.prod(shape)

    def before(self, g: Tensor, st: State) -> Tensor:
        whole = g + st["error"]
        st["error"].zero_()
        return whole

    def turning_(self, recipe: Recipe, st: State, basis: State, sign: float) -> None:
        if self.momentum:
            recipe.basis.add_up_(st["error"], st["exp_avg"], basis, alpha=sign * self.momentum, beta=1)

    def after(
        self, algebra: Algebra, recipe: Recipe, st: State, g: Tensor, r: Tensor, d: Tensor, gain: Clock
    ) -> Update:
        st["error"].add_(g)
        recipe.basis.add_up_(st["error"], r, st, alpha=-1, beta=1)
        return Update(d, gain)
