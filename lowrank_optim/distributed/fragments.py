"""Parameters of which a flat tensor holds a range of elements, as under ZeRO.

Cuts fall anywhere, also within a row. The rows of a matrix that a range touches are worked on whole: once per step all
ranks add up the few rows of gradients that are cut, and from then on each rank has some rows of the matrix, those at
its borders as well as its neighbours. Both update them alike, each writes the elements that are its own, and sums over
ranks count every row once, where its first element is. What is elementwise needs no rows, and is left flat.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..kept import Shape, Side
from ..plan import Plan
from .algebra import Algebra
from .deepspeed import Range
from .layout import Cut, Layout
from .shards import Shards


class Fragment(NamedTuple):
    """A piece of a parameter that is updated by itself.

    Args:
        key: of its state.
        offset, length: of its elements in the flat tensor.
    """

    key: str
    plan: Plan
    layout: Layout
    offset: int
    length: int


@dataclass(frozen=True, eq=False)
class Inside(Layout):
    """All elements are in one flat tensor, that of this process.

    Attributes:
        shape: of the parameter.
        first: its number, where it is a matrix of a stack that is cut elsewhere.
    """

    shape: Shape
    first: int = 0

    @property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.first,)

    def enter(self, x: Tensor) -> Tensor:
        return x.view(self.shape)

    @property
    def place(self) -> str:
        return "whole"


@dataclass(frozen=True, eq=False, kw_only=True)
class _Fragment(Cut):
    mesh: Any = None
    placements: tuple[Any, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (id(self),)

    def zeros(self, batch: Shape, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        return torch.zeros(batch + tuple(map(int, self._shape_here(shape))), dtype=dtype, device=device)


@dataclass(frozen=True, eq=False)
class Stretch(_Fragment):
    """Some elements of a parameter whose shape the rule does not look at."""

    def plan(self, plan: Plan) -> Plan:
        return replace(plan, shape=(self.length,), batch=(), matrix=(self.length,))

    def matrix(self, plan: Plan) -> Shape:
        return (Side(self.whole, -1),)

    def weight(self, plan: Plan) -> Shape:
        return self._shape_here(self.matrix(plan))

    @property
    def place(self) -> str:
        return f"{self.length} of {self.whole} elements"


@dataclass(frozen=True, eq=False)
class Rows(_Fragment):
    """The rows that a range of elements touches.

    Attributes:
        width: elements of a row.
        skipped: elements before the range in its first row.
        elements: of the range.
        edges: numbers of the rows that are cut, anywhere.
        first: its number, where it is a matrix of a stack.
        completed: those rows of the gradient of this step.
    """

    width: int = 0
    skipped: int = 0
    elements: int = 0
    edges: tuple[int, ...] = ()
    first: int = 0
    completed: list[Tensor] = field(default_factory=list)

    def enter(self, x: Tensor) -> Tensor:
        """The elements within whole rows, zero where others have them."""
        if self.elements < self.length * self.width:
            rows = x.new_zeros(self.length * self.width)
            rows[self.skipped : self.skipped + self.elements] = x
            x = rows
        return x.view(self.length, self.width)

    def enter_gradient(self, x: Tensor) -> Tensor:
        rows = self.enter(x)
        for edge, row in zip(self.edges, self.completed.pop() if self.edges else (), strict=True):
            if self.start <= edge < self.start + self.length:
                rows[edge - self.start] = row
        return rows

    def leave_(self, p: Tensor, rows: Tensor) -> None:
        if self.elements < self.length * self.width:
            p.copy_(rows.view(-1)[self.skipped : self.skipped + self.elements])

    def plan(self, plan: Plan) -> Plan:
        here = super().plan(plan)
        return replace(here, shape=(self.length, self.width))

    def algebra(self, layouts: Sequence[Layout]) -> Algebra:
        return Overlapping(self)

    def add_edges_(self, rows: Tensor, x: Tensor) -> None:
        """Adds what is here of the rows that are cut, to zeros `(edges, width)`; `x` are the elements of the range."""
        begin = self.start * self.width + self.skipped
        for edge, row in zip(self.edges, rows, strict=True):
            first = max(edge * self.width, begin)
            last = max(first, min((edge + 1) * self.width, begin + self.elements))
            row[first - edge * self.width : last - edge * self.width] = x[first - begin : last - begin]

    @property
    def place(self) -> str:
        return f"{self.elements} of {self.whole * self.width} elements"


class Overlapping(Shards):
    """Shards whose first row may also be the last of another: sums leave out a row that does not begin here."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows.cut, rows.whole, rows.start, rows.length, rows.group, [rows.meter])
        self.rows, self.twice = rows, int(rows.skipped > 0)

    def project(self, basis: Tensor, g: Tensor) -> Tensor:
        return super().project(self._once(basis, -2, -2), self._once(g, -2, -2))

    def sketch(self, g: Tensor, thin: Tensor) -> Tensor:
        return super().sketch(self._once(g, -1, -1), self._once(thin, -1, -2))

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return super().inner(self._once(x, -1, -1), self._once(y, -1, -2))

    def size(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self._shape_of_rows():
            return super().size(x)
        # Here x may be the weight, of which this process has the elements of its own range and no others.
        flat = (x.mT if self.cut == -1 else x).reshape(*x.shape[:-2], -1)
        own = flat[..., self.rows.skipped : self.rows.skipped + self.rows.elements].double()
        total = self._completed(own.square().sum(-1)[..., None, None], True)
        return (total / (self.whole * self.rows.width)).sqrt().to(x.dtype)

    def energy(self, x: Tensor, dim: int, power: int = 2) -> Tensor:
        return super().energy(self._once(x, dim, dim), dim, power)

    def norm(self, x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        return super().norm(self._counted(x, dim), dim)

    def mean(self, x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        return super().mean(self._counted(x, dim), dim)

    def _gram(self, y: Tensor) -> Tensor:
        return super()._gram(self._once(y, self.cut, -2))

    def _angle(self, old: Tensor, new: Tensor) -> Tensor:
        squares = self._once(new - old @ self.project(old, new), -2, -2).double().square().sum()
        return self._completed(squares, self.cut == -2).sqrt()

    def _joined(self, y: Tensor) -> Tensor:
        rows = y.new_zeros(self.whole, y.shape[-1])
        rows[self.start + self.twice : self.start + self.length] = y[self.twice :]
        return self._completed(rows, True)

    def _counted(self, x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        return self._once(x, self.cut, self.cut) if self.cut in ((dim,) if isinstance(dim, int) else dim) else x

    def _once(self, x: Tensor, side: int, dim: int) -> Tensor:
        """Without the row that is counted elsewhere, if dimension `dim` of x is that side of the matrix, and cut."""
        return x.narrow(dim, self.twice, x.shape[dim] - self.twice) if self.twice and side == self.cut else x

    def _shape_of_rows(self) -> tuple[int, int]:
        shape = self.length, self.rows.width
        return shape[::-1] if self.cut == -1 else shape


def complete_edges(gradients: Iterable[tuple[Layout, Tensor]]) -> None:
    """Adds up the rows of gradients that are cut, of all parameters in one all-reduce per group of processes.

    What travels is at most a row per cut, where whole gradients would have all of them.
    """
    same: dict[tuple[Any, ...], list[tuple[Rows, Tensor]]] = {}
    for layout, x in gradients:
        if isinstance(layout, Rows) and layout.edges:
            same.setdefault((layout.group, x.dtype, x.device), []).append((layout, x))
    for (group, dtype, device), some in same.items():
        sizes = [len(rows.edges) * rows.width for rows, _ in some]
        buffer = torch.zeros(sum(sizes), dtype=dtype, device=device)
        parts = [part.view(-1, rows.width) for (rows, _), part in zip(some, torch.split(buffer, sizes), strict=True)]
        for (rows, x), part in zip(some, parts, strict=True):
            rows.add_edges_(part, x)
        dist.all_reduce(buffer, group=group)
        for (rows, _), part in zip(some, parts, strict=True):
            rows.completed[:] = [part]
            rows.meter.between += part.nbytes


def fragments(
    ranges: Sequence[Range],
    plans: Sequence[Plan],
    elementwise: Sequence[bool],
    keys: Sequence[str],
    device: torch.device,
) -> Iterator[Fragment]:
    """The fragments of one flat tensor, in an order that all ranks share. All ranks call it.

    Args:
        elementwise: rules that look at no shape.
    """
    everywhere = _everywhere(ranges, device)
    for one, there, plan, flat, key in zip(ranges, everywhere, plans, elementwise, keys, strict=True):
        size = math.prod(plan.shape)
        whole = any(length == size for _, length in there)
        if whole:
            if one.length:
                yield Fragment(key, plan, Inside(plan.shape), one.offset, one.length)
        elif flat or len(plan.matrix) == 1:
            layout = Stretch(group=one.group, cut=-1, natural=0, whole=size, start=one.start, length=one.length)
            yield Fragment(key, replace(plan, batch=()), layout, one.offset, one.length)
        elif plan.batch:
            yield from _of_stack(one, there, plan, key)
        else:
            yield Fragment(key, plan, _rows(one, there, plan), one.offset, one.length)


def _of_stack(one: Range, there: list[tuple[int, int]], plan: Plan, key: str) -> Iterator[Fragment]:
    """Each matrix of a stack, in one place or cut as a matrix is."""
    size = math.prod(plan.matrix)
    part = replace(plan, shape=plan.shape[-2:], batch=())
    for number in range(plan.count):
        here, *all_ = (_within(start, length, number * size, size) for start, length in [one[1:3], *there])
        own = one._replace(start=here[0], length=here[1], offset=one.offset + max(0, number * size - one.start))
        if any(length == size for _, length in all_):
            if own.length:
                yield Fragment(f"{key}.{number}", part, Inside(part.shape, number), own.offset, own.length)
        else:
            layout = replace(_rows(own, all_, part), first=number)
            yield Fragment(f"{key}.{number}", part, layout, own.offset, own.length)


def _within(start: int, length: int, first: int, size: int) -> tuple[int, int]:
    """(start, length) of a range within another one that begins at `first`, counted from there."""
    begin, end = max(start, first), min(start + length, first + size)
    return (begin - first, end - begin) if end > begin else (0, 0)


def _rows(one: Range, there: list[tuple[int, int]], plan: Plan) -> Rows:
    height, width = plan.matrix[::-1] if plan.side == "right" else plan.matrix
    edges = sorted({start // width for start, length in there if length and start % width})
    start, stop = one.start // width, -(-(one.start + one.length) // width) if one.length else one.start // width
    return Rows(
        group=one.group, cut=-1 if plan.side == "right" else -2, natural=0, whole=height, start=start,
        length=stop - start, width=width, skipped=one.start % width if one.length else 0, elements=one.length,
        edges=tuple(edges),
    )  # fmt: skip


def _everywhere(ranges: Sequence[Range], device: torch.device) -> list[list[tuple[int, int]]]:
    """(start, length) of each parameter on all ranks of its group."""
    found: dict[int, list[tuple[int, int]]] = {}
    for group in dict.fromkeys(one.group for one in ranges):
        same = [i for i, one in enumerate(ranges) if one.group is group]
        own = torch.tensor([ranges[i][1:3] for i in same], device=device)
        everyone = own.new_empty(dist.get_world_size(group), *own.shape)
        dist.all_gather(list(everyone.unbind(0)), own, group=group)
        for i, numbers in zip(same, everyone.unbind(1), strict=True):
            found[i] = [(int(start), int(length)) for start, length in numbers.tolist()]
    return [found[i] for i in range(len(ranges))]
