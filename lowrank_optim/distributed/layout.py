"""Describe how a parameter and its state are spread over processes: the local part, and the algebra that fits it.

Everything above this folder works on the local part, which is a plain tensor. A state tensor that has the cut side of
its matrix is cut in the same way. It is kept as a DTensor, so that checkpoints know its layout. All other state is the
same on every rank. `Layout` describes an ordinary tensor, `Replicated` and `Cut` describe DTensors, and `fragments.py`
adds the layouts of ranges in flat tensors. `placement.py` finds the layout of a DTensor.
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
from .dtensors import from_local, like, local, moved
from .dtensors import whole as whole_tensor
from .lockstep import Peers, ranks, total
from .pieces import Piece
from .shards import Meter, Shards, Traffic

BATCH = -3  # the key of a cut batch dimension, next to -2 and -1 for the sides of the turned matrix


class Layout:
    """The layout of an ordinary tensor, which this process holds whole; and the questions that every layout answers.

    Attributes:
        sharded: whether a step of the parameter needs all ranks.
        key: equal for layouts whose matrices can be stacked in one chunk.
    """

    sharded = False
    key: tuple[Any, ...] = ()

    # -- the tensors of a step -----------------------------------------------------------------------------------------

    def here(self, x: Tensor) -> Tensor:
        """Return the local part of a parameter, of its gradient or of a state tensor, in the same memory."""
        return x

    def enter(self, x: Tensor) -> Tensor:
        """Return the local part of a parameter in the shape that `plan` gives; in the same memory if possible."""
        return self.here(x)

    def enter_gradient(self, x: Tensor) -> Tensor:
        """Return the local part of a gradient in the shape that `plan` gives."""
        return self.enter(x)

    def leave_(self, p: Tensor, x: Tensor) -> None:
        """Write `x`, the changed result of `enter(p)`, to the parameter where `enter` has copied it."""

    def here_all(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the local parts of all state tensors of a parameter, in the same memory."""
        return state

    # -- the matrices of a stack ---------------------------------------------------------------------------------------

    def first(self, plan: Plan) -> int:
        """Return the index of the first local matrix of the batch. `plan` is that of the whole parameter."""
        return 0

    def most(self, plan: Plan) -> int:
        """Return the number of elements of the largest local part on any rank, which all ranks agree on."""
        return math.prod(plan.shape)

    @property
    def counts_apart(self) -> bool:
        """Whether the matrices of one stack are spread over ranks.

        Each rank then knows the refresh counters of its own matrices only, until `tell_all_` is called.
        """
        return False

    def tell_all_(self, state: dict[str, Tensor]) -> None:
        """Update the counters of the matrices of other ranks in the state of a stack. All ranks call it.

        Counters are plain tensors `(batch,)` with an entry for each matrix of the whole stack, on every rank.
        """

    # -- shapes --------------------------------------------------------------------------------------------------------

    def plan(self, plan: Plan) -> Plan:
        """Return the plan of the local part: its shape, batch and matrix."""
        return plan

    def matrix(self, plan: Plan) -> Shape:
        """Return the shape of the whole turned matrix, for `Recipe.spec`. A side that is cut is a `Side`."""
        return plan.matrix

    def weight(self, plan: Plan) -> Shape:
        """Return the shape of the local part as a natural (not turned) matrix, for `number`."""
        return plan.matrix

    def spec(self, spec: dict[str, Spec]) -> dict[str, Spec]:
        """Return the specs with local shapes, given those of whole tensors."""
        return spec

    def zeros(self, batch: Shape, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Return a new state tensor of zeros.

        Args:
            batch: leading dimensions of the whole stack of matrices, () for a single matrix.
            shape: for one whole matrix, as a part asked for it. Sides that are cut are `Side`.
        """
        return torch.zeros(batch + shape, dtype=dtype, device=device)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def gather(self, x: Tensor) -> Tensor | None:
        """Return a copy of the whole state tensor on the CPU of rank 0, and None on other ranks. All ranks call it."""
        return None if others() else x.detach().to("cpu", copy=True)

    def part(self, whole: Tensor, ours: Tensor) -> Tensor:
        """Return the part of a whole tensor that belongs in the place of `ours`. All ranks call it.

        Args:
            whole: all of the state tensor, on every rank.
            ours: the state tensor of this rank. The result has its dtype, device and layout, and new memory.
        """
        return like(whole, ours)

    def within(self, whole: Tensor, shape: Shape) -> Tensor:
        """Return a view of the local part of a whole state tensor, for a matrix in flat tensors.

        Args:
            whole: the state tensor of one matrix, with any leading dimensions.
            shape: its shape as it is stored, where cut sides are `Side`. `once` and `border` take the same.
        """
        return whole

    def once(self, x: Tensor, shape: Shape) -> Tensor | None:
        """Return the elements of a local state tensor `x` that this rank adds when the state is put together.

        Every element of the whole is added by exactly one of the ranks that have it. None means that this rank adds
        nothing. For matrices in flat tensors.
        """
        return x

    @property
    def begin(self) -> int:
        """The index, in its matrix, of the first local element of a matrix in flat tensors."""
        return 0

    def border(self, x: Tensor, shape: Shape) -> Tensor | None:
        """Return the row of a local state tensor `x` that another rank adds (see `once`), or None."""
        return None

    # -- random numbers, collectives, reports --------------------------------------------------------------------------

    def number(self, shape: Shape, element: int, several: bool) -> int | Places:
        """Return the global index of a local element, for counter-based random numbers.

        Args:
            shape: local shape of one tensor, as `spec` returns it.
            element: index in the local tensor, row-major.
            several: whether several tensors of that shape are stored one after another.

        Returns:
            The index, or the rule that gives the indices of this element and of those after it.
        """
        return element

    def algebra(self, layouts: Sequence[Layout]) -> Algebra:
        """Return the algebra of a chunk of matrices with these layouts, which differ in their meters only."""
        return WHOLE

    @property
    def place(self) -> str:
        """The local part of a sharded parameter in words, such as "8 of 32 rows"."""
        return ""

    @property
    def sent(self) -> tuple[float | None, float | None]:
        """Average bytes that this rank hands to collectives per step and per refresh. None: none so far."""
        return None, None


@dataclass(frozen=True, eq=False)
class Replicated(Layout):
    """The layout of a DTensor that every rank holds whole."""

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
    """The layout of a DTensor that is cut along one dimension or more.

    Attributes:
        mesh, placements: of the DTensor.
        pieces: the local piece of each dimension that is cut. Keys are -2 and -1 for the sides of the turned matrix,
            and -3 for the batch.
        natural: the dimension of the parameter that each key of `pieces` stands for.
        rows: the dimension of the parameter that counts rows; dimensions before it are the batch.
        everyone: the ranks that have any part of the parameter.
        both: the ranks that have parts of the same matrix, if both of its sides are cut; else None.
        meter: counts the bytes that are sent for this parameter.
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
        # Equal pieces mean equal local shapes, and sums over the same ranks.
        return *self.pieces.items(), self.both

    def first(self, plan: Plan) -> int:
        # Only the first batch dimension can be cut; each of its entries stands for prod(batch[1:]) matrices.
        return self.pieces[BATCH].start * math.prod(plan.batch[1:]) if BATCH in self.pieces else 0

    def most(self, plan: Plan) -> int:
        # The longest piece of each dimension, and not the local one: all ranks must divide work into equal chunks.
        longest = {self.natural[side]: piece.most for side, piece in self.pieces.items()}
        return math.prod(longest.get(i, size) for i, size in enumerate(plan.shape))

    def plan(self, plan: Plan) -> Plan:
        # The same local lengths three times: by dimension of the parameter, of the turned matrix, and of the batch.
        here = {side: piece.length for side, piece in self.pieces.items()}
        natural = {self.natural[side]: length for side, length in here.items()}
        shape = tuple(natural.get(i, size) for i, size in enumerate(plan.shape))
        matrix = tuple(here.get(i - len(plan.matrix), size) for i, size in enumerate(plan.matrix))
        batch = (here.get(BATCH, plan.batch[0]), *plan.batch[1:]) if plan.batch else ()
        return replace(plan, shape=shape, matrix=matrix, batch=batch)

    def matrix(self, plan: Plan) -> Shape:
        sides = range(-len(plan.matrix), 0)
        return tuple(Side(n, i) if i in self.pieces else n for i, n in zip(sides, plan.matrix, strict=True))

    def weight(self, plan: Plan) -> Shape:
        # Noise of weights is indexed in the natural matrix, so that it does not depend on the projected side.
        shape = self._shape_here(self.matrix(plan))
        return shape[::-1] if plan.side == "right" else shape

    def here_all(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if BATCH not in self.pieces:
            return super().here_all(state)
        # Counters (batch,) are whole plain tensors on every rank; here only the local matrices (local batch,) count.
        mine = self._matrices()
        return {key: local(x) if hasattr(x, "device_mesh") or not x.dim() else x[mine] for key, x in state.items()}

    @property
    def counts_apart(self) -> bool:
        return BATCH in self.pieces

    def tell_all_(self, state: dict[str, Tensor]) -> None:
        mine, peers = self._matrices(), self.pieces[BATCH].peers
        # Every rank sends its own entries within zeros (batch,), so their sum has the current entries of all ranks.
        for x in state.values():
            if x.dim() and not hasattr(x, "device_mesh"):
                own = torch.zeros_like(x)
                own[mine] = x[mine]
                x.copy_(total(own, peers))

    def spec(self, spec: dict[str, Spec]) -> dict[str, Spec]:
        return {key: entry._replace(shape=self._shape_here(entry.shape)) for key, entry in spec.items()}

    def zeros(self, batch: Shape, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        # A side of the matrix may be at any dimension of a state tensor, so each cut side says where it is.
        cut = {side.which: len(batch) + i for i, side in enumerate(shape) if isinstance(side, Side)}
        here = list(batch + tuple(map(int, self._shape_here(shape))))
        if BATCH in self.pieces:
            cut[BATCH], here[0] = 0, self.pieces[BATCH].length
        x = torch.zeros(here, dtype=dtype, device=device)
        return self._distributed(x, batch + tuple(map(int, shape)), cut) if cut else x

    def number(self, shape: Shape, element: int, several: bool) -> int | Places:
        # Random numbers are a function of the global row-major index. Then every cut draws what one process draws.
        first = self._piece(shape[0]) if shape else None
        last = self._piece(shape[-1]) if len(shape) > 1 else None
        # `width`: elements of a whole row. `base`: global index of the first local row.
        width = last.whole if last else math.prod(shape[1:])
        base = first.start * width if first else 0
        if last:
            # Columns are cut: after `length` local elements of a row, the other columns are skipped.
            run, gap, base = last.length, last.whole - last.length, base + last.start
        elif first and several:
            # Rows of each of several tensors are cut: after the local rows, the other rows are skipped.
            run, gap = first.length * width, (first.whole - first.length) * width
        else:
            return base + element
        return Places(element, base, run, gap) if run else 0

    def algebra(self, layouts: Sequence[Layout]) -> Algebra:
        # Layouts of one chunk have the same pieces (see `key`), so those of `self` stand for all.
        sides = {side: piece for side, piece in self.pieces.items() if side != BATCH}
        # With only the batch cut, each local matrix is whole.
        return self._shards(sides, [cast(Cut, layout).meter for layout in layouts]) if sides else WHOLE

    def _shards(self, sides: Mapping[int, Piece], meters: Sequence[Meter]) -> Algebra:
        """Return the algebra for matrices with these cut sides, which counts on these meters."""
        return Shards(sides, self.both, Traffic(meters))

    def cut_blocks(self, spec: dict[str, Spec]) -> list[str]:
        """Return the keys of state that is both cut and quantized in blocks, because a cut would divide a block."""
        cut = [key for key, entry in spec.items() if any(isinstance(side, Side) for side in entry.shape)]
        return [key for key in cut if cast(Store, spec[key].store).block > 1]

    @property
    def place(self) -> str:
        words = {self.rows - 1: "matrices", self.rows: "rows", self.rows + 1: "columns"}
        return ", ".join(
            f"{piece.length} of {piece.whole} {words[self.natural[side]]}" for side, piece in self.pieces.items()
        )

    @property
    def sent(self) -> tuple[float | None, float | None]:
        return self.meter.sent

    def _matrices(self) -> slice:
        """Return the range of local matrices in the first dimension of the batch."""
        piece = self.pieces[BATCH]
        return slice(piece.start, piece.start + piece.length)

    def _piece(self, side: int) -> Piece | None:
        """Return the local piece of a length in a shape, or None if the length is not that of a cut side."""
        return self.pieces[side.which] if isinstance(side, Side) else None

    def _shape_here(self, shape: Shape) -> Shape:
        """Return a shape with the lengths of local pieces. Cut sides stay `Side`."""
        pieces = [(side, self._piece(side)) for side in shape]
        return tuple(side if piece is None else Side(piece.length, cast(Side, side).which) for side, piece in pieces)

    def _distributed(self, x: Tensor, shape: Shape, cut: Mapping[int, int]) -> Tensor:
        """Return a state tensor as a DTensor.

        Args:
            x: its local part.
            shape: of the whole state tensor.
            cut: the dimension of the state tensor at which each cut side of the matrix is, by side.
        """
        from torch.distributed.tensor import Replicate

        # A mesh dimension that cuts a side of the parameter cuts the state where that side is, if the state has it.
        where = {self.natural[side]: dim for side, dim in cut.items()}
        placements: list[Any] = []
        for placement in self.placements:
            dim = None if placement.is_replicate() else where.get(placement.dim)
            placements.append(Replicate() if dim is None else moved(placement, dim))
        return from_local(x, self.mesh, placements, shape)


HERE = Layout()


def others() -> bool:
    """Whether this process is a rank other than 0."""
    return ranks()[0] > 0
