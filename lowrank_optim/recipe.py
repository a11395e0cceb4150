"""What a method is: six choices, and the protocols that the choices obey. Read this file first.

For a gradient matrix `G (m, n)`, turned once so that the projected side comes first, one step is

    basis.fit(G) -> P            only when refresh says it is due; refresh also says what becomes of the moments
    R = basis.down(G)            (r, n)  coordinates of G in the subspace, P^T G
    D = scaling(momentum(R))     (r, n)  direction, Adam's m / sqrt(v) for example
    W = (1 - lr wd) W - lr scale (basis.up(D) + residual)

with every tensor that lives longer than the step kept by `store`. A method is the choice of these parts and nothing
else; the engine (`optimizer.py`) runs the lines above and never asks which part it holds.

Rules that all parts obey:

- **Frozen and derived.** A part is a frozen dataclass of numbers, made from a param group at each step and stored
  nowhere. Numbers live in `param_groups`, tensors in `state[p]`.
- **The last two dimensions are the matrix.** Leading dimensions are a batch: a stack of experts, or several equal
  matrices updated together. The same code runs on all of them.
- **`st` is the open state**: the tensors that a part asked for in `spec`, by name, in float32 (float64 for float64
  parameters), zero at first. Parts write to them in place.
- **`t`** counts the steps that the moments have seen, this one included: a float, or a `(b, 1, 1)` tensor where the
  matrices of a batch restarted at different times. Bias correction must use it and not a step count of its own.
- **Every rule is odd**: -G gives -U. The engine ascends (`maximize`) by turning the sign of the step.
- **`algebra`** answers what a part needs of a gradient (`distributed/algebra.py`). Parts never reduce over a whole
  gradient by themselves, so they never see that it may be sharded.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .distributed.algebra import Algebra
from .ops.philox import Stream

State = MutableMapping[str, Tensor]
Shape = tuple[int, ...]  # (m, n), or (n,) for a vector
Clock = float | Tensor
Draw = Callable[[tuple[int, ...]], Tensor]  # standard normal numbers of a shape, the same on every device and rank


class Spec(NamedTuple):
    """A persistent tensor that a part asks for.

    Args:
        shape: for one matrix (or vector).
        steady: written at refreshes only. A store then rounds to nearest, not stochastically.
    """

    shape: tuple[int, ...]
    steady: bool = False


@dataclass(frozen=True)
class Turn:
    """The change of coordinates at a refresh: `x -> left x right^T` with `left = P_new^T P_old`."""

    left: Tensor
    right: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Coordinates (first moments) in the new basis."""
        y = self.left @ x
        return y if self.right is None else y @ self.right.mT

    def variances(self, x: Tensor) -> Tensor:
        """Variances of independent coordinates in the new basis: the entries of the matrices enter squared."""
        y = self.left.square() @ x
        return y if self.right is None else y @ self.right.square().mT


class Basis(abc.ABC):
    """Which subspace?"""

    elementwise: ClassVar[bool] = False  # True: coordinate i depends on entry i alone, so slices can be updated alone

    @abc.abstractmethod
    def spec(self, shape: Shape, rank: int) -> dict[str, Spec]:
        """Persistent tensors of one matrix."""

    @abc.abstractmethod
    def coordinates(self, shape: Shape, rank: int) -> Shape:
        """Shape of R."""

    @abc.abstractmethod
    def fit(self, algebra: Algebra, g: Tensor, old: State | None, rank: int, draw: Draw) -> dict[str, Tensor]:
        """The tensors of `spec`, fitted to one finite, non-zero `g (m, n)`. `old` is None the first time."""

    @abc.abstractmethod
    def turn(self, algebra: Algebra, old: State, new: State) -> Turn:
        """From coordinates in the old basis to coordinates in the new one."""

    @abc.abstractmethod
    def down(self, algebra: Algebra, g: Tensor, st: State) -> Tensor:
        """R, as memory of its own: the caller overwrites it, and must never write to a gradient."""

    @abc.abstractmethod
    def add_up_(self, w: Tensor, d: Tensor, st: State, alpha: float, beta: float) -> None:
        """`W <- beta W + alpha up(D)` in one pass over `w (m, n)`, without a second (m, n) tensor."""

    def step_workspace(self, shape: Shape, rank: int) -> int:
        """Elements that `down` and `add_up_` hold beyond R and W; for `estimate_memory`."""
        return 0

    def fit_workspace(self, m: int, n: int, rank: int) -> int:
        """Elements that `fit` holds at once for one matrix, beyond g; for `estimate_memory`."""
        return 0


