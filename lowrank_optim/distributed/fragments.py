"""Parameters of which a flat tensor holds a range of elements, as under ZeRO.

Cuts fall anywhere, also within a row. The rows of a matrix that a range touches are worked on whole: once per step all
ranks add up the few rows of gradients that are cut, and from then on each rank has some rows of the matrix, those at
its borders as well as its neighbours. Both update them alike, each writes the elements that are its own, and sums over
ranks count every row once, where its first element is. What is elementwise needs no rows, and is left flat.
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
    """The number of this process among those who have parts of a parameter, how many they are, and they."""

    place: int
    world: int
    peers: Peers


class Fragment(NamedTuple):
    """A piece of a parameter that is updated by itself.

    Args:
        key: of its state.
        offset, length: of its elements in the flat tensor.
        matrix: its number, if it is one of a stack, or a part of one.
    """

    key: str
    plan: Plan
    layout: Layout
    offset: int
    length: int
    matrix: int | None = None


@dataclass(frozen=True, eq=False)
class Inside(Layout):
    """All elements are in one flat tensor, that of this process.

    Attributes:
        shape: of the parameter.
        index: its number, where it is a matrix of a stack that is cut elsewhere.
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
    """Here is a piece of the one side that is cut."""

    mesh: Any = None
    placements: tuple[Any, ...] = ()
    rows: int = 0

    @property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (id(self),)

    @property
    def side(self) -> int:
        return next(iter(self.pieces))

    @property
    def piece(self) -> Piece:
        return self.pieces[self.side]

    @property
    def twice(self) -> int:
        """Rows at the beginning that another process has as well, and counts: 0 or 1."""
        return 0

    def zeros(self, batch: Shape, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        return torch.zeros(batch + tuple(map(int, self._shape_here(shape))), dtype=dtype, device=device)

    def within(self, whole: Tensor, shape: Shape) -> Tensor:
        return _narrowed(whole, shape, self.piece.start, self.piece.length)

    def once(self, x: Tensor, shape: Shape) -> Tensor | None:
        if not cut_dimensions(shape):
            return None if self.piece.place else x
        return _narrowed(x, shape, self.twice, self.piece.length - self.twice)

    def border(self, x: Tensor, shape: Shape) -> Tensor | None:
        return _narrowed(x, shape, 0, 1) if self.twice and cut_dimensions(shape) else None


@dataclass(frozen=True, eq=False, kw_only=True)
class Stretch(_Fragment):
    """Some elements of a parameter whose shape the rule does not look at."""

    def plan(self, plan: Plan) -> Plan:
        return replace(plan, shape=(self.piece.length,), batch=(), matrix=(self.piece.length,))

    def most(self, plan: Plan) -> int:
        return self.piece.most

    def matrix(self, plan: Plan) -> Shape:
        return (Side(self.piece.whole, -1),)

    def weight(self, plan: Plan) -> Shape:
        return self._shape_here(self.matrix(plan))

    def within(self, whole: Tensor, shape: Shape) -> Tensor:
        return super().within(whole.reshape(-1) if cut_dimensions(shape) else whole, shape)

    @property
    def place(self) -> str:
        return f"{self.piece.length} of {self.piece.whole} elements"


@dataclass(frozen=True, eq=False, kw_only=True)
class TouchedRows(_Fragment):
    """The rows that a range of elements touches.

    Attributes:
        width: elements of a row.
        skipped: elements before the range in its first row.
        elements: of the range.
        edges: numbers of the rows that are cut, anywhere.
        index: its number, where it is a matrix of a stack.
        completed: those rows of the gradient of this step.
    """

    width: int
    skipped: int
    elements: int
    edges: tuple[int, ...] = ()
    index: int = 0
    completed: list[Tensor] = field(default_factory=list)

    def enter(self, x: Tensor) -> Tensor:
        """The elements within whole rows, zero where others have them."""
        if self._partly:
            rows = x.new_zeros(self.piece.length * self.width)
            rows[self._own] = x
            x = rows
        return x.view(self.piece.length, self.width)

    def enter_gradient(self, x: Tensor) -> Tensor:
        rows = self.enter(x)
        for edge, row in zip(self.edges, self.completed.pop() if self.edges else (), strict=True):
            if self.piece.start <= edge < self.piece.start + self.piece.length:
                rows[edge - self.piece.start] = row
        return rows

    def leave_(self, p: Tensor, rows: Tensor) -> None:
        if self._partly:
            p.copy_(rows.view(-1)[self._own])

    def first(self, plan: Plan) -> int:
        return self.index

    @property
    def twice(self) -> int:
        return int(self.skipped > 0)

    @property
    def begin(self) -> int:
        return self.piece.start * self.width + self.skipped

    def plan(self, plan: Plan) -> Plan:
        return replace(super().plan(plan), shape=(self.piece.length, self.width))

    def algebra(self, layouts: Sequence[Layout]) -> Algebra:
        return Overlapping(self.pieces, None, Traffic([self.meter]), self.twice, self.own)

    def own(self, x: Tensor) -> Tensor | None:
        """The elements of the range, of something like the matrix; None if x is nothing like it."""
        shape = self.piece.length, self.width
        if tuple(x.shape[-2:]) != (shape[::-1] if self.side == -1 else shape):
            return None
        return (x.mT if self.side == -1 else x).reshape(*x.shape[:-2], -1)[..., self._own]

    def add_edges_(self, rows: Tensor, x: Tensor) -> None:
        """Adds what is here of the rows that are cut, to zeros `(edges, width)`; `x` are the elements of the range."""
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
        return slice(self.skipped, self.skipped + self.elements)

    @property
    def _partly(self) -> bool:
        """Of some row only a part is here."""
        return self.elements < self.piece.length * self.width


def cut_dimensions(shape: Shape) -> list[int]:
    """Which dimension of state of one matrix is cut, if any is; counted from the last."""
    return [i - len(shape) for i, side in enumerate(shape) if isinstance(side, Side)]


def _narrowed(x: Tensor, shape: Shape, start: int, length: int) -> Tensor:
    for dim in cut_dimensions(shape):
        x = x.narrow(dim, start, length)
    return x


def complete_edges(gradients: Iterable[tuple[Layout, Tensor]], add_up: Callable[..., Tensor] = total) -> None:
    """Adds up the rows of gradients that are cut, of all parameters in one all-reduce per group of processes.

    What travels is at most a row per cut, where whole gradients would have all of them.

    Args:
        add_up: the sum of a tensor over some peers.
    """
    same: dict[tuple[Any, ...], list[tuple[TouchedRows, Tensor]]] = {}
    for layout, x in gradients:
        if isinstance(layout, TouchedRows) and layout.edges:
            same.setdefault((layout.everyone, x.dtype, x.device), []).append((layout, x))
    for (peers, dtype, device), some in same.items():
        sizes = [len(rows.edges) * rows.width for rows, _ in some]
        buffer = torch.zeros(sum(sizes), dtype=dtype, device=device)
        for (rows, x), part in zip(some, torch.split(buffer, sizes), strict=True):
            rows.add_edges_(part.view(-1, rows.width), x)
        for (rows, _), part in zip(some, torch.split(add_up(buffer, peers), sizes), strict=True):
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
    """The fragments of one flat tensor, in an order that all ranks share. All ranks call it."""
    groups = {one.group: peers_in(one.group, device) for one in ranges}
    seats = {group: Seat(dist.get_rank(group), dist.get_world_size(group), peers) for group, peers in groups.items()}
    yield from cut(ranges, _everywhere(ranges, device), [seats[one.group] for one in ranges], plans, elementwise, keys)


def cut(
    ranges: Sequence[Range],
    everywhere: Sequence[list[tuple[int, int]]],
    seats: Sequence[Seat],
    plans: Sequence[Plan],
    elementwise: Sequence[bool],
    keys: Sequence[str],
) -> Iterator[Fragment]:
    """The same, where it is known what all ranks have.

    Args:
        everywhere: (start, length) of each parameter on all ranks.
        elementwise: rules that look at no shape.
    """
    for one, there, seat, plan, flat, key in zip(ranges, everywhere, seats, plans, elementwise, keys, strict=True):
        size = math.prod(plan.shape)
        whole = any(length == size for _, length in there)
        if whole:
            if one.length:
                yield Fragment(key, plan, Inside(plan.shape), one.offset, one.length)
        elif flat or len(plan.matrix) == 1:
            yield Fragment(key, replace(plan, batch=()), _stretch(one, there, size, seat), one.offset, one.length)
        elif plan.batch:
            yield from _of_stack(one, there, plan, key, seat)
        else:
            yield Fragment(key, plan, _rows(one, there, plan, seat), one.offset, one.length)


def _of_stack(one: Range, there: list[tuple[int, int]], plan: Plan, key: str, seat: Seat) -> Iterator[Fragment]:
    """Each matrix of a stack, in one place or cut as a matrix is."""
    size = math.prod(plan.matrix)
    part = replace(plan, shape=plan.shape[-2:], batch=(), among=plan.count)
    for number in range(plan.count):
        here, *all_ = (_within(start, length, number * size, size) for start, length in [one[1:3], *there])
        own = one._replace(start=here[0], length=here[1], offset=one.offset + max(0, number * size - one.start))
        if any(length == size for _, length in all_):
            if own.length:
                yield Fragment(f"{key}.{number}", part, Inside(part.shape, number), own.offset, own.length, number)
        else:
            layout = replace(_rows(own, all_, part, seat), index=number)
            yield Fragment(f"{key}.{number}", part, layout, own.offset, own.length, number)


def _within(start: int, length: int, first: int, size: int) -> tuple[int, int]:
    """(start, length) of a range within another one that begins at `first`, counted from there."""
    begin, end = max(start, first), min(start + length, first + size)
    return (begin - first, end - begin) if end > begin else (0, 0)


def _stretch(one: Range, there: list[tuple[int, int]], size: int, seat: Seat) -> Stretch:
    piece = Piece(size, one.start, one.length, max(length for _, length in there), *seat)
    return Stretch(pieces={-1: piece}, natural={-1: 0}, everyone=piece.peers)


def _rows(one: Range, there: list[tuple[int, int]], plan: Plan, seat: Seat) -> TouchedRows:
    height, width = plan.matrix[::-1] if plan.side == "right" else plan.matrix
    touched = [_touched(start, length, width) for start, length in there]
    start, stop = _touched(one.start, one.length, width)
    piece = Piece(height, start, stop - start, max(b - a for a, b in touched), *seat)
    side = -1 if plan.side == "right" else -2
    return TouchedRows(
        pieces={side: piece}, natural={side: 0}, everyone=piece.peers, width=width,
        skipped=one.start % width if one.length else 0, elements=one.length,
        edges=tuple(sorted({start // width for start, length in there if length and start % width})),
    )  # fmt: skip


def _touched(start: int, length: int, width: int) -> tuple[int, int]:
    """(first, last + 1) of the rows that a range touches."""
    first = start // width
    return first, -(-(start + length) // width) if length else first


def peers_in(group: dist.ProcessGroup, device: torch.device) -> Peers:
    """NCCL adds up on GPUs alone, also where flat tensors are offloaded."""
    return Peers(group, "cuda" if dist.get_backend(group) == "nccl" else device.type)


def _everywhere(ranges: Sequence[Range], device: torch.device) -> list[list[tuple[int, int]]]:
    """(start, length) of each parameter on all ranks of its group."""
    found: dict[int, list[tuple[int, int]]] = {}
    for group in dict.fromkeys(one.group for one in ranges):
        same = [i for i, one in enumerate(ranges) if one.group is group]
        own = torch.tensor([ranges[i][1:3] for i in same], device=peers_in(group, device).device)
        everyone = own.new_empty(dist.get_world_size(group), *own.shape)
        dist.all_gather(list(everyone.unbind(0)), own, group=group)
        for i, numbers in zip(same, everyone.unbind(1), strict=True):
            found[i] = [(int(start), int(length)) for start, length in numbers.tolist()]
    return [found[i] for i in range(len(ranges))]
