"""How a parameter and its state lie over processes: what of them is here, and which algebra fits.

Everything above this folder works on what is here, a plain tensor. State that has the cut side of its matrix is cut as
the matrix is, and kept as a DTensor, so that checkpoints know; all other state is the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..ops.philox import Places
from ..recipe.algebra import WHOLE, Algebra
from ..recipe.plan import Plan
from ..recipe.store import Shape, Side, Spec, Store
from . import checks as shard_checks
from .dtensors import from_local, like, local, moved
from .dtensors import whole as whole_tensor
from .lockstep import Peers, ranks, total
from .pieces import Piece, peers_of, pieces
from .shards import Meter, Shards, Traffic

_BATCH = -3


class Layout:
    """Here is all of it, an ordinary tensor."""

    sharded = False  # True: a step needs all ranks
    key: tuple[Any, ...] = ()  # equal where matrices can be stacked

    def here(self, x: Tensor) -> Tensor:
        """A parameter, its gradient or a tensor of its state, as far as it is here; the same memory."""
        return x

    def enter(self, x: Tensor) -> Tensor:
        """What is here of a parameter, in the shape of `plan`."""
        return self.here(x)

    def enter_gradient(self, x: Tensor) -> Tensor:
        return self.enter(x)

    def leave_(self, p: Tensor, x: Tensor) -> None:
        """Writes what `enter` gave back to the parameter, where it is other memory."""

    def here_all(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def first(self, plan: Plan) -> int:
        """The number of the first matrix of the batch that is here."""
        return 0

    def most(self, plan: Plan) -> int:
        """Elements that a process has of the parameter, or the most that any has."""
        return math.prod(plan.shape)

    @property
    def counts_apart(self) -> bool:
        """True: others have other matrices of a batch, and know what has become of those."""
        return False

    def tell_all_(self, state: dict[str, Tensor]) -> None:
        """Brings the counters of all matrices of a batch up to date, which every process keeps."""

    def plan(self, plan: Plan) -> Plan:
        """The plan of what is here."""
        return plan

    def matrix(self, plan: Plan) -> Shape:
        """The shape of the whole matrix, for `Recipe.spec`; a side that is cut is a `Side`."""
        return plan.matrix

    def weight(self, plan: Plan) -> Shape:
        """The shape of what is here of the parameter, as a matrix that is not turned, for `number`."""
        return plan.matrix

    def spec(self, spec: dict[str, Spec]) -> dict[str, Spec]:
        """The shapes of what is here, from those of the whole."""
        return spec

    def zeros(self, batch: Shape, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A new tensor of state: one of `shape`, as `matrix` led to it, for each matrix."""
        return torch.zeros(batch + shape, dtype=dtype, device=device)

    def gather(self, x: Tensor) -> Tensor | None:
        """The whole of a tensor of state, a copy on the CPU of rank 0; None on other ranks. All ranks call it."""
        return None if others() else x.detach().to("cpu", copy=True)

    def part(self, whole: Tensor, ours: Tensor) -> Tensor:
        """What of a whole tensor belongs where `ours` is, in its dtype and layout; new memory. All ranks call it."""
        return like(whole, ours)

    def within(self, whole: Tensor, shape: Shape) -> Tensor:
        """What is here of the state of a matrix in a flat tensor, a view; `shape` as it is kept, with cut sides."""
        return whole

    def once(self, x: Tensor, shape: Shape) -> Tensor | None:
        """Of such state, what this process speaks for where others have it too; None: nothing."""
        return x

    @property
    def begin(self) -> int:
        """The number of the first element that is here of a matrix in flat tensors."""
        return 0

    def border(self, x: Tensor, shape: Shape) -> Tensor | None:
        """Of such state, the row that another process speaks for, if there is one."""
        return None

    def number(self, shape: Shape, element: int, several: bool) -> int | Places:
        """The number in the whole tensor of an element of what is here of it, `shape` as from `spec`; `several`: of
        tensors of that shape one after the other."""
        return element

    def algebra(self, layouts: Sequence[Layout]) -> Algebra:
        """Of matrices with these layouts, which are equal but for what they count."""
        return WHOLE

    @property
    def place(self) -> str:
        """What of a DTensor is here, in words."""
        return ""

    @property
    def sent(self) -> tuple[float | None, float | None]:
        """Bytes handed to collectives per step and per refresh, on average."""
        return None, None


