"""Fill the slot of the second moment, the denominator of the direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from .. import ops
from ..ops.reference.pieces import PIECE
from ..recipe.algebra import Algebra
from ..recipe.recipe import Clock, Scaling, State
from ..recipe.store import Shape, Spec
from ..recipe.turn import Turn
from .momentum import bias_correction


@dataclass(frozen=True)
class NoScaling(Scaling):
    """No second moment: the direction is the numerator."""

    def spec(self, shape: Shape) -> dict[str, Spec]:
        return {}

    def __call__(self, algebra: Algebra, st: State, x: Tensor, r: Tensor, t: Clock) -> Tensor:
        return x

    def turn_(self, algebra: Algebra, st: State, turn: Turn, mean: Tensor | None, t: Clock) -> None:
        pass

    def reset_(self, st: State) -> None:
        pass


@dataclass(frozen=True)
class RMS(Scaling):
    """Adam's second moment: `v <- beta v + (1 - beta) r^2`, with the direction `x / (sqrt(v / (1 - beta^t)) + eps)`."""

    beta: float
    eps: float
    scratch: ClassVar[int] = 1

    def spec(self, shape: Shape) -> dict[str, Spec]:
        return {"exp_avg_sq": Spec(shape, unsigned=True)}

    def __call__(self, algebra: Algebra, st: State, x: Tensor, r: Tensor, t: Clock) -> Tensor:
        v = st["exp_avg_sq"].mul_(self.beta).addcmul_(r, r, value=1 - self.beta)
        denominator = torch.sqrt(v).mul_(bias_correction(self.beta, t) ** -0.5).add_(self.eps)
        return torch.div(x, denominator, out=denominator)

    def turn_(self, algebra: Algebra, st: State, turn: Turn, mean: Tensor | None, t: Clock) -> None:
        v, correction = st["exp_avg_sq"], bias_correction(self.beta, t)
        if not turn.mixes:  # coordinates only change places
            turn.move_(v)
            return
        if mean is None:
            v.copy_(turn.variances(v))
            return
        # The two averages have different decays, so v < m^2 does happen. The clamp keeps v >= (turned mean)^2 >= 0.
        variance = (v / correction - mean.square()).clamp_(min=0)
        v.copy_((turn.variances(variance) + turn(mean).square()) * correction)

    def reset_(self, st: State) -> None:
        st["exp_avg_sq"].zero_()


@dataclass(frozen=True)
class Factored(Scaling):
    """Adafactor's second moment, of which only the row means and column means of `r^2` are kept.

    They are averaged with `beta_t = 1 - t^decay`, and `v_ij = row_i col_j / mean(row)`. Vectors keep a full second
    moment.

    Args:
        decay: exponent, below 0.
        eps: smallest denominator; None: the epsilon of the dtype.
        clip: largest root mean square of the scaled update, which is shortened to it; None: it is not shortened.
    """

    decay: float
    eps: float | None
    clip: float | None
    elementwise: ClassVar[bool] = False
    scratch: ClassVar[int] = 1

    def workspace(self, count: int) -> int:
        return max(count, 4 * min(count, PIECE))  # the second: squares in float64, in plain torch

    def spec(self, shape: Shape) -> dict[str, Spec]:
        if len(shape) == 1:
            return {"variance": Spec(shape, unsigned=True)}
        m, n = shape
        return {"row_var": Spec((m, 1), unsigned=True), "col_var": Spec((1, n), unsigned=True)}

    def __call__(self, algebra: Algebra, st: State, x: Tensor, r: Tensor, t: Clock) -> Tensor:
        if "variance" in st:
            variance = _average_(st["variance"], r.square(), t**self.decay)
            update = variance.clamp(min=self._floor(r) ** 2).rsqrt_().mul_(x)
        else:
            update = ops.scale_factored(x, self.factors_(algebra, st, r, t))
        return update if self.clip is None else update.div_(self.excess(algebra.size(update)))

    def factors_(self, algebra: Algebra, st: State, r: Tensor, t: Clock) -> ops.Factors:
        """Add r `(..., m, n)` to the means, and return `1 / sqrt(v)` in factors.

        The factors are one number per row and one per column; their product is limited by the third member.
        """
        rows, columns = algebra.mean_squares(r)
        _average_(st["row_var"], rows, t**self.decay)
        _average_(st["col_var"], columns, t**self.decay)
        floor, most = self._floor(r), torch.finfo(r.dtype).max
        return ops.Factors(
            self._rows(algebra, st).rsqrt_(), st["col_var"].rsqrt(), min(1 / floor, most) if floor else most
        )

    def excess(self, size: Tensor) -> Tensor:
        """Return the number by which an update of this root mean square is divided; only with a `clip`."""
        return (size / cast(float, self.clip)).clamp_(min=1)

    def turn_(self, algebra: Algebra, st: State, turn: Turn, mean: Tensor | None, t: Clock) -> None:
        # A rotation mixes rows, so v is formed once (r, n) and factored again.
        turned = turn.variances(self._rows(algebra, st) * st["col_var"])
        st["row_var"].copy_(algebra.mean(turned, -1))
        st["col_var"].copy_(algebra.mean(turned, -2))

    def reset_(self, st: State) -> None:
        for key in ("row_var", "col_var"):
            st[key].zero_()

    def _rows(self, algebra: Algebra, st: State) -> Tensor:
        """Return the row factor for which `row factor * col_var` has the row and column means that are kept."""
        rows = st["row_var"]  # all zero where the gradient of the matrix is
        return rows / algebra.mean(rows, -2).clamp_(min=max(self._floor(rows), torch.finfo(rows.dtype).tiny))

    def _floor(self, x: Tensor) -> float:
        """Return eps, or the epsilon of the dtype."""
        return torch.finfo(x.dtype).eps if self.eps is None else self.eps


