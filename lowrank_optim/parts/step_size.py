"""How does lr become the length of the step?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..recipe.algebra import Algebra
from ..recipe.recipe import Clock


@dataclass(frozen=True)
class Constant:
    """lr itself."""

    reads_weights: ClassVar[bool] = False

    def __call__(self, algebra: Algebra, lr: Clock, w: Tensor, step: Clock) -> Clock:
        return lr


@dataclass(frozen=True)
class Relative:
    """Adafactor's length.

    Args:
        floor: if not None, lr is multiplied by the root mean square of W, taken as at least `floor`.
        decay: if True, lr is at most `1 / sqrt(step)` before that.
    """

    floor: float | None
    decay: bool

    @property
    def reads_weights(self) -> bool:
        return self.floor is not None

    def __call__(self, algebra: Algebra, lr: Clock, w: Tensor, step: Clock) -> Clock:
        length = _least(lr, step**-0.5) if self.decay else lr
        return length if self.floor is None else algebra.size(w).clamp_(min=self.floor).mul_(length)


def _least(a: Clock, b: Clock) -> Clock:
    if isinstance(a, Tensor):
        return a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)
