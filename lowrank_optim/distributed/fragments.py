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
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..recipe.algebra import Algebra
from ..recipe.plan import Plan
from ..recipe.store import Shape, Side
from .deepspeed import Range
from .layout import Cut, Layout
from .lockstep import Peers, total
from .overlapping import Overlapping
from .pieces import Piece
from .shards import Traffic


class Seat(NamedTuple):
    """The position of this process among the processes that share a flat tensor.

    Attributes:
        place: its rank in their group.
        world: the size of the group.
        peers: the group and its device.
    """

    place: int
    world: int
    peers: Peers


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


def fragments(
    ranges: Sequence[Range],
    plans: Sequence[Plan],
    elementwise: Sequence[bool],
    keys: Sequence[str],
    device: torch.device,
) -> Iterator[Fragment]:
    """Yield the fragments of one flat tensor, in an order that all ranks share. All ranks call it.

    Args:
        ranges: the local range of each parameter of the flat tensor's group.
        plans, elementwise, keys: of each parameter, see `cut`.
        device: of the flat tensor.
    """
    # Each process group is asked once for its peers and for the position of this process.
    groups = {own.group: peers_in(own.group, device) for own in ranges}
    seats = {group: Seat(dist.get_rank(group), dist.get_world_size(group), peers) for group, peers in groups.items()}
    yield from cut(ranges, _everywhere(ranges, device), [seats[own.group] for own in ranges], plans, elementwise, keys)


def cut(
    ranges: Sequence[Range],
    everywhere: Sequence[list[tuple[int, int]]],
    seats: Sequence[Seat],
    plans: Sequence[Plan],
    elementwise: Sequence[bool],
    keys: Sequence[str],
) -> Iterator[Fragment]:
    """Yield the fragments of one flat tensor, given the ranges of all ranks. It communicates nothing.

    Args:
        ranges: the local range of each parameter.
        everywhere: for each parameter, (start, length) of its range on every rank.
        seats: for each parameter, the position of this process.
        plans: of the parameters.
        elementwise: for each parameter, whether its rule looks at no shape.
        keys: of the state of each parameter.
    """
    for own, all_, seat, plan, flat, key in zip(ranges, everywhere, seats, plans, elementwise, keys, strict=True):
        size = math.prod(plan.shape)
        whole = any(length == size for _, length in all_)
        if whole:
            # A single rank has all of it and works alone; the others have no fragment of it.
            if own.length:
                yield Fragment(key, plan, Inside(plan.shape), own.offset, own.length)
        elif flat or len(plan.matrix) == 1:
            yield Fragment(key, replace(plan, batch=()), _stretch(own, all_, size, seat), own.offset, own.length)
        elif plan.batch:
            yield from _of_stack(own, all_, plan, key, seat)
        else:
            # Also with an empty local range: this rank takes part in the sums over ranks.
            yield Fragment(key, plan, _rows(own, all_, plan, seat), own.offset, own.length)


def _of_stack(own: Range, all_: list[tuple[int, int]], plan: Plan, key: str, seat: Seat) -> Iterator[Fragment]:
    """Yield a fragment for each matrix of a stack: the whole matrix, or the rows that the local range touches."""
    # `among` keeps the size of the whole stack, which decides how state is stored, for each of its matrices.
    size = math.prod(plan.matrix)
    part = replace(plan, shape=plan.shape[-2:], batch=(), among=plan.count)
    for number in range(plan.count):
        # The local range, and the ranges of all ranks, cut down to this matrix and counted from its first element.
        here, *there = (_within(start, length, number * size, size) for start, length in [own[1:3], *all_])
        local = own._replace(start=here[0], length=here[1], offset=own.offset + max(0, number * size - own.start))
        if any(length == size for _, length in there):
            if local.length:
                yield Fragment(f"{key}.{number}", part, Inside(part.shape, number), local.offset, local.length, number)
        else:
            layout = replace(_rows(local, there, part, seat), index=number)
            yield Fragment(f"{key}.{number}", part, layout, local.offset, local.length, number)


def _within(start: int, length: int, first: int, size: int) -> tuple[int, int]:
    """Return (start, length) of the overlap of two ranges, counted from the start of the second.

    The ranges begin at `start` and `first` and have `length` and `size` elements. Without an overlap it is (0, 0).
    """
    begin, end = max(start, first), min(start + length, first + size)
    return (begin - first, end - begin) if end > begin else (0, 0)


def _stretch(own: Range, all_: list[tuple[int, int]], size: int, seat: Seat) -> Stretch:
    """Return the layout of a flat range of a parameter with `size` elements; `all_`: the ranges of all ranks."""
    piece = Piece(size, own.start, own.length, max(length for _, length in all_), *seat)
    return Stretch(pieces={-1: piece}, natural={-1: 0}, everyone=piece.peers)


def _rows(own: Range, all_: list[tuple[int, int]], plan: Plan, seat: Seat) -> TouchedRows:
    """Return the layout of the rows of one matrix that the local range touches; `all_`: the ranges of all ranks."""
    height, width = plan.matrix[::-1] if plan.side == "right" else plan.matrix
    # Local rows include those that are shared. The piece of a rank with an empty range is empty as well.
    touched = [_touched(start, length, width) for start, length in all_]
    start, stop = _touched(own.start, own.length, width)
    piece = Piece(height, start, stop - start, max(b - a for a, b in touched), *seat)
    side = -1 if plan.side == "right" else -2
    # A row is an edge if the range of any rank begins inside it.
    return TouchedRows(
        pieces={side: piece}, natural={side: 0}, everyone=piece.peers, width=width,
        skipped=own.start % width if own.length else 0, elements=own.length,
        edges=tuple(sorted({start // width for start, length in all_ if length and start % width})),
    )  # fmt: skip


def _touched(start: int, length: int, width: int) -> tuple[int, int]:
    """Return (first, last + 1) of the rows of `width` elements that a range touches."""
    first = start // width
    return first, -(-(start + length) // width) if length else first


def peers_in(group: dist.ProcessGroup, device: torch.device) -> Peers:
    """Return the peers of a group that share flat tensors on `device`."""
    # NCCL adds up on GPUs only. Where flat tensors are offloaded to the CPU, the sums are therefore still on the GPU.
    return Peers(group, "cuda" if dist.get_backend(group) == "nccl" else device.type)


def _everywhere(ranges: Sequence[Range], device: torch.device) -> list[list[tuple[int, int]]]:
    """Return, for each parameter, (start, length) of its range on every rank of its group. All ranks call it."""
    found: dict[int, list[tuple[int, int]]] = {}
    for group in dict.fromkeys(entry.group for entry in ranges):
        # One all-gather per group: (parameters, 2) from each rank becomes (ranks, parameters, 2).
        same = [i for i, entry in enumerate(ranges) if entry.group is group]
        own = torch.tensor([ranges[i][1:3] for i in same], device=peers_in(group, device).device)
        everyone = own.new_empty(dist.get_world_size(group), *own.shape)
        dist.all_gather(list(everyone.unbind(0)), own, group=group)
        for i, numbers in zip(same, everyone.unbind(1), strict=True):
            found[i] = [(int(start), int(length)) for start, length in numbers.tolist()]
    return [found[i] for i in range(len(ranges))]
