"""Fill the slot of the first moment, the average that gives the numerator of the direction."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..recipe.recipe import Clock, Momentum, State
from ..recipe.store import Shape, Spec
from ..recipe.turn import Turn


def bias_correction(beta: float, t: Clock) -> Clock:
    """Return `1 - beta^t`, the sum of the weights in an average that started at zero t steps ago."""
    return 1 - beta**t


@dataclass(frozen=True)
class EMA(Momentum):
    """The exponential moving average `m <- beta m + (1 - beta) x` of Adam.

    Args:
        beta: decay.
        debias: whether the average is read as `m / (1 - beta^t)`.
    """

    beta: float
    debias: bool = True

    def spec(self, shape: Shape) -> dict[str, Spec]:
        return {"exp_avg": Spec(shape)}

    def __call__(self, st: State, x: Tensor, t: Clock) -> tuple[Tensor, Clock]:
        return st["exp_avg"].lerp_(x, 1 - self.beta), self.gain(t)

    def mean(self, st: State, t: Clock) -> Tensor | None:
        return st["exp_avg"] * self.gain(t)

    def turn_(self, st: State, turn: Turn) -> None:
        turn.move_(st["exp_avg"])

    def reset_(self, st: State) -> None:
        st["exp_avg"].zero_()

    def gain(self, t: Clock) -> Clock:
        """Return the bias correction after t steps: the factor on the stored average."""
        return 1 / bias_correction(self.beta, t) if self.debias else 1.0


@dataclass(frozen=True)
class NoMomentum(Momentum):
    """No average: the numerator is the input."""

    def spec(self, shape: Shape) -> dict[str, Spec]:
        return {}

    def __call__(self, st: State, x: Tensor, t: Clock) -> tuple[Tensor, Clock]:
        return x, 1.0

    def mean(self, st: State, t: Clock) -> Tensor | None:
        return None

    def turn_(self, st: State, turn: Turn) -> None:
        pass

    def reset_(self, st: State) -> None:
        pass


@dataclass(frozen=True)
class HeavyBall(EMA):
    """Polyak's momentum `m <- beta m + x`, which is `1 / (1 - beta)` times as long as the average."""

    debias: bool = False

    def __call__(self, st: State, x: Tensor, t: Clock) -> tuple[Tensor, Clock]:
        return st["exp_avg"].mul_(self.beta).add_(x), 1.0

    def mean(self, st: State, t: Clock) -> Tensor | None:
        return st["exp_avg"] * ((1 - self.beta) / bias_correction(self.beta, t))