@dataclass(frozen=True)
class SubsetNorm(Scaling):
    """One second moment per subset of entries: `v <- beta v + (1 - beta) sum r^2` over consecutive entries of a column.

    Args:
        beta: decay.
        eps: added to the denominator, after bias correction.
        size: entries per subset; the last subset of a column may have fewer. None: whole columns of the turned matrix,
            which are the rows of a tall matrix and the columns of a wide one. "sqrt": about the square root of the
            number of entries of the matrix.
        reduce: "sum", as published, which shrinks steps by `sqrt(size)`; "mean" keeps Adam's lr.
    """

    beta: float
    eps: float
    size: int | Literal["sqrt"] | None = None
    reduce: Literal["sum", "mean"] = "sum"
    elementwise: ClassVar[bool] = False
    scratch: ClassVar[int] = 1

    def uncut(self) -> Mapping[int, str]:
        return {} if self.size is None else {-2: "its subsets are runs of a column; take subset_size=None"}

    def spec(self, shape: Shape) -> dict[str, Spec]:
        return {"exp_avg_sq": Spec((-(-shape[0] // self._size(shape)), shape[1]), unsigned=True)}

    def __call__(self, algebra: Algebra, st: State, x: Tensor, r: Tensor, t: Clock) -> Tensor:
        shape = algebra.shape(r)
        denominators, size = self._denominators(algebra, st, r, t), self._size(shape)
        return x / (denominators if self.per_column(shape) else _repeated(denominators, size, shape[0]))

    def per_column(self, shape: Shape) -> bool:
        return self._size(shape) >= shape[-2]

    def gains(self, algebra: Algebra, st: State, r: Tensor, t: Clock) -> Tensor:
        return self._denominators(algebra, st, r, t).reciprocal_()

    def _denominators(self, algebra: Algebra, st: State, r: Tensor, t: Clock) -> Tensor:
        """Add r to the second moments, and return one denominator per subset: `(..., subsets per column, n)`."""
        sums = self._reduced(algebra, r, self._size(algebra.shape(r)))
        v = st["exp_avg_sq"].mul_(self.beta).add_(sums, alpha=1 - self.beta)
        return v.sqrt().mul_(bias_correction(self.beta, t) ** -0.5).add_(self.eps)

    def turn_(self, algebra: Algebra, st: State, turn: Turn, mean: Tensor | None, t: Clock) -> None:
        """Keep the second moments.

        A turn within a subset does not change its norm. For a turn across subsets no exact rule exists.
        """

    def reset_(self, st: State) -> None:
        st["exp_avg_sq"].zero_()

    def _size(self, shape: Shape) -> int:
        """Return the entries per subset of a matrix `(m, n)`, at most m."""
        m, n = shape[-2], shape[-1]
        if self.size is None:
            return m
        return min(m, max(1, round((m * n) ** 0.5)) if self.size == "sqrt" else self.size)

    def _reduced(self, algebra: Algebra, r: Tensor, size: int) -> Tensor:
        """Return the sum or mean of the squares in each subset, `(..., subsets per column, n)`."""
        m = algebra.shape(r)[0]
        if size >= m:
            sums = algebra.energy(r, -2).unsqueeze(-2)
            return sums if self.reduce == "sum" else sums / m
        # Full subsets as one tensor (..., m // size, size, n), then the shorter one at the end of each column.
        whole = m // size * size
        runs = r[..., :whole, :].reshape(*r.shape[:-2], m // size, size, r.shape[-1])
        parts = [algebra.energy(runs, -2)]
        if whole < m:
            parts.append(algebra.energy(r[..., whole:, :], -2).unsqueeze(-2))
        sums = torch.cat(parts, dim=-2)
        if self.reduce == "sum":
            return sums
        counts = torch.full((sums.shape[-2], 1), float(size), dtype=r.dtype, device=r.device)
        counts[-1] = m - (sums.shape[-2] - 1) * size
        return sums / counts


def _repeated(numbers: Tensor, size: int, m: int) -> Tensor:
    """Repeat each number for the rows of its subset: `(..., subsets, n)` -> `(..., m, n)`."""
    return numbers.repeat_interleave(size, dim=-2)[..., :m, :]


def _average_(average: Tensor, x: Tensor, weight: Clock) -> Tensor:
    """Compute `average <- (1 - weight) average + weight x` in place, for a number or one weight per matrix.

    x may be overwritten.
    """
    return average.add_(x.sub_(average).mul_(weight)) if isinstance(weight, Tensor) else average.lerp_(x, weight)