@dataclass(frozen=True, eq=False)
class Replicated(Layout):
    """A DTensor that every rank has whole."""

    def here(self, x: Tensor) -> Tensor:
        return local(x)

    def here_all(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: local(tensor) for key, tensor in state.items()}

    def gather(self, x: Tensor) -> Tensor | None:
        return super().gather(whole_tensor(x))

    @property
    def place(self) -> str:
        return "replicated"


@dataclass(frozen=True, eq=False)
class Cut(Replicated):
    """A DTensor of which others have a part.

    Attributes:
        pieces: what is here of each side that is cut: of the turned matrix, -2 and -1, or of a batch of matrices, -3.
        natural: the dimensions of the parameter that these are; `rows`: the one that counts rows.
        everyone: those who have any other part; `both`: those who have one of the same matrix, where both of its sides
            are cut.
    """

    mesh: Any
    placements: tuple[Any, ...]
    pieces: Mapping[int, Piece]
    natural: Mapping[int, int]
    rows: int
    everyone: Peers
    both: Peers | None = None
    meter: Meter = field(default_factory=Meter)
    sharded = True

    @property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return *self.pieces.items(), self.both

    def first(self, plan: Plan) -> int:
        return self.pieces[_BATCH].start * math.prod(plan.batch[1:]) if _BATCH in self.pieces else 0

    def most(self, plan: Plan) -> int:
        longest = {self.natural[side]: piece.most for side, piece in self.pieces.items()}
        return math.prod(longest.get(i, size) for i, size in enumerate(plan.shape))

    def plan(self, plan: Plan) -> Plan:
        here = {side: piece.length for side, piece in self.pieces.items()}
        natural = {self.natural[side]: length for side, length in here.items()}
        shape = tuple(natural.get(i, size) for i, size in enumerate(plan.shape))
        matrix = tuple(here.get(i - len(plan.matrix), size) for i, size in enumerate(plan.matrix))
        batch = (here.get(_BATCH, plan.batch[0]), *plan.batch[1:]) if plan.batch else ()
        return replace(plan, shape=shape, matrix=matrix, batch=batch)

    def matrix(self, plan: Plan) -> Shape:
        sides = range(-len(plan.matrix), 0)
        return tuple(Side(n, i) if i in self.pieces else n for i, n in zip(sides, plan.matrix, strict=True))

    def weight(self, plan: Plan) -> Shape:
        shape = self._shape_here(self.matrix(plan))
        return shape[::-1] if plan.side == "right" else shape

    def here_all(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if _BATCH not in self.pieces:
            return super().here_all(state)
        mine = self._matrices()
        return {key: local(x) if hasattr(x, "device_mesh") or not x.dim() else x[mine] for key, x in state.items()}

    @property
    def counts_apart(self) -> bool:
        return _BATCH in self.pieces

    def tell_all_(self, state: dict[str, Tensor]) -> None:
        mine, peers = self._matrices(), self.pieces[_BATCH].peers
        for x in state.values():
            if x.dim() and not hasattr(x, "device_mesh"):
                own = torch.zeros_like(x)
                own[mine] = x[mine]
                x.copy_(total(own, peers))

    def spec(self, spec: dict[str, Spec]) -> dict[str, Spec]:
        return {key: one._replace(shape=self._shape_here(one.shape)) for key, one in spec.items()}

    def zeros(self, batch: Shape, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        cut = {side.which: len(batch) + i for i, side in enumerate(shape) if isinstance(side, Side)}
        here = list(batch + tuple(map(int, self._shape_here(shape))))
        if _BATCH in self.pieces:
            cut[_BATCH], here[0] = 0, self.pieces[_BATCH].length
        x = torch.zeros(here, dtype=dtype, device=device)
        return self._distributed(x, batch + tuple(map(int, shape)), cut) if cut else x

    def number(self, shape: Shape, element: int, several: bool) -> int | Places:
        first = self._piece(shape[0]) if shape else None
        last = self._piece(shape[-1]) if len(shape) > 1 else None
        width = last.whole if last else math.prod(shape[1:])
        base = first.start * width if first else 0
        if last:
            run, gap, base = last.length, last.whole - last.length, base + last.start
        elif first and several:
            run, gap = first.length * width, (first.whole - first.length) * width
        else:
            return base + element
        return Places(element, base, run, gap) if run else 0

    def algebra(self, layouts: Sequence[Layout]) -> Algebra:
        sides = {side: piece for side, piece in self.pieces.items() if side != _BATCH}
        return self._shards(sides, [cast(Cut, one).meter for one in layouts]) if sides else WHOLE

    def _shards(self, sides: Mapping[int, Piece], meters: Sequence[Meter]) -> Algebra:
        return Shards(sides, self.both, Traffic(meters))

    def cut_blocks(self, spec: dict[str, Spec]) -> list[str]:
        """State that is cut and quantized in blocks, which a cut would divide."""
        cut = [key for key, one in spec.items() if any(isinstance(side, Side) for side in one.shape)]
        return [key for key in cut if cast(Store, spec[key].store).block > 1]

    @property
    def place(self) -> str:
        words = {self.rows - 1: "matrices", self.rows: "rows", self.rows + 1: "columns"}
        return ", ".join(
            f"{one.length} of {one.whole} {words[self.natural[side]]}" for side, one in self.pieces.items()
        )

    @property
    def sent(self) -> tuple[float | None, float | None]:
        return self.meter.sent

    def _matrices(self) -> slice:
        """Which of a batch are here."""
        piece = self.pieces[_BATCH]
        return slice(piece.start, piece.start + piece.length)

    def _piece(self, side: int) -> Piece | None:
        return self.pieces[side.which] if isinstance(side, Side) else None

    def _shape_here(self, shape: Shape) -> Shape:
        pieces = [(side, self._piece(side)) for side in shape]
        return tuple(side if piece is None else Side(piece.length, cast(Side, side).which) for side, piece in pieces)

    def _distributed(self, x: Tensor, shape: Shape, cut: Mapping[int, int]) -> Tensor:
        """A DTensor of which x is what is here; `cut`: its dimensions that are sides of the matrix, by side."""
        from torch.distributed.tensor import Replicate

        where = {self.natural[side]: dim for side, dim in cut.items()}
        placements: list[Any] = []
        for one in self.placements:
            dim = None if one.is_replicate() else where.get(one.dim)
            placements.append(Replicate() if dim is None else moved(one, dim))
        return from_local(x, self.mesh, placements, shape)


HERE = Layout()


def layout_of(p: Tensor, plan: Plan) -> Layout:
    """Raises a NotImplementedError for a DTensor that is laid out in a way that nobody here understands."""
    if not hasattr(p, "device_mesh"):
        return HERE
    dtensor = cast(Any, p)
    placements, mesh = tuple(dtensor.placements), dtensor.device_mesh
    if all(one.is_replicate() for one in placements):
        return Replicated()
    shard_checks.layout(plan.name, placements)
    cut = pieces(plan.shape, mesh, placements)
    if any(local(p).shape[natural] != piece.length for natural, piece in cut.items()):
        raise NotImplementedError(f"{plan.name} is cut into {placements}, but not into equal parts")
    natural = {dimension(plan, i): i for i in cut}
    sides = {side: cut[i] for side, i in natural.items()}
    shard_checks.cut_stack(plan.name, bool(plan.batch), len(sides.keys() & {-2, -1}))
    everyone = peers_of(mesh, placements)
    return Cut(mesh, placements, sides, natural, len(plan.batch), everyone, _both(mesh, placements, natural))


def _both(mesh: Any, placements: Sequence[Any], natural: Mapping[int, int]) -> Peers | None:
    """Those who have another part of the same matrix, where both of its sides are cut."""
    sides = {at for side, at in natural.items() if side != _BATCH}
    inside = [None if one.is_replicate() or one.dim not in sides else one for one in placements]
    return peers_of(mesh, inside) if len(sides) == 2 else None


def algebra_of_rows(layout: Layout, turned: bool) -> Algebra:
    """Of a matrix that is cut by its rows, if at all, or of what is here of it transposed."""
    if not isinstance(layout, Cut):
        return WHOLE
    (piece,) = layout.pieces.values()
    return layout._shards({-1 if turned else -2: piece}, [layout.meter])


def others() -> bool:
    """Is this another rank than 0?"""
    return ranks()[0] > 0


def dimension(plan: Plan, natural: int) -> int:
    """The dimension of the turned matrix that a dimension of the parameter is."""
    if len(plan.matrix) == 1:
        return -1
    rows = len(plan.batch)
    if natural < rows:
        shard_checks.batch(plan.name, natural)
        return _BATCH
    if natural > rows and len(plan.shape) > rows + 2:
        raise NotImplementedError(
            f"{plan.name} {plan.shape} is read as a matrix {plan.matrix}, and cut along dimension {natural}, which is "
            "no side of it. Shard dimension 0 (the default of fully_shard)"
        )
    is_row = natural == rows
    return -2 if is_row != (plan.side == "right") else -1
