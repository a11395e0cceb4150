"""Define a method as a choice of parts, and the protocols that the parts obey. Read this file first.

`G (m, n)` is the gradient of a weight matrix `W (m, n)`. The engine transposes each matrix where needed, so that the
projected side, of length m, always comes first. `P (m, r)` is a basis of the subspace. One step is six lines of maths:

    G = residual.before(G)       (m, n)  error feedback adds what earlier steps lost; any other residual returns G
    P = basis.fit(G)             (m, r)  only when `refresh.due` says so; `refresh.carry_` then brings the moments along
    R = basis.down(G)            (r, n)  the coordinates of G in the subspace, P^T G
    D = scaling(momentum(R))     (r, n)  the direction; for Adam m / sqrt(v)
    S = residual.after(G, R, D)  (m, n)  what the step makes of the complement G - P R
    W = (1 - lr weight_decay) W - lr scale (P D + S)

`P D` stands for the direction in full space, which `basis.add_up_` adds to W. `residual.after` returns the sum
`P D + S` unevaluated, as an `Update`, because forming it would take another (m, n) tensor.

Six of the parts fill the six slots of a method: basis, refresh, momentum, scaling, residual and store. The store
(protocol: `recipe/store.py`) keeps every tensor that outlives the step. A seventh part, the step size, turns lr into
the length of the step. `Recipe` holds the choice, and a method is nothing else. Two switches of `Recipe` change the
fourth line: `scaling_in` says whether the scaling sees R or all of G, `momentum_of` whether it comes after the average
or before. The engine (`engine/update.py`) runs these lines for every method and never asks which part it holds.

All parts obey these rules:

- **Parts are frozen and derived.** A part is a frozen dataclass of numbers. The engine makes it from the options of a
  param group, again whenever an option is edited, and stores it in no state, group or checkpoint. It must not depend on
  lr, which schedulers change at each step. Numbers live in `param_groups`, tensors in `state[p]`.
- **The last two dimensions are the matrix.** Leading dimensions are a batch: a stack of experts `(b, m, n)`, or several
  equal matrices that are updated together. The same code runs on all of them.
- **`st` is the open state**: the tensors that a part asked for in `spec`, by name, in float32 (float64 for float64
  parameters) and zero at first. Parts write to them in place.
- **`t`** counts the steps that the moments have seen, this step included. It is a float, or a tensor that broadcasts
  with R: `(b, 1, 1)` where the matrices of a batch restarted at different times, `(r, 1)` where single coordinates did.
  Bias correction must use `t` and not a step count of its own.
- **Parts write to the state and to W only.** No other argument may be written to: G may be the memory of `p.grad`.
- **Every rule is odd**: the gradient -G gives the negative of the update. The engine ascends (`maximize`) by changing
  the sign of the step.
- **`algebra` computes what a part needs of a gradient** (`recipe/algebra.py`). A part never reduces over a whole
  gradient by itself, because the gradient may be a shard. A part asks `algebra.shape` for lengths, and the algebra of
  `basis.inside` for reductions over tensors of the shape of R.
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

State = MutableMapping[str, Tensor]  # the open tensors of one matrix or one batch, by name
Clock = float | Tensor  # `t` above, or another number that may live on the device


class Draw(Protocol):
    """Draw standard normal numbers, the same on every device and rank. Each purpose and refresh has its own stream.

    Args:
        shape: of the whole random tensor. Where its first length is a side from `algebra.shape`, a sharded process
            gets its local rows only.
        purpose: name of the stream. Parts that need several independent tensors at one refresh name each of them.
        some: which of these rows to draw, without a step; None draws all of them.
    """

    def __call__(self, shape: tuple[int, ...], purpose: str = "sketch", some: slice | None = None) -> Tensor: ...


class Time(NamedTuple):
    """The time at which a basis is fitted."""

    step: int  # the basis is fitted before this step: 0, 1, ...
    seen: float  # steps that the moments have seen


class Basis(abc.ABC):
    """The slot that answers: which subspace?

    A basis says what it stores (`spec`), how it is fitted to a gradient (`fit`), and how matrices enter and leave the
    subspace (`down`, `add_up_`). For example, `parts.SVD` stores P, fits it by a factorization of G, and projects with
    `P^T G`; `parts.Rows` stores r indices, and projects by reading those rows.
    """

    elementwise: ClassVar[bool] = False  # True: coordinate i depends on entry i alone, so slices can be updated alone
    indexed: ClassVar[bool] = False  # True: selects r of a fixed set of vectors, so each coordinate has its own age
    orthonormal: bool = True  # True: |R|^2 / |G|^2 is the share of the energy of G that the subspace captures
    derives: bool = False  # True: `derive` returns tensors
    stacks: ClassVar[bool] = False  # True: `fit` also takes a stack (b, m, n), and does not read the time
    seeded: bool = False  # True: nothing is stored, because the random stream alone determines the subspace

    def uncut(self) -> Mapping[int, str]:
        """Return the sides of G that must not be sharded, each with the reason.

        Returns:
            Keys are -2 (the projected side) and -1. The reason completes the error message for a sharded parameter.
        """
        return {}

    @abc.abstractmethod
    def spec(self, shape: Shape, rank: int) -> dict[str, Spec]:
        """Return the persistent tensors of one matrix of `shape` `(m, n)`, by state key."""

    @abc.abstractmethod
    def coordinates(self, shape: Shape, rank: int) -> Shape:
        """Return the shape of R for one matrix of `shape` `(m, n)`: usually `(r, n)`."""

    @abc.abstractmethod
    def fit(self, algebra: Algebra, g: Tensor, old: State | None, rank: int, draw: Draw, at: Time) -> dict[str, Tensor]:
        """Fit the subspace to one gradient.

        Args:
            algebra: of g.
            g: `(m, n)`, finite and not zero, because the engine never fits a basis to a useless gradient. A basis that
                `stacks` may also get `(b, m, n)`.
            old: the whole open state of this matrix, for bases that continue from the previous one or read the moments;
                None the first time.
            rank: r.
            draw: random numbers of this matrix and this refresh.
            at: when the basis is fitted.

        Returns:
            The tensors of `spec`, new ones: the engine still needs the old ones to bring the moments along.
        """

    def inside(self, algebra: Algebra) -> Algebra:
        """Return the algebra of R, and of every tensor of its shape, from the algebra of G.

        R `(r, n)` has lost the side that is projected, so a shard of G along that side gives the whole R.
        """
        return algebra.projected()

    def derive(self, algebra: Algebra, g: Tensor, kept: State, rank: int, draw: Draw) -> dict[str, Tensor]:
        """Compute the tensors that a step needs but the state does not keep, to save memory.

        Args:
            algebra: of g.
            g: `(m, n)`; only its shape, dtype and device may matter, because there may be no gradient yet.
            kept: the stored tensors of `spec`.
            rank: r.
            draw: the random numbers of the last refresh, so that the same basis is drawn again at each step.

        Returns:
            Tensors by name, which the engine adds to the open state `st`. They follow from `kept` or from `draw`.
        """
        return {}

    @abc.abstractmethod
    def turn(self, algebra: Algebra, old: State, new: State) -> Turn:
        """Return the change of coordinates from the old basis to the new one.

        Args:
            algebra: of G.
            old, new: the tensors of `spec` and of `derive`, before and after the refresh.
        """

    @abc.abstractmethod
    def down(self, algebra: Algebra, g: Tensor, st: State) -> Tensor:
        """Return the coordinates R `(..., r, n)` of g `(..., m, n)` in the subspace.

        R is in float32 even where g is in 16 bits. The engine passes a gradient in 16 bits only between the refreshes
        of `thin` recipes.
        """

    @abc.abstractmethod
    def add_up_(
        self, w: Tensor, d: Tensor, st: State, alpha: float, beta: float, columns: Columns | None = None
    ) -> None:
        """Compute `W <- beta W + alpha P D` in one pass over w, without a second (m, n) tensor.

        Args:
            w: `(..., m, n)`, written in place, and not read where beta is 0.
            d: `(..., r, n)`, in coordinates of the subspace.
            st: open state.
            alpha, beta: as in BLAS.
            columns: which columns w holds; d still has all n of them. The engine updates a W in 16 bits in such blocks.
                None: w has all columns.
        """

    # The remaining methods count elements, so that `estimate_memory` is exact before a tensor exists.

    def step_workspace(self, shape: Shape, rank: int) -> int:
        """Return the number of elements that `down` and `add_up_` hold for one matrix, besides R and W."""
        return 0

    def add_workspace(self, shape: Shape, rank: int) -> int:
        """Return the further elements that `add_up_` holds where it adds to all of W in place.

        A W in 16 bits is not written in place as a whole, so it does not pay this.
        """
        return 0

    def derived(self, shape: Shape, rank: int) -> int:
        """Return the number of elements that `derive` returns for one matrix."""
        return 0

    def derive_workspace(self, shape: Shape, rank: int) -> int:
        """Return the largest number of elements that `derive` holds at once for one matrix."""
        return 0

    def fit_workspace(self, m: int, n: int, rank: int) -> int:
        """Return the largest number of elements that `fit` holds at once for one matrix, besides g."""
        return 0

    def shared(self, shape: Shape) -> dict[str, int]:
        """Return the sizes, in elements, of the tensors that all matrices of one width share, by name."""
        return {}

    def sharing(self, shape: Shape, like: Tensor) -> dict[str, Tensor]:
        """Return the tensors of `shared` for gradients of the dtype and device of `like`; create them if needed."""
        return {}


class Refresh(abc.ABC):
    """The slot that answers: when is the basis refitted, and what becomes of the moments?

    For example, `parts.Every` refits every k steps and keeps, rotates or resets the moments; `parts.Lazy` waits longer
    once subspaces stop moving.
    """

    @property
    @abc.abstractmethod
    def restarts(self) -> bool:
        """Whether each refresh resets the moments, and with them their clock `t`."""

    @property
    @abc.abstractmethod
    def turns(self) -> bool:
        """Whether each refresh brings the moments into the new basis, so that a single coordinate may restart."""

    entrywise: ClassVar[bool] = False  # True: single entries restart, so each entry has an age

    def counters(self) -> dict[str, Tensor]:
        """Return the initial counters of one matrix, as CPU tensors, for schedules that depend on earlier refreshes."""
        return {}

    @abc.abstractmethod
    def due(self, step: int, last: int, place: int, counters: Mapping[str, Tensor]) -> bool:
        """Whether a refresh is due before this step.

        Args:
            step: number of the step: 0, 1, ...
            last: step of the last refresh, -1 if there was none.
            place: number of the matrix among the projected matrices of the optimizer. Schedules use it to spread the
                refreshes of different matrices over the steps.
            counters: the tensors of `counters`, as the last refreshes left them.
        """

    @abc.abstractmethod
    def carry_(self, algebra: Algebra, recipe: Recipe, st: State, turn: Turn, t: Clock) -> None:
        """Bring the moments of one matrix from the old basis to the new one, in place, or reset them.

        Args:
            algebra: of R.
            recipe: whose momentum and scaling know how their own tensors turn.
            st: open state.
            turn: the change of coordinates.
            t: steps that the moments have seen.
        """

    def note_(  # noqa: B027
        self, counters: Mapping[str, Tensor], turn: Turn
    ) -> None:
        """Write the outcome of a refresh into the counters. The engine calls this after each refresh but the first."""


class Momentum(abc.ABC):
    """The slot of the first moment: the average that gives the numerator of the direction."""

    elementwise: ClassVar[bool] = True

    @abc.abstractmethod
    def spec(self, shape: Shape) -> dict[str, Spec]:
        """Return the persistent tensors for an average of tensors of `shape`, usually `(r, n)`."""

    @abc.abstractmethod
    def __call__(self, st: State, x: Tensor, t: Clock) -> tuple[Tensor, Clock]:
        """Add x `(..., r, n)` to the average.

        Returns:
            (numerator, gain). The average is their product. The gain stays a separate number, so that bias correction
            costs no pass over the numerator. The numerator may be a tensor of the state: do not write to it.
        """

    @abc.abstractmethod
    def mean(self, st: State, t: Clock) -> Tensor | None:
        """Return the bias-corrected mean of the averaged tensors, or None if this part does not know it."""

    @abc.abstractmethod
    def turn_(self, st: State, turn: Turn) -> None:
        """Bring the average into the new basis."""

    @abc.abstractmethod
    def reset_(self, st: State) -> None:
        """Set the average to zero."""


class Scaling(abc.ABC):
    """The slot of the second moment: the denominator of the direction."""

    elementwise: ClassVar[bool] = True
    scratch: ClassVar[int] = 0  # tensors of the size of x that a call holds besides x, for `estimate_memory`

    def uncut(self) -> Mapping[int, str]:
        """Return the sides that must not be sharded, as `Basis.uncut` does, of the tensor that is scaled."""
        return {}

    def workspace(self, count: int) -> int:
        """Return the number of elements that a call holds besides x and r, which have `count` elements each."""
        return count * self.scratch

    @abc.abstractmethod
    def spec(self, shape: Shape) -> dict[str, Spec]:
        """Return the persistent tensors for second moments of tensors of `shape`: `(r, n)`, or `(m, n)` in full space.

        `(n,)` for a vector.
        """

    @abc.abstractmethod
    def __call__(self, algebra: Algebra, st: State, x: Tensor, r: Tensor, t: Clock) -> Tensor:
        """Add r to the second moment, and divide x by its square root.

        Args:
            algebra: of r.
            st: open state.
            x: numerator, `(..., r, n)` or in full space `(..., m, n)`.
            r: the tensor whose squares are averaged, of the shape of x. The first moment makes x differ from r.
            t: steps that the second moment has seen.

        Returns:
            `x / sqrt(second moment)`, a new tensor, or x itself where nothing is divided.
        """

    def per_column(self, shape: Shape) -> bool:
        """Whether a matrix of `shape` is divided by one number per column.

        The engine then asks for `gains` instead of a call, and no second tensor of the shape of x is made.
        """
        return False

    def gains(self, algebra: Algebra, st: State, r: Tensor, t: Clock) -> Tensor:
        """Add r to the second moment and return the factors `(..., 1, n)` by which a call would multiply x.

        Only scalings that can answer `per_column` with True have this method.
        """
        raise NotImplementedError(type(self).__name__)

    @abc.abstractmethod
    def turn_(self, algebra: Algebra, st: State, turn: Turn, mean: Tensor | None, t: Clock) -> None:
        """Bring the second moment into the new basis.

        A rotation must not mix second moments linearly: only the variance around the mean may be mixed, with squared
        weights (`Turn.variances`).

        Args:
            algebra: of r.
            st: open state.
            turn: the change of coordinates.
            mean: the bias-corrected first moment in the old basis, or None where there is none.
            t: steps that the second moment has seen.
        """

    @abc.abstractmethod
    def reset_(self, st: State) -> None:
        """Set the second moment to zero."""


class Update(NamedTuple):
    """The matrix `gain P d + rest_gain rest + entries` that a step subtracts from W, before lr and scale.

    The terms stay apart, so that the engine adds them to W one after the other and no (m, n) tensor holds the sum.

    Args:
        d: direction in the subspace, `(..., r, n)`, or None.
        gain: a number, or a tensor that broadcasts with d.
        rest: `(..., m, n)`, or None.
        rest_gain: a number, or `(..., 1, n)` for one number per column.
        entries: (flat row-major positions in (m, n), values to add there), both `(..., k)`, or None.
    """

    d: Tensor | None
    gain: Clock = 1.0
    rest: Tensor | None = None
    rest_gain: Clock = 1.0
    entries: tuple[Tensor, Tensor] | None = None

    def times(self, length: Clock) -> Update:
        """Return the update multiplied by `length`, a number or one number per matrix or column.

        No (m, n) tensor is made. A plain number stays outside of d, because the kernels multiply by it in passing.
        """
        d, gain = self.d, self.gain * length
        if d is not None and isinstance(gain, Tensor):
            d, gain = d * gain, 1.0
        entries = None if self.entries is None else (self.entries[0], self.entries[1] * length)
        return Update(d, gain, self.rest, self.rest_gain * length, entries)

    def whole(self, recipe: Recipe, st: State, like: Tensor, over_rest: bool = False) -> Tensor:
        """Return the update as one tensor, for rules that need its norm or a second moment in full space.

        Args:
            recipe: whose basis brings d back to full space.
            st: open state.
            like: any tensor of the shape `(..., m, n)` and dtype of the result; not written to.
            over_rest: write the result over `rest`, which is allowed only where `rest` is a temporary of this step.
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
    """The slot that answers: what does the step make of the complement `G - P P^T G`, which the subspace drops?

    For example, `parts.Drop` ignores the complement (GaLore), `parts.Raw` steps along it as SGD would, and
    `parts.ErrorFeedback` keeps it and adds it to the next gradient.
    """

    feeds_back: ClassVar[bool] = False  # True: `before` changes the gradient
    thin: ClassVar[bool] = False  # True: the complement is not used, so R is all that a step needs to know of G
    lifts: ClassVar[bool] = True  # False: the update of `after` has no d, so nothing comes back from the subspace

    def uncut(self) -> Mapping[int, str]:
        """Return the sides of G that must not be sharded, as `Basis.uncut` does."""
        return {}

    def spec(self, shape: Shape) -> dict[str, Spec]:
        """Return the persistent tensors of one matrix of `shape` `(m, n)`."""
        return {}

    def workspace(self, shape: Shape, coordinates: int) -> int:
        """Return the number of elements that `after` holds for one matrix, besides G, R and D.

        Args:
            shape: `(m, n)`.
            coordinates: number of elements of R.
        """
        return 0

    def before(self, g: Tensor, st: State) -> Tensor:
        """Return the gradient `(..., m, n)` that the step uses. Error feedback adds what earlier steps lost."""
        return g

    def turning_(  # noqa: B027
        self, recipe: Recipe, st: State, basis: State, sign: float
    ) -> None:
        """Account for what the moments lose in a change of basis. The engine calls this twice per matrix.

        Args:
            recipe: of this step.
            st: open state.
            basis: before the moments turn, the old basis; afterwards, the new one.
            sign: 1 before, -1 afterwards, so that the sum of both calls is the loss.
        """

    def begin_(  # noqa: B027
        self, algebra: Algebra, recipe: Recipe, st: State, basis: State, g: Tensor
    ) -> None:
        """Initialize the state of one matrix, when its first basis has been fitted to g `(m, n)`."""

    @abc.abstractmethod
    def after(
        self, algebra: Algebra, recipe: Recipe, st: State, g: Tensor, r: Tensor, d: Tensor, gain: Clock
    ) -> Update:
        """Compose the update of the step.

        Args:
            algebra: of g.
            recipe: of this step.
            st: open state.
            g: gradient from `before`, `(..., m, n)`; not there (None) for `thin` residuals that were handed R alone.
            r: coordinates of g, `(..., r, n)`.
            d: direction without its gain, `(..., r, n)`. It may be a tensor of the state: do not write to it.
            gain: the direction is `gain d`.
        """


