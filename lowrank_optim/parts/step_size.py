"""Turn lr into the length of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..recipe.algebra import Algebra
from ..recipe.recipe import Clock


@dataclass(frozen=True)
class Constant:
    """The step size lr itself."""

    reads_weights: ClassVar[bool] = False

    def __call__(self, algebra: Algebra, lr: Clock, w: Tensor, step: Clock) -> Clock:
        return lr


@dataclass(frozen=True)
class Relative:
    """Adafactor's step size, relative to the size of the weights.

    Args:
        floor: lr is multiplied by the root mean square of W, which counts as at least `floor`; None: no factor.
        decay: whether lr is at most `1 / sqrt(step)` before that.
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
    """Return the smaller of two numbers, each a float or a tensor on the device."""
    if isinstance(a, Tensor):
        return a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)
