"""What of `G - P P^T G`, the part of the gradient outside the subspace?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..distributed.algebra import Algebra
from ..recipe import Basis, State


@dataclass(frozen=True)
class Drop:
    """Nothing: the update stays in the subspace (GaLore)."""

    def before(self, g: Tensor, st: State) -> Tensor:
        return g

    def after(self, algebra: Algebra, g: Tensor, r: Tensor, d: Tensor, basis: Basis, st: State) -> Tensor | None:
        return None
