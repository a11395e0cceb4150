"""What a method is: six choices, and the protocols that the choices obey. Read this file first.

For a gradient matrix `G (m, n)`, turned once so that the projected side comes first, one step is

    G = residual.before(G)       (m, n)  error feedback adds here what was lost before
    basis.fit(G) -> P            only when refresh says it is due; refresh also says what becomes of the moments
    R = basis.down(G)            (r, n)  coordinates of G in the subspace, P^T G
    D = scaling(momentum(R))     (r, n)  direction, Adam's m / sqrt(v) for example
    S = residual.after(G, R, D)  (m, n)  what of the rest of G is used
    W = (1 - lr wd) W - lr scale (basis.up(D) + S)

with every tensor that lives longer than the step kept by `store` (its protocol: `kept.py`). A method is the choice of
these parts and nothing else; the engine (`update.py`) runs the lines above and never asks which part it holds. Two
switches of `Recipe` say whether scaling sees R or all of G (`scaling_in`), and whether it comes after the average or
before (`momentum_of`).

Rules that all parts obey:

- **Frozen and derived.** A part is a frozen dataclass of numbers, made from a param group at each step and stored
  nowhere. Numbers live in `param_groups`, tensors in `state[p]`.
- **The last two dimensions are the matrix.** Leading dimensions are a batch: a stack of experts, or several equal
  matrices updated together. The same code runs on all of them.
- **`st` is the open state**: the tensors that a part asked for in `spec`, by name, in float32 (float64 for float64
  parameters), zero at first. Parts write to them in place.
- **`t`** counts the steps that the moments have seen, this one included: a float, or a tensor that broadcasts with R:
  `(b, 1, 1)` where the matrices of a batch restarted at different times, `(r, 1)` where single coordinates did. Bias
  correction must use it and not a step count of its own.
- **Parts write to state and to W**, and to nothing else that they are given: G may be the memory of `p.grad`.
- **Every rule is odd**: -G gives -U. The engine ascends (`maximize`) by turning the sign of the step.
- **`algebra`** answers what a part needs of a gradient (`distributed/algebra.py`). Parts never reduce over a whole
  gradient by themselves, so they never see that it may be sharded: lengths come from `algebra.shape`, and what has the
  shape of R goes to the algebra of `basis.inside`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..ops.blocks import Columns
from .algebra import Algebra
from .store import Exact, Shape, Spec, Store
from .turn import Turn

State = MutableMapping[str, Tensor]
Clock = float | Tensor


class Draw(Protocol):
    """Standard normal numbers of a shape, the same on every device and rank; one stream per purpose and refresh.

    Of a shape that begins with a side from `algebra.shape`, those rows that this process has. some: only these of them.
    """

    def __call__(self, shape: tuple[int, ...], purpose: str = "sketch", some: slice | None = None) -> Tensor: ...


class Time(NamedTuple):
    """When a basis is fitted: before step number `step` (0, 1, ...), with moments that have seen `seen` steps."""

    step: int
    seen: float


class Basis(abc.ABC):
    """Which subspace?"""

    elementwise: ClassVar[bool] = False  # True: coordinate i depends on entry i alone, so slices can be updated alone
    indexed: ClassVar[bool] = False  # a selection of fixed vectors: each coordinate has an age of its own
    orthonormal: bool = True  # R then has the part of the energy of G that the subspace captures
    derives: bool = False  # `derive` gives something
    stacks: ClassVar[bool] = False  # `fit` takes stacks of matrices, and does not ask for the time
    seeded: bool = False  # which subspace follows from the random stream alone, and is kept nowhere

    def uncut(self) -> Mapping[int, str]:
        """Sides of G, -2 or -1, that must not be cut over processes, and why."""
        return {}

    @abc.abstractmethod
    def spec(self, shape: Shape, rank: int) -> dict[str, Spec]:
        """Persistent tensors of one matrix."""

    @abc.abstractmethod
    def coordinates(self, shape: Shape, rank: int) -> Shape:
        """Shape of R."""

    @abc.abstractmethod
    def fit(self, algebra: Algebra, g: Tensor, old: State | None, rank: int, draw: Draw, at: Time) -> dict[str, Tensor]:
        """The tensors of `spec`, fitted to one finite, non-zero `g (m, n)`.

        `old` is the whole open state of this matrix, None the first time.
        """

    def inside(self, algebra: Algebra) -> Algebra:
        """The algebra of R and of all that has its shape, from that of G."""
        return algebra.projected()

    def derive(self, algebra: Algebra, g: Tensor, kept: State, rank: int, draw: Draw) -> dict[str, Tensor]:
        """What a step needs for `g (m, n)` and nobody keeps: it follows from what is kept or from the random stream."""
        return {}

    @abc.abstractmethod
    def turn(self, algebra: Algebra, old: State, new: State) -> Turn:
        """From coordinates in the old basis to coordinates in the new one."""

    @abc.abstractmethod
    def down(self, algebra: Algebra, g: Tensor, st: State) -> Tensor:
        """R, in float32 also where G is in 16 bits, which it is only between refreshes of `thin` recipes."""

    @abc.abstractmethod
    def add_up_(
        self, w: Tensor, d: Tensor, st: State, alpha: float, beta: float, columns: Columns | None = None
    ) -> None:
        """`W <- beta W + alpha up(D)` in one pass over `w (m, n)`, without a second (m, n) tensor.

        Where beta is 0, w is not read. `columns`: w has only these, and d is whole.
        """

    def step_workspace(self, shape: Shape, rank: int) -> int:
        """Elements that `down` and `add_up_` hold beyond R and W; for `estimate_memory`, like the next ones."""
        return 0

    def add_workspace(self, shape: Shape, rank: int) -> int:
        """And `add_up_` where it adds to all of W in place, which is not in 16 bits."""
        return 0

    def derived(self, shape: Shape, rank: int) -> int:
        """Elements that `derive` gives for one matrix."""
        return 0

    def derive_workspace(self, shape: Shape, rank: int) -> int:
        """Elements that `derive` holds at once for one matrix."""
        return 0

    def fit_workspace(self, m: int, n: int, rank: int) -> int:
        """Elements that `fit` holds at once for one matrix, beyond g."""
        return 0

    def shared(self, shape: Shape) -> dict[str, int]:
        """Elements of tensors that all matrices of an equal width share, by name."""
        return {}

    def sharing(self, shape: Shape, like: Tensor) -> dict[str, Tensor]:
        """The tensors of `shared` for gradients `like` this one; made, if there was no step yet."""
        return {}


class Refresh(abc.ABC):
    """When is the basis refitted, and what becomes of the moments?"""

    @property
    @abc.abstractmethod
    def restarts(self) -> bool:
        """True: moments begin anew at each refresh, so their clock does too."""

    @property
    @abc.abstractmethod
    def turns(self) -> bool:
        """True: moments are brought into the new basis, so single coordinates may begin anew."""

    entrywise: ClassVar[bool] = False  # True: single entries begin anew, so each has an age

    def counters(self) -> dict[str, Tensor]:
        """What the schedule remembers of one matrix, as it begins; on the CPU."""
        return {}

    @abc.abstractmethod
    def due(self, step: int, last: int, place: int, counters: Mapping[str, Tensor]) -> bool:
        """Is a refresh due before step `step` (0, 1, ...), the last having been at `last` (-1: never)?

        `place` numbers the projected matrices of an optimizer, for schedules that spread the work.
        """

    @abc.abstractmethod
    def carry_(self, algebra: Algebra, recipe: Recipe, st: State, turn: Turn, t: Clock) -> None:
        """Brings the moments, which have seen t steps, from the old coordinates to the new ones."""

    def note_(  # noqa: B027
        self, counters: Mapping[str, Tensor], turn: Turn
    ) -> None:
        """Called after each refresh but the first, for schedules that learn from it."""


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

    def uncut(self) -> Mapping[int, str]:
        """As in `Basis`, of what is scaled."""
        return {}

    def workspace(self, count: int) -> int:
        """Elements that a call holds beside x and r, of so many elements each; for `estimate_memory`."""
        return count * self.scratch

    @abc.abstractmethod
    def spec(self, shape: Shape) -> dict[str, Spec]: ...

    @abc.abstractmethod
    def __call__(self, algebra: Algebra, st: State, x: Tensor, r: Tensor, t: Clock) -> Tensor:
        """`x / sqrt(second moment of r)`."""

    def per_column(self, shape: Shape) -> bool:
        """Is x divided by one number per column? Then `gains` does for a call, and no tensor like x is made."""
        return False

    def gains(self, algebra: Algebra, st: State, r: Tensor, t: Clock) -> Tensor:
        """What a call would multiply x by, `(..., 1, n)`; only `per_column`."""
        raise NotImplementedError(type(self).__name__)

    @abc.abstractmethod
    def turn_(self, algebra: Algebra, st: State, turn: Turn, mean: Tensor | None, t: Clock) -> None:
        """Second moments must not be mixed linearly by a rotation: only the variance around `mean` may."""

    @abc.abstractmethod
    def reset_(self, st: State) -> None: ...


class Update(NamedTuple):
    """What is subtracted from W, lr and scale aside: `gain up(d) + rest_gain rest`, and single entries.

    Args:
        d: `(r, n)` or None.
        rest: `(m, n)` or None. Its gain may be `(1, n)`, a number per column.
        entries: (flat row-major positions in (m, n), values), both `(k,)`, or None.
    """

    d: Tensor | None
    gain: Clock = 1.0
    rest: Tensor | None = None
    rest_gain: Clock = 1.0
    entries: tuple[Tensor, Tensor] | None = None

    def times(self, length: Clock) -> Update:
        """Multiplied, without an (m, n) tensor: numbers stay outside of d, for kernels that multiply in passing."""
        d, gain = self.d, self.gain * length
        if d is not None and isinstance(gain, Tensor):
            d, gain = d * gain, 1.0
        entries = None if self.entries is None else (self.entries[0], self.entries[1] * length)
        return Update(d, gain, self.rest, self.rest_gain * length, entries)

    def whole(self, recipe: Recipe, st: State, like: Tensor, over_rest: bool = False) -> Tensor:
        """It all as one tensor `like` G (m, n); for rules that need its norm, or a second moment in full space.

        over_rest: written over the rest, which is then the step's own.
        """
        if self.d is None:
            return cast(Tensor, self.rest) * self.rest_gain
        if self.rest is None:
            whole, beta = like.clone(), 0.0
        elif over_rest and not isinstance(self.rest_gain, Tensor):
            whole, beta = self.rest, self.rest_gain
        else:
            whole, beta = self.rest * self.rest_gain, 1.0
        recipe.basis.add_up_(whole, self.d * self.gain, st, alpha=1, beta=beta)
        return whole


class Residual(abc.ABC):
    """What of `G - P P^T G`, the part of the gradient outside the subspace?"""

    feeds_back: ClassVar[bool] = False  # True: `before` changes the gradient
    thin: ClassVar[bool] = False  # True: nothing, so R is all that a step needs to know of G
    lifts: ClassVar[bool] = True  # False: `after` gives no direction, so nothing is brought back from the subspace

    def uncut(self) -> Mapping[int, str]:
        """As in `Basis`."""
        return {}

    def spec(self, shape: Shape) -> dict[str, Spec]:
        return {}

    def workspace(self, shape: Shape, coordinates: int) -> int:
        """Elements that it holds beside G, R and D, R having `coordinates` elements; for `estimate_memory`."""
        return 0

    def before(self, g: Tensor, st: State) -> Tensor:
        """The gradient that the step uses; error feedback adds here what was lost before."""
        return g

    def turning_(  # noqa: B027
        self, recipe: Recipe, st: State, basis: State, sign: float
    ) -> None:
        """Called around the turn of the moments of one matrix: before it with the old basis and 1, after it with the
        new one and -1."""

    def begin_(  # noqa: B027
        self, algebra: Algebra, recipe: Recipe, st: State, basis: State, g: Tensor
    ) -> None:
        """Called for one matrix when its first basis has been fitted to g (m, n)."""

    @abc.abstractmethod
    def after(
        self, algebra: Algebra, recipe: Recipe, st: State, g: Tensor, r: Tensor, d: Tensor, gain: Clock
    ) -> Update:
        """The update, from the gradient, its coordinates r and the direction `gain d`."""


class StepSize(Protocol):
    """How does lr become the length of the step?"""

    @property
    def reads_weights(self) -> bool:
        """False: w is looked at for its shape and device alone."""

    def __call__(self, algebra: Algebra, lr: Clock, w: Tensor, step: Clock) -> Clock:
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
    scaling_in: Literal["subspace", "full"] = "subspace"
    """Whether second moments are of R or of all of G. In full space they outlive every refresh."""
    basis_store: Store | None = None
    """How bases are kept, where not like moments."""

    def plain(self, identity: Basis, never: Refresh, residual: Residual) -> Recipe:
        """The same rule in full space, for parameters that are not projected."""
        return replace(self, basis=identity, refresh=never, residual=residual, scale=1.0, scaling_in="subspace")

    @property
    def thin(self) -> bool:
        """Coordinates R are all that a step without a refresh reads of a gradient, so R can be accumulated instead."""
        return self.residual.thin and self.scaling_in == "subspace" and not self.basis.elementwise

    @property
    def scales_first(self) -> bool:
        """G is scaled before it is projected, so what the residual gets is the step's own."""
        return self.scaling_in == "full" and self.momentum_of == "update"

    @property
    def elementwise(self) -> bool:
        return self.basis.elementwise and self.momentum.elementwise and self.scaling.elementwise

    @property
    def aged(self) -> bool:
        """Entries, or the vectors of a selection, begin anew one by one, so each has an age."""
        return self.refresh.entrywise or (self.basis.indexed and self.refresh.turns)

    def uncut(self) -> dict[int, str]:
        """Sides of G that must not be cut over processes, and why."""
        whole = self.scaling_in == "full" or self.basis.elementwise
        scaling = {side: why for side, why in self.scaling.uncut().items() if whole or side == -1}
        return {**scaling, **self.residual.uncut(), **self.basis.uncut()}

    def spec(self, shape: Shape, rank: int, small: bool = False) -> dict[str, Spec]:
        """Every persistent tensor of one matrix: basis, ages, first and second moment, residual; each with its store.

        `small`: of a vector or a small matrix.
        """
        coordinates = self.basis.coordinates(shape, rank)
        basis = {key: self._kept(spec, self.basis_store, small) for key, spec in self.basis.spec(shape, rank).items()}
        if self.aged:
            basis[AGE] = Spec(coordinates if self.refresh.entrywise else coordinates[:1], store=Exact(torch.int32))
        scaled = shape if self.scaling_in == "full" else coordinates
        rest = {**self.momentum.spec(coordinates), **self.scaling.spec(scaled), **self.residual.spec(shape)}
        return {**basis, **{key: self._kept(spec, None, small) for key, spec in rest.items()}}

    def _kept(self, spec: Spec, store: Store | None, small: bool) -> Spec:
        store = spec.store or store or self.store
        return spec._replace(store=(store.small() if small else store).of(spec))


AGE = "age"  # steps that each coordinate of a selection, or each entry, has seen
