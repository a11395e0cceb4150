"""Fill the slot "which subspace?" with full space, or with exact or iterated singular vectors of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops import add_product_
from ..ops.blocks import BLOCK, Columns
from ..ops.products import scratch
from ..ops.reference.random import BLOCK as COUNTERS
from ..ops.reference.random import DRAWING
from ..recipe.algebra import WHOLE, Algebra, subspace_iteration
from ..recipe.recipe import Basis, Draw, State, Time
from ..recipe.store import Shape, Spec
from ..recipe.turn import Turn


@dataclass(frozen=True)
class Identity(Basis):
    """Full space, where R is G. Parameters that are not projected use it. It is never refreshed and stores nothing."""

    elementwise: ClassVar[bool] = True

    def spec(self, shape: Shape, rank: int) -> dict[str, Spec]:
        return {}

    def coordinates(self, shape: Shape, rank: int) -> Shape:
        return shape

    def fit(self, algebra: Algebra, g: Tensor, old: State | None, rank: int, draw: Draw, at: Time) -> dict[str, Tensor]:
        return {}

    def inside(self, algebra: Algebra) -> Algebra:
        return algebra

    def turn(self, algebra: Algebra, old: State, new: State) -> Turn:
        raise NotImplementedError("the identity basis never turns")

    def down(self, algebra: Algebra, g: Tensor, st: State) -> Tensor:
        return g

    def add_up_(
        self, w: Tensor, d: Tensor, st: State, alpha: float, beta: float, columns: Columns | None = None
    ) -> None:
        d = d if columns is None else columns.of(d)
        if beta == 0:
            torch.mul(d, alpha, out=w)
            return
        if beta != 1:
            w.mul_(beta)
        w.add_(d, alpha=alpha)


class OneSided(Basis):
    """The bases with `R = P^T G` for one stored P (m, r). A subclass says how P is fitted."""

    def spec(self, shape: Shape, rank: int) -> dict[str, Spec]:
        return {"basis": Spec((shape[0], rank), steady=True)}

    def coordinates(self, shape: Shape, rank: int) -> Shape:
        return rank, shape[1]

    def turn(self, algebra: Algebra, old: State, new: State) -> Turn:
        return Turn(algebra.project(new["basis"], old["basis"]))

    def down(self, algebra: Algebra, g: Tensor, st: State) -> Tensor:
        return algebra.project(st["basis"], g)

    def add_up_(
        self, w: Tensor, d: Tensor, st: State, alpha: float, beta: float, columns: Columns | None = None
    ) -> None:
        add_product_(w, st["basis"], d if columns is None else columns.of(d), alpha, beta)

    def add_workspace(self, shape: Shape, rank: int) -> int:
        return scratch(shape, rank)


@dataclass(frozen=True)
class SVD(OneSided):
    """The exact leading left singular vectors of G, with fixed signs (GaLore).

    Where the SVD does not converge, the eigenvectors of the Gram matrix replace it (`ops.leading_left_vectors`).
    """

    def fit(self, algebra: Algebra, g: Tensor, old: State | None, rank: int, draw: Draw, at: Time) -> dict[str, Tensor]:
        return {"basis": algebra.leading(g, rank)}

    def fit_workspace(self, m: int, n: int, rank: int) -> int:
        short = min(m, n)
        # A copy of g, the two matrices of singular vectors, the singular values.
        return m * n + (m + n) * short + short


@dataclass(frozen=True)
class SubspaceIteration(OneSided):
    """Randomized subspace iteration: a few products with G instead of a factorization (GaLore 2, GaLore+).

    The first fit of a matrix starts from a Gaussian sketch `G Omega`. Later fits start from the previous basis and
    `oversample` fresh Gaussian columns, through which directions enter that the old subspace does not contain. One
    round then captures 0.99 of the energy that `torch.svd_lowrank(niter=2)` captures, and more where the gradient has
    changed little (`benchmarks/subspace.py`).

    Args:
        oversample: columns beyond the rank, in iterations only.
        rounds: iterations of the first fit.
        warm_rounds: iterations of later fits.
    """

    stacks: ClassVar[bool] = True
    oversample: int = 16
    rounds: int = 2
    warm_rounds: int = 1

    def fit(self, algebra: Algebra, g: Tensor, old: State | None, rank: int, draw: Draw, at: Time) -> dict[str, Tensor]:
        m, n = algebra.shape(g)
        width = self._width(m, n, rank)
        # The start of an iteration is not bound to a name, because a name would keep it alive during the iteration.
        if old is None:
            return {"basis": subspace_iteration(algebra, g, self._sketch(algebra, g, width, draw), rank, self.rounds)}
        rounds, known = self.warm_rounds, old["basis"]
        basis = subspace_iteration(algebra, g, self._continued(known, m, width, draw), rank, rounds, otherwise=known)
        return {"basis": basis}

    def fit_workspace(self, m: int, n: int, rank: int) -> int:
        width = self._width(m, n, rank)
        # The largest of three moments: a product, whitening one thin matrix, and ordering the vectors at the end.
        sides, long, small = (m + n) * width, max(m, n) * width, 16 * width**2  # small: k x k matrices in float64
        block, words = min(long, BLOCK), DRAWING * min(long, 4 * COUNTERS)  # words: random integers of plain torch
        fitted = m * width + max(small, 3 * m * rank + words)  # ordered and signed vectors, and random columns
        return max(sides + words, long + max(3 * block, small), fitted)

    def _sketch(self, algebra: Algebra, g: Tensor, width: int, draw: Draw) -> Tensor:
        """Return a whitened Gaussian sketch of G, `(m, width)`."""
        _, n = algebra.shape(g)
        return algebra.whiten_(algebra.random_sketch(g, width, lambda some: draw((n, width), some=some)), -2)

    def _continued(self, basis: Tensor, m: int, width: int, draw: Draw) -> Tensor:
        """Return the old basis and fresh columns, `(m, width)`.

        The fresh columns have length 1 on average, like the old ones, so that neither part dominates.
        """
        return torch.cat([basis, draw((m, width - basis.shape[-1])) / m**0.5], dim=-1)

    def _width(self, m: int, n: int, rank: int) -> int:
        """Return the number of columns that are iterated."""
        return min(rank + self.oversample, m, n)


@dataclass(frozen=True)
class PowerIteration(OneSided):
    """One block power iteration per refresh, from the previous basis, on a mixture of gradient and momentum (LDAdam).

        B = rho P M / (1 - beta^t) + (1 - rho) G        P <- orth(B B^T P)

    B `(m, n)` is never formed: because of `P^T P = I`, both `Z = B^T P` and `B Z` are thin products. The first basis is
    the exact one of G.

    Args:
        rho: weight of the momentum in B.
        beta: decay of the first moment M, for its bias correction.
    """

    rho: float
    beta: float

    def fit(self, algebra: Algebra, g: Tensor, old: State | None, rank: int, draw: Draw, at: Time) -> dict[str, Tensor]:
        if old is None:
            return {"basis": algebra.leading(g, rank)}
        basis = old["basis"]
        mean = old["exp_avg"] * (self.rho / (1 - self.beta**at.seen)) if at.seen else torch.zeros_like(old["exp_avg"])
        z = mean.mT + (1 - self.rho) * algebra.project(basis, g).mT
        y = basis @ algebra.inner(mean, z) + (1 - self.rho) * algebra.sketch(g, z)
        return {"basis": algebra.orthonormal(y, -2)}

    def fit_workspace(self, m: int, n: int, rank: int) -> int:
        short = min(m, n)
        first = m * n + (m + n) * short + short
        return max(first, 3 * n * rank + 8 * m * rank + 8 * rank**2)


@dataclass(frozen=True)
class TwoSided(Basis):
    """The two-sided basis `R = P^T G Q (r, r)` with P (m, r) and Q (n, r): GaLore's `proj_type="full"`.

    Args:
        inner: the basis that fits P. Q holds the right singular vectors of `P^T G`.
    """

    inner: Basis

    def inside(self, algebra: Algebra) -> Algebra:
        return WHOLE

    def spec(self, shape: Shape, rank: int) -> dict[str, Spec]:
        m, n = shape
        return {"basis": Spec((m, rank), steady=True), "basis_right": Spec((n, rank), steady=True)}

    def coordinates(self, shape: Shape, rank: int) -> Shape:
        return rank, rank

    def fit(self, algebra: Algebra, g: Tensor, old: State | None, rank: int, draw: Draw, at: Time) -> dict[str, Tensor]:
        left = self.inner.fit(algebra, g, old, rank, draw, at)["basis"]
        # As P holds left singular vectors, P^T G = S V^T (r, n) holds the right ones: a small problem, not a second
        # one of size (m, n).
        right = algebra.right(algebra.project(left, g), rank)
        return {"basis": left, "basis_right": right}

    def turn(self, algebra: Algebra, old: State, new: State) -> Turn:
        left = algebra.project(new["basis"], old["basis"])
        return Turn(left, algebra.inner(new["basis_right"].mT, old["basis_right"]))

    def down(self, algebra: Algebra, g: Tensor, st: State) -> Tensor:
        return algebra.inner(algebra.project(st["basis"], g), st["basis_right"])

    def add_up_(
        self, w: Tensor, d: Tensor, st: State, alpha: float, beta: float, columns: Columns | None = None
    ) -> None:
        right = st["basis_right"].mT
        add_product_(w, st["basis"], d @ (right if columns is None else columns.of(right)), alpha, beta)

    def step_workspace(self, shape: Shape, rank: int) -> int:
        return rank * shape[1]

    def add_workspace(self, shape: Shape, rank: int) -> int:
        return scratch(shape, rank)

    def fit_workspace(self, m: int, n: int, rank: int) -> int:
        return max(self.inner.fit_workspace(m, n, rank), 2 * rank * n + rank * rank)


@dataclass(frozen=True)
class Later(OneSided):
    """The basis `first` until step `since`, and `then` from that step on.

    GoLore uses singular vectors until noise dominates the gradient, and random vectors afterwards.
    """

    first: Basis
    then: Basis
    since: int

    def uncut(self) -> Mapping[int, str]:
        return {**self.then.uncut(), **self.first.uncut()}

    def fit(self, algebra: Algebra, g: Tensor, old: State | None, rank: int, draw: Draw, at: Time) -> dict[str, Tensor]:
        return (self.first if at.step < self.since else self.then).fit(algebra, g, old, rank, draw, at)

    def fit_workspace(self, m: int, n: int, rank: int) -> int:
        return max(self.first.fit_workspace(m, n, rank), self.then.fit_workspace(m, n, rank))


@dataclass(frozen=True)
class SharedHead(OneSided):
    """The subspace of one randomly drawn attention head, shared by all heads of a matrix (GaLore+).

    Heads are equal blocks of columns of the turned G. Where one head has fewer columns than the rank, the basis is
    fitted to several heads next to each other. Heads with a zero gradient are drawn last.

    Args:
        inner: the basis that is fitted to the columns of the drawn heads.
        heads: number of heads; 1: the whole matrix.
    """

    inner: Basis
    heads: int

    def uncut(self) -> Mapping[int, str]:
        return self.inner.uncut()

    def fit(self, algebra: Algebra, g: Tensor, old: State | None, rank: int, draw: Draw, at: Time) -> dict[str, Tensor]:
        if self.heads == 1:
            return self.inner.fit(algebra, g, old, rank, draw, at)
        width = algebra.shape(g)[1] // self.heads
        spans = [(head * width, (head + 1) * width) for head in range(self.heads)]
        sizes = torch.stack([part.largest(block) for part, block in (algebra.columns(g, [span]) for span in spans)])
        order = algebra.numbers(draw((self.heads,), "head").argsort())
        order.sort(
            key=algebra.numbers(sizes == 0).__getitem__
        )  # stable; a head with a zero gradient has no subspace to share
        some, block = algebra.columns(g, [spans[head] for head in sorted(order[: -(-rank // width)])])
        return self.inner.fit(some, block, old, rank, draw, at)

    def fit_workspace(self, m: int, n: int, rank: int) -> int:
        width = n // self.heads
        columns = n if self.heads == 1 else -(-rank // width) * width
        return self.inner.fit_workspace(m, columns, rank) + (m * columns if self.heads > 1 else 0)
