"""Fill the slot "which subspace?" with random vectors, or with rows of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..ops.blocks import Columns, widened
from ..ops.degenerate import untied_
from ..ops.reference.random import BLOCK, DRAWING
from ..ops.schema import kernel
from ..recipe.algebra import Algebra
from ..recipe.recipe import Basis, Draw, State, Time
from ..recipe.store import Exact, Shape, Spec
from ..recipe.turn import Reindex, Turn
from .basis import OneSided


@dataclass(frozen=True)
class Random(OneSided):
    """A Gaussian matrix P (m, r), drawn again at each refresh.

    Args:
        orthonormal: False: independent entries of variance 1/r, so that `E[P P^T] = I` (Flora, APOLLO). True: an
            orthonormal basis of their span, which is uniform over all subspaces (GoLore).
        kept: whether the state keeps P. If not, P is drawn at each step, as a function of the seed and of the number of
            refreshes.
    """

    orthonormal: bool = False
    kept: bool = False

    @property
    def derives(self) -> bool:  # type: ignore[override]
        return not self.kept

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        return not self.kept

    def spec(self, shape: Shape, rank: int) -> dict[str, Spec]:
        return super().spec(shape, rank) if self.kept else {}

    def fit(self, algebra: Algebra, g: Tensor, old: State | None, rank: int, draw: Draw, at: Time) -> dict[str, Tensor]:
        return {"basis": self._drawn(algebra, g, rank, draw)} if self.kept else {}

    def derive(self, algebra: Algebra, g: Tensor, kept: State, rank: int, draw: Draw) -> dict[str, Tensor]:
        return {"basis": self._drawn(algebra, g, rank, draw)} if self.derives else {}

    def derived(self, shape: Shape, rank: int) -> int:
        return 0 if self.kept else shape[0] * rank

    def derive_workspace(self, shape: Shape, rank: int) -> int:
        return 0 if self.kept else self.fit_workspace(shape[0], shape[1], rank)

    def fit_workspace(self, m: int, n: int, rank: int) -> int:
        drawing = m * rank + DRAWING * min(m * rank, 4 * BLOCK)
        return max(drawing, 6 * m * rank + 8 * rank**2) if self.orthonormal else drawing + m * rank

    def _drawn(self, algebra: Algebra, g: Tensor, rank: int, draw: Draw) -> Tensor:
        """Draw P `(m, r)`; of a sharded G, its local rows."""
        x = draw((algebra.shape(g)[0], rank))
        return algebra.orthonormal(x, -2) if self.orthonormal else x.mul_(rank**-0.5)


@dataclass(frozen=True)
class Rows(Basis):
    """A selection of r rows of the turned G. To project is to read these rows, and the state keeps their indices only.

    Where the rows of G are spread over ranks, each rank reads its local rows (at the local numbers `rows`) and takes
    zero for the others (where `mine` is False). A sum over ranks then completes R.

    Args:
        choose: "norm": the rows of largest norm (GRASS, SN-SM's top-k); "random": any rows (FRUGAL).
        power: of the norm: 2 for sums of squares, 1 for sums of absolute values.
    """

    choose: Literal["norm", "random"]
    power: int = 2
    indexed: ClassVar[bool] = True
    derives: bool = True

    def spec(self, shape: Shape, rank: int) -> dict[str, Spec]:
        return {"index": Spec((rank,), steady=True, store=Exact(torch.int32))}

    def derive(self, algebra: Algebra, g: Tensor, kept: State, rank: int, draw: Draw) -> dict[str, Tensor]:
        rows, mine = algebra.places(kept["index"])
        return {} if mine is None else {"rows": rows, "mine": mine.unsqueeze(-1)}

    def coordinates(self, shape: Shape, rank: int) -> Shape:
        return rank, shape[1]

    def fit(self, algebra: Algebra, g: Tensor, old: State | None, rank: int, draw: Draw, at: Time) -> dict[str, Tensor]:
        if self.choose == "random":
            return {"index": top(draw((int(algebra.shape(g)[0]),)), rank)}
        return {"index": strongest(algebra.every(algebra.energy(g, -1, self.power)), rank)}

    def turn(self, algebra: Algebra, old: State, new: State) -> Turn:
        return reindex(old["index"], new["index"])

    def down(self, algebra: Algebra, g: Tensor, st: State) -> Tensor:
        if "mine" not in st:
            return widened(_lines(g, st["index"].long()))
        if not g.shape[-2]:  # this rank holds no rows, but takes part in the sum
            return algebra.completed(widened(g).new_zeros(*st["rows"].shape, g.shape[-1]), st["rows"])
        return algebra.completed(widened(_lines(g, st["rows"])).masked_fill_(~st["mine"], 0), st["rows"])

    def add_up_(
        self, w: Tensor, d: Tensor, st: State, alpha: float, beta: float, columns: Columns | None = None
    ) -> None:
        d = d if columns is None else columns.of(d)
        if beta == 0:
            w.zero_()
        elif beta != 1:
            w.mul_(beta)
        if not w.numel():  # an empty shard
            return
        index = st["rows"] if "mine" in st else st["index"].long()
        d = d * st["mine"] if "mine" in st else d
        if w.dim() == 2:
            w.index_add_(0, index, d, alpha=alpha)
        else:
            w.scatter_add_(-2, index.unsqueeze(-1).expand_as(d), d * alpha)

    def fit_workspace(self, m: int, n: int, rank: int) -> int:
        return m * n + 4 * m if self.choose == "norm" else 5 * m + DRAWING * min(m, 4 * BLOCK)


def _lines(g: Tensor, index: Tensor) -> Tensor:
    """Return the rows at `index` `(..., r)` of one matrix, or of each matrix of a stack."""
    return g[index] if g.dim() == 2 else g.gather(-2, index.unsqueeze(-1).expand(*index.shape, g.shape[-1]))


def top(scores: Tensor, rank: int) -> Tensor:
    """Return the positions of the `rank` largest scores, in ascending order. Of equal scores the first wins.

    The order lets a vector that stays selected keep its place among the coordinates where possible.
    """
    index = scores.new_empty(*scores.shape[:-1], rank, dtype=torch.int32)
    kernel("select_top_")(index, scores)
    return index


def strongest(energies: Tensor, rank: int) -> Tensor:
    """Return `top` of sums, where sums that are equal but for rounding errors are equal. Overwrites them."""
    return top(untied_(energies, rank, energies.amax(-1, keepdim=True)), rank)


def reindex(old: Tensor, new: Tensor) -> Reindex:
    """Return the turn between two ascending selections `(r,)`."""
    # Where each new vector would be in the old selection; -1 where the vector there is another one.
    slot = torch.searchsorted(old, new).clamp_(max=len(old) - 1)
    return Reindex(slot.masked_fill_(old[slot] != new, -1))
