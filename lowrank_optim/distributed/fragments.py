"""Describe parameters of which a flat tensor holds a range of elements, as under DeepSpeed ZeRO.

The cuts between ranks fall anywhere, also inside a row. A matrix method needs whole rows, so a rank works on every row
that its range touches. For example, rank 0 has elements 0 to 12 of a matrix (5, 5), and rank 1 the elements from 13::

    row 0   0 0 0 0 0    rank 0 works on rows 0, 1, 2
    row 1   0 0 0 0 0
    row 2   0 0 0 1 1    the edge: both ranks work on it
    row 3   1 1 1 1 1    rank 1 works on rows 2, 3, 4
    row 4   1 1 1 1 1

- Once per step, all ranks add up the edge rows of the gradients (`complete_edges`). From then on both ranks know row 2.
- Both ranks update row 2 in the same way, and each writes only its own elements of it to the flat tensor.
- Sums over ranks count each row once, on the rank that has its first element (rank 0 for row 2; see `Overlapping`).

An elementwise rule, such as AdamW on a vector, needs no rows. Its range stays flat (`Stretch`).
`cutting.py` makes the fragments of a flat tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..recipe.algebra import Algebra
from ..recipe.plan import Plan
from ..recipe.store import Shape, Side
from .layout import Cut, Layout
from .lockstep import total
from .overlapping import Overlapping
from .pieces import Piece
from .shards import Traffic


class Fragment(NamedTuple):
    """A range of a parameter, or of one matrix of a stack, that is updated by itself.

    Args:
        key: key of its state.
        plan: of the whole parameter, or of the matrix taken out of the stack.
        layout: how the range is cut out of that.
        offset: index of its first element in the flat tensor.
        length: number of its elements.
        matrix: index of the matrix in its stack; None for a parameter that is no stack.
    """

    key: str
    plan: Plan
    layout: Layout
    offset: int
    length: int
    matrix: int | None = None


@dataclass(frozen=True, eq=False)
class Inside(Layout):
    """The layout of a parameter (or a matrix of a stack) whose elements are all in the flat tensor of this process.

    Attributes:
        shape: of the parameter or matrix.
        index: index of the matrix in its stack, 0 for a parameter that is no stack.
    """

    shape: Shape
    index: int = 0

    @property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.index,)

    def enter(self, x: Tensor) -> Tensor:
        return x.view(self.shape)

    def first(self, plan: Plan) -> int:
        return self.index

    @property
    def place(self) -> str:
        return "whole"


@dataclass(frozen=True, eq=False, kw_only=True)
class _Fragment(Cut):
    """A layout with exactly one cut side, of which the flat tensor holds a piece.

    It has no mesh, because state is kept as plain tensors: DeepSpeed saves the state of each rank by itself.
    """

    mesh: Any = None
    placements: tuple[Any, ...] = ()
    rows: int = 0

    @property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (id(self),)  # equal to no other: each matrix is cut at other places, so none can be stacked

    @property
    def side(self) -> int:
        """The side of the turned matrix that is cut, -2 or -1."""
        return next(iter(self.pieces))

    @property
    def piece(self) -> Piece:
        """The local piece of that side."""
        return self.pieces[self.side]

    @property
    def twice(self) -> int:
        """The number of leading local rows (0 or 1) that an earlier rank has as well, and counts in sums."""
        return 0

    # State is kept for the local entries of each cut dimension, the shared row included. To put the whole state
    # together, each rank adds what only it counts (`once`); the second copy of a shared row is its `border`.

    def zeros(self, batch: Shape, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        return torch.zeros(batch + tuple(map(int, self._shape_here(shape))), dtype=dtype, device=device)

    def within(self, whole: Tensor, shape: Shape) -> Tensor:
        return _narrowed(whole, shape, self.piece.start, self.piece.length)

    def once(self, x: Tensor, shape: Shape) -> Tensor | None:
        # State that is not cut is the same on all ranks, and the first rank adds it.
        if not cut_dimensions(shape):
            return None if self.piece.place else x
        return _narrowed(x, shape, self.twice, self.piece.length - self.twice)

    def border(self, x: Tensor, shape: Shape) -> Tensor | None:
        return _narrowed(x, shape, 0, 1) if self.twice and cut_dimensions(shape) else None


@dataclass(frozen=True, eq=False, kw_only=True)
class Stretch(_Fragment):
    """The layout of a range of elements whose update rule looks at no shape, so that the range may stay flat."""

    def plan(self, plan: Plan) -> Plan:
        return replace(plan, shape=(self.piece.length,), batch=(), matrix=(self.piece.length,))

    def most(self, plan: Plan) -> int:
        return self.piece.most

    def matrix(self, plan: Plan) -> Shape:
        return (Side(self.piece.whole, -1),)

    def weight(self, plan: Plan) -> Shape:
        return self._shape_here(self.matrix(plan))

    def within(self, whole: Tensor, shape: Shape) -> Tensor:
        # State of the whole parameter has its shape, such as (b, m, n); a stretch counts its elements as one line.
        return super().within(whole.reshape(-1) if cut_dimensions(shape) else whole, shape)

    @property
    def place(self) -> str:
        return f"{self.piece.length} of {self.piece.whole} elements"


@dataclass(frozen=True, eq=False, kw_only=True)
class TouchedRows(_Fragment):
    """The layout of a range of a matrix, as the rows that the range touches.

    Rows are those of the natural matrix. In a turned matrix they may be columns, and then `side` is -1.

    Attributes:
        width: number of elements in a row.
        skipped: number of elements in the first touched row that come before the range.
        elements: number of elements in the range.
        edges: indices of all rows of the matrix that a cut divides, on any rank.
        index: index of the matrix in its stack, 0 for a parameter that is no stack.
        completed: the edge rows (edges, width) of the current gradient, summed over ranks; empty once they are used.
    """

    width: int
    skipped: int
    elements: int
    edges: tuple[int, ...] = ()
    index: int = 0
    completed: list[Tensor] = field(default_factory=list)

    def enter(self, x: Tensor) -> Tensor:
        """Return the range as whole rows (rows, width), with zeros in place of elements of other ranks."""
        # A range of whole rows is a view. Otherwise rows are copied, and the elements of other ranks stay zero: their
        # updates are computed and never written.
        if self._partly:
            rows = x.new_zeros(self.piece.length * self.width)
            rows[self._own] = x
            x = rows
        return x.view(self.piece.length, self.width)

    def enter_gradient(self, x: Tensor) -> Tensor:
        rows = self.enter(x)
        # Every rank has received all edge rows of the matrix; only those that the local range touches are needed.
        for edge, row in zip(self.edges, self.completed.pop() if self.edges else (), strict=True):
            if self.piece.start <= edge < self.piece.start + self.piece.length:
                rows[edge - self.piece.start] = row
        return rows

    def leave_(self, p: Tensor, rows: Tensor) -> None:
        # `rows` is a copy where the range has a part of a row only; else it is the memory of p.
        if self._partly:
            p.copy_(rows.view(-1)[self._own])

    def first(self, plan: Plan) -> int:
        return self.index

    @property
    def twice(self) -> int:
        # The range begins inside its first row, so an earlier rank has the first element of that row.
        return int(self.skipped > 0)

    @property
    def begin(self) -> int:
        return self.piece.start * self.width + self.skipped

    def plan(self, plan: Plan) -> Plan:
        return replace(super().plan(plan), shape=(self.piece.length, self.width))

    def algebra(self, layouts: Sequence[Layout]) -> Algebra:
        return Overlapping(self.pieces, None, Traffic([self.meter]), self.twice, self.own)

    def own(self, x: Tensor) -> Tensor | None:
        """Return the elements of the range as a line, of a tensor with the shape of the local rows.

        Args:
            x: (..., rows, width), or (..., width, rows) if the matrix is turned to columns.

        Returns:
            (..., elements), or None if x has another shape.
        """
        shape = self.piece.length, self.width
        # A caller may ask with the update or the weight (m', n'), but also with a thin tensor such as R.
        if tuple(x.shape[-2:]) != (shape[::-1] if self.side == -1 else shape):
            return None
        return (x.mT if self.side == -1 else x).reshape(*x.shape[:-2], -1)[..., self._own]

    def add_edges_(self, rows: Tensor, x: Tensor) -> None:
        """Write the local elements of edge rows to their places.

        Args:
            rows: zeros (edges, width), which become the summand of this rank.
            x: (elements,), the gradient of the range.
        """
        # Indices count the elements of the whole matrix, row-major. The range is [begin, begin + elements).
        begin = self.piece.start * self.width + self.skipped
        for edge, row in zip(self.edges, rows, strict=True):
            first = max(edge * self.width, begin)
            last = max(first, min((edge + 1) * self.width, begin + self.elements))
            row[first - edge * self.width : last - edge * self.width] = x[first - begin : last - begin]

    @property
    def place(self) -> str:
        return f"{self.elements} of {self.piece.whole * self.width} elements"

    @property
    def _own(self) -> slice:
        """The place of the range in the touched rows, as one line of rows * width elements."""
        return slice(self.skipped, self.skipped + self.elements)

    @property
    def _partly(self) -> bool:
        """Whether the range has only a part of its first or last row."""
        return self.elements < self.piece.length * self.width


def cut_dimensions(shape: Shape) -> list[int]:
    """Return the dimensions of a state tensor of one matrix that are cut, counted from the last (-1)."""
    return [i - len(shape) for i, side in enumerate(shape) if isinstance(side, Side)]


def _narrowed(x: Tensor, shape: Shape, start: int, length: int) -> Tensor:
    """Return a view of `length` entries from `start` in each cut dimension of a state tensor with this shape."""
    for dim in cut_dimensions(shape):
        x = x.narrow(dim, start, length)
    return x


def complete_edges(gradients: Iterable[tuple[Layout, Tensor]], add_up: Callable[..., Tensor] = total) -> None:
    """Add up the edge rows of gradients over ranks and keep them in the layouts, for `enter_gradient`.

    The rows of all parameters share one all-reduce per group of processes, dtype and device. It sends at most one row
    per cut, where whole gradients would have all of theirs. All ranks call it.

    Args:
        gradients: the layout of each parameter with its local gradient. Only those with edges take part.
        add_up: returns the sum of a tensor over some peers.
    """
    same: dict[tuple[Any, ...], list[tuple[TouchedRows, Tensor]]] = {}
    for layout, x in gradients:
        if isinstance(layout, TouchedRows) and layout.edges:
            same.setdefault((layout.everyone, x.dtype, x.device), []).append((layout, x))
    for (peers, dtype, device), edged in same.items():
        # One buffer for all edge rows (edges, width) of all parameters, of which each rank fills its own elements.
        sizes = [len(rows.edges) * rows.width for rows, _ in edged]
        buffer = torch.zeros(sum(sizes), dtype=dtype, device=device)
        for (rows, x), part in zip(edged, torch.split(buffer, sizes), strict=True):
            rows.add_edges_(part.view(-1, rows.width), x)
        for (rows, _), part in zip(edged, torch.split(add_up(buffer, peers), sizes), strict=True):
            rows.completed[:] = [part.view(-1, rows.width)]
            rows.meter.between += part.nbytes
            rows.meter.messages_between += 1