class Refresh(Protocol):
    """When is the basis refitted, and what becomes of the moments?"""

    @property
    def restarts(self) -> bool:
        """True: moments begin anew at each refresh, so their clock does too."""

    def due(self, step: int, last: int, place: int) -> bool:
        """Is a refresh due before step `step` (0, 1, ...), the last having been at `last` (-1: never)?

        `place` numbers the projected matrices of an optimizer, for schedules that spread the work.
        """

    def carry_(self, algebra: Algebra, recipe: Recipe, st: State, turn: Turn, t: Clock) -> None:
        """Brings the moments, which have seen t steps, from the old coordinates to the new ones."""


class Momentum(abc.ABC):
    """First moment: the average that gives the numerator."""

    elementwise: ClassVar[bool] = True

    @abc.abstractmethod
    def spec(self, shape: Shape) -> dict[str, Spec]: ...

    @abc.abstractmethod
    def __call__(self, st: State, x: Tensor, t: Clock) -> tuple[Tensor, Clock]:
        """(numerator, gain): the average is their product. The numerator may be a state tensor: do not write to it."""

    @abc.abstractmethod
    def mean(self, st: State, t: Clock) -> Tensor | None:
        """The bias-corrected mean of what was averaged, if this part knows it."""

    @abc.abstractmethod
    def turn_(self, st: State, turn: Turn) -> None: ...

    @abc.abstractmethod
    def reset_(self, st: State) -> None: ...


class Scaling(abc.ABC):
    """Second moment: what the numerator is divided by."""

    elementwise: ClassVar[bool] = True
    scratch: ClassVar[int] = 0  # tensors of the size of R that a call holds beside it, for `estimate_memory`

    @abc.abstractmethod
    def spec(self, shape: Shape) -> dict[str, Spec]: ...

    @abc.abstractmethod
    def __call__(self, algebra: Algebra, st: State, x: Tensor, r: Tensor, t: Clock) -> Tensor:
        """`x / sqrt(second moment of r)`. May overwrite r, but not x."""

    @abc.abstractmethod
    def turn_(self, algebra: Algebra, st: State, turn: Turn, mean: Tensor | None, t: Clock) -> None:
        """Second moments must not be mixed linearly by a rotation: only the variance around `mean` may."""

    @abc.abstractmethod
    def reset_(self, st: State) -> None: ...


class Residual(Protocol):
    """What of `G - P P^T G`, the part of the gradient outside the subspace?"""

    def before(self, g: Tensor, st: State) -> Tensor:
        """The gradient that the step uses; error feedback adds here what was lost before."""

    def after(self, algebra: Algebra, g: Tensor, r: Tensor, d: Tensor, basis: Basis, st: State) -> Tensor | None:
        """What is added to `up(D)`, `(m, n)`, or None."""


class Store(Protocol):
    """How are tensors kept between steps?"""

    def dtype(self, working: torch.dtype) -> torch.dtype:
        """What a state tensor is kept in, for parameters whose arithmetic runs in `working`."""

    def close_(self, kept: Tensor, x: Tensor, key: int, stream: Stream, start: int) -> None:
        """Writes the working tensor x back; rounding noise is elements `start`, ... of the stream (`ops/philox.py`)."""


class StepSize(Protocol):
    """How does lr become the length of the step?"""

    def __call__(self, algebra: Algebra, lr: float, w: Tensor, step: int) -> Clock:
        """The length at step `step` (1, 2, ...), one number or one per matrix of the batch `w`."""


@dataclass(frozen=True)
class Recipe:
    """The choices of one method for one param group. See the module text for the maths and the rules."""

    basis: Basis
    refresh: Refresh
    momentum: Momentum
    scaling: Scaling
    residual: Residual
    store: Store
    step_size: StepSize
    scale: float = 1.0
    momentum_of: Literal["gradient", "update"] = "gradient"
    """Adam averages gradients and scales the average; Adafactor scales the gradient and averages the result."""

    def plain(self, identity: Basis) -> Recipe:
        """The same rule in full space, for parameters that are not projected."""
        return replace(self, basis=identity, scale=1.0)

    @property
    def elementwise(self) -> bool:
        return self.basis.elementwise and self.momentum.elementwise and self.scaling.elementwise

    def spec(self, shape: Shape, rank: int) -> dict[str, Spec]:
        """Every persistent tensor of one matrix, in the order: basis, first moment, second moment."""
        coordinates = self.basis.coordinates(shape, rank)
        return {
            **self.basis.spec(shape, rank),
            **self.momentum.spec(coordinates),
            **self.scaling.spec(coordinates),
        }

    def direction(self, algebra: Algebra, st: State, r: Tensor, t: Clock) -> tuple[Tensor, Clock]:
        """(D, gain), the direction being their product. Overwrites r."""
        if self.momentum_of == "gradient":
            numerator, gain = self.momentum(st, r, t)
            return self.scaling(algebra, st, numerator, r, t), gain
        return self.momentum(st, self.scaling(algebra, st, r, r, t), t)
