"""First moments (EMA, none) and second moments (RMS, factored)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..distributed.algebra import Algebra
from ..recipe import Clock, Momentum, Scaling, Shape, Spec, State, Turn


def bias_correction(beta: float, t: Clock) -> Clock:
    """`1 - beta^t`: the weight that an average started at zero has seen after t steps of its own clock."""
    return 1 - beta**t


@dataclass(frozen=True)
class EMA(Momentum):
    """`m <- beta m + (1 - beta) x`, read as `m / (1 - beta^t)` unless `debias` is off."""

    beta: float
    debias: bool = True

    def spec(self, shape: Shape) -> dict[str, Spec]:
        return {"exp_avg": Spec(shape)}

    def __call__(self, st: State, x: Tensor, t: Clock) -> tuple[Tensor, Clock]:
        return st["exp_avg"].lerp_(x, 1 - self.beta), self._gain(t)

    def mean(self, st: State, t: Clock) -> Tensor | None:
        return st["exp_avg"] * self._gain(t)

    def turn_(self, st: State, turn: Turn) -> None:
        st["exp_avg"].copy_(turn(st["exp_avg"]))

    def reset_(self, st: State) -> None:
        st["exp_avg"].zero_()

    def _gain(self, t: Clock) -> Clock:
        return 1 / bias_correction(self.beta, t) if self.debias else 1.0


@dataclass(frozen=True)
class NoMomentum(Momentum):
    """The numerator is what came in."""

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
class RMS(Scaling):
    """Adam's denominator: `v <- beta v + (1 - beta) r^2`, `x / (sqrt(v / (1 - beta^t)) + eps)`."""

    beta: float
    eps: float
    scratch: ClassVar[int] = 1

    def spec(self, shape: Shape) -> dict[str, Spec]:
        return {"exp_avg_sq": Spec(shape)}

    def __call__(self, algebra: Algebra, st: State, x: Tensor, r: Tensor, t: Clock) -> Tensor:
        v = st["exp_avg_sq"].mul_(self.beta).addcmul_(r, r, value=1 - self.beta)
        scratch = torch.empty_like(r) if x is r else r
        denominator = torch.sqrt(v, out=scratch).mul_(bias_correction(self.beta, t) ** -0.5).add_(self.eps)
        return torch.div(x, denominator, out=denominator)

    def turn_(self, algebra: Algebra, st: State, turn: Turn, mean: Tensor | None, t: Clock) -> None:
        v, correction = st["exp_avg_sq"], bias_correction(self.beta, t)
        if mean is None:
            v.copy_(turn.variances(v))
            return
        # The clamp keeps v >= (turned mean)^2 >= 0: the two averages have different memories, so v < m^2 does happen.
        variance = (v / correction - mean.square()).clamp_(min=0)
        v.copy_((turn.variances(variance) + turn(mean).square()) * correction)

    def reset_(self, st: State) -> None:
        st["exp_avg_sq"].zero_()


@dataclass(frozen=True)
class Factored(Scaling):
    """Adafactor's denominator: only the row and column means of `r^2` are kept.

    `v_ij = row_i col_j / mean(row)`, averaged with `beta_t = 1 - t^decay`, and the scaled update is shortened to a
    root mean square of at most `clip`. Vectors keep a full second moment.
    """

    decay: float
    eps: float | None  # None: the dtype's own
    clip: float
    elementwise: ClassVar[bool] = False
    scratch: ClassVar[int] = 2

    def spec(self, shape: Shape) -> dict[str, Spec]:
        if len(shape) == 1:
            return {"variance": Spec(shape)}
        m, n = shape
        return {"row_var": Spec((m, 1)), "col_var": Spec((1, n))}

    def __call__(self, algebra: Algebra, st: State, x: Tensor, r: Tensor, t: Clock) -> Tensor:
        squares, weight = r.square(), t**self.decay
        if "variance" in st:
            squares.copy_(_average_(st["variance"], squares, weight))
        else:
            _average_(st["row_var"], algebra.mean(squares, -1), weight)
            _average_(st["col_var"], algebra.mean(squares, -2), weight)
            torch.mul(self._rows(algebra, st), st["col_var"], out=squares)
        update = squares.clamp_(min=self._floor(r) ** 2).rsqrt_().mul_(x)
        return update.div_((algebra.size(update) / self.clip).clamp_(min=1))

    def turn_(self, algebra: Algebra, st: State, turn: Turn, mean: Tensor | None, t: Clock) -> None:
        turned = turn.variances(self._rows(algebra, st) * st["col_var"])
        st["row_var"].copy_(algebra.mean(turned, -1))
        st["col_var"].copy_(algebra.mean(turned, -2))

    def reset_(self, st: State) -> None:
        for key in ("row_var", "col_var"):
            st[key].zero_()

    def _rows(self, algebra: Algebra, st: State) -> Tensor:
        """The row factor with which `rows * columns` has the means that are kept."""
        return st["row_var"] / algebra.mean(st["row_var"], -2).clamp_(min=self._floor(st["row_var"]))

    def _floor(self, x: Tensor) -> float:
        return torch.finfo(x.dtype).eps if self.eps is None else self.eps


def _average_(average: Tensor, x: Tensor, weight: Clock) -> Tensor:
    """`average <- (1 - weight) average + weight x`, for a number or one weight per matrix."""
    return average.add_((x - average) * weight)