class StepSize(Protocol):
    """The part that turns lr into the length of a step."""

    @property
    def reads_weights(self) -> bool:
        """Whether the values of w matter. If not, the engine may pass a tensor that has only its shape and device."""

    def __call__(self, algebra: Algebra, lr: Clock, w: Tensor, step: Clock) -> Clock:
        """Return the length of the step: a number, or one number per matrix.

        Args:
            algebra: of w.
            lr: of the group.
            w: weights, `(..., m, n)`.
            step: number of the step: 1, 2, ...
        """


@dataclass(frozen=True)
class Recipe:
    """The parts of one method for one param group. The text at the top of this file has the maths and the rules."""

    basis: Basis
    refresh: Refresh
    momentum: Momentum
    scaling: Scaling
    residual: Residual
    store: Store
    step_size: StepSize
    scale: float = 1.0
    momentum_of: Literal["gradient", "update"] = "gradient"
    """Adam averages gradients and then scales the average; Adafactor scales the gradient and averages the result."""
    scaling_in: Literal["subspace", "full"] = "subspace"
    """Whether second moments belong to R or to all of G. In full space they survive every refresh."""
    basis_store: Store | None = None
    """The store of bases; None: `store`, as for the moments."""

    def plain(self, identity: Basis, never: Refresh, residual: Residual) -> Recipe:
        """Return the same rule in full space, for parameters that are not projected."""
        return replace(self, basis=identity, refresh=never, residual=residual, scale=1.0, scaling_in="subspace")

    @property
    def thin(self) -> bool:
        """Whether a step without a refresh reads R only, so that R can be accumulated instead of gradients."""
        return self.residual.thin and self.scaling_in == "subspace" and not self.basis.elementwise

    @property
    def scales_first(self) -> bool:
        """Whether G is scaled before it is projected. The residual then gets a temporary, which it may write to."""
        return self.scaling_in == "full" and self.momentum_of == "update"

    @property
    def elementwise(self) -> bool:
        """Whether each entry of W is updated independently, so that the engine may update it in slices."""
        return self.basis.elementwise and self.momentum.elementwise and self.scaling.elementwise

    @property
    def aged(self) -> bool:
        """Whether single entries, or the vectors of a selection, restart on their own, so that each has an age."""
        return self.refresh.entrywise or (self.basis.indexed and self.refresh.turns)

    def uncut(self) -> dict[int, str]:
        """Return the sides of G, -2 or -1, that must not be sharded over processes, each with the reason."""
        # In the subspace the projected side is gone, so a scaling that needs it whole (-2) has no objection.
        whole = self.scaling_in == "full" or self.basis.elementwise
        scaling = {side: why for side, why in self.scaling.uncut().items() if whole or side == -1}
        return {**scaling, **self.residual.uncut(), **self.basis.uncut()}

    def spec(self, shape: Shape, rank: int, small: bool = False) -> dict[str, Spec]:
        """Return every persistent tensor of one matrix: basis, ages, first and second moment, residual.

        Args:
            shape: `(m, n)`, or `(n,)` for a vector.
            rank: r.
            small: whether this is a vector or a small matrix, which stores keep in full precision.

        Returns:
            Specs by state key, each with its store.
        """
        coordinates = self.basis.coordinates(shape, rank)
        basis = {key: self._kept(spec, self.basis_store, small) for key, spec in self.basis.spec(shape, rank).items()}
        if self.aged:
            basis[AGE] = Spec(coordinates if self.refresh.entrywise else coordinates[:1], store=Exact(torch.int32))
        scaled = shape if self.scaling_in == "full" else coordinates
        rest = {**self.momentum.spec(coordinates), **self.scaling.spec(scaled), **self.residual.spec(shape)}
        return {**basis, **{key: self._kept(spec, None, small) for key, spec in rest.items()}}

    def _kept(self, spec: Spec, store: Store | None, small: bool) -> Spec:
        """Return the spec with the store that keeps it: its own, else `store`, else the recipe's."""
        store = spec.store or store or self.store
        return spec._replace(store=(store.small() if small else store).of(spec))


AGE = "age"  # state key: the steps that each coordinate of a selection, or each entry, has seen
