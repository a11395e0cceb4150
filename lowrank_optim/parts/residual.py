"""Fill the slot "what does the step make of `G - P P^T G`, the complement of the subspace?"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..recipe.algebra import Algebra
from ..recipe.recipe import Clock, Recipe, Residual, State, Update
from ..recipe.store import Shape, Spec, Store

_NOISE = 16  # units of rounding, relative to the largest entry of G; a smaller residual counts as zero


@dataclass(frozen=True)
class Drop(Residual):
    """The complement is dropped: the update stays in the subspace (GaLore)."""

    thin: ClassVar[bool] = True

    def after(
        self, algebra: Algebra, recipe: Recipe, st: State, g: Tensor, r: Tensor, d: Tensor, gain: Clock
    ) -> Update:
        return Update(d, gain)


@dataclass(frozen=True)
class Raw(Residual):
    """The raw complement: the update is `P D + weight (G - P R)`.

    It is computed as `P (D - weight R) + weight G`, which needs no (m, n) tensor.

    Args:
        weight: of the complement: 1 in Subspace-Momentum, 1 - beta1 in Flora.
        corrected: whether the bias correction of D applies to the complement as well, because it belongs to the same
            average.
        clip: root mean square to which the whole update is shortened, as Adafactor does; None: it is not shortened.
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
    """The signs of the complement, which give an update of full rank without state (FRUGAL).

    Where a gradient is inside the subspace, rounding leaves small entries of the complement. They count as zero, so
    that their signs do not become full steps.

    Args:
        ratio: size of an entry, relative to a step of Adam in the subspace.
    """

    ratio: float = 1.0

    def workspace(self, shape: Shape, coordinates: int) -> int:
        return round(2.25 * math.prod(shape)) + 64  # the complement, its absolute values, and a mask in bytes

    def after(
        self, algebra: Algebra, recipe: Recipe, st: State, g: Tensor, r: Tensor, d: Tensor, gain: Clock
    ) -> Update:
        rest = g.clone()
        recipe.basis.add_up_(rest, r, st, alpha=-1, beta=1)
        noise = algebra.largest(g)[..., None, None] * (_NOISE * torch.finfo(g.dtype).eps)
        return Update(d, gain, rest.masked_fill_(rest.abs() <= noise, 0).sign_(), self.ratio)


@dataclass(frozen=True)
class ErrorFeedback(Residual):
    """The complement is kept and added to the next gradient, so that it is late but not lost (DCT-AdamW, LDAdam).

    Args:
        store: keeps the error, a tensor of the size of the matrix, possibly in fewer bits.
        momentum: factor on the loss of the first moment in a change of basis, which is added to the error as well;
            beta / (1 - beta) makes the feedback exact, 0 leaves it out.
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
