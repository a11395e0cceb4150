"""What DeepSpeed ZeRO will give one rank, planned on the meta device with the fragments that a run will have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..optimizer import LowRankOptimizer
from .algebra import Algebra
from .deepspeed import Range
from .fragments import Fragment, Overlapping, Rows, Seat, Stretch, cut
from .layout import Layout
from .pieces import Piece
from .planned import NOBODY, Counting, Tally
from .shards import Meter

_EVEN = 2  # DeepSpeed pads the flat tensor of a group so that the part of every rank has an even number of elements


class _CountingRows(Counting, Overlapping):
    """Counts what rows would send that others have as well."""


class _PlannedRows(Rows):
    @property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return *self.pieces.items(), self.skipped, self.elements, self.edges

    def algebra(self, layouts: Sequence[Layout]) -> Algebra:
        return _CountingRows(self.pieces, None, Tally([self.meter]), int(self.skipped > 0), self)


class _PlannedStretch(Stretch):
    @property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return tuple(self.pieces.items())

    def _shards(self, sides: Mapping[int, Piece], meters: Sequence[Meter]) -> Algebra:
        return Counting(sides, self.both, Tally(meters))


_PLANNED: dict[type[Layout], type[Layout]] = {Rows: _PlannedRows, Stretch: _PlannedStretch}


def rank_by_rank(optimizer: LowRankOptimizer, stage: int, world_size: int) -> Iterator[None]:
    """Puts flat tensors in the place of parameters, as they are on each rank in turn.

    Raises:
        NotImplementedError: what is raised there of a matrix that is cut.
    """
    groups = [(group, list(group["params"])) for group in optimizer.param_groups]
    for rank in range(world_size):
        optimizer._stand_ins = optimizer._stand_ins.again()
        for group, params in groups:
            flat = torch.empty(sum(p.numel() for p in params), device="meta")
            group["params"] = [flat]
            pieces = _fragments(optimizer, group, params, stage, rank, world_size)
            optimizer._stand_ins.hold(flat, [_planned(one) for one in pieces], group)
            for piece in optimizer._stand_ins.pieces[flat]:
                piece.requires_grad_()
        yield


def _fragments(
    optimizer: LowRankOptimizer, group: dict[str, Any], params: list[Tensor], stage: int, rank: int, world_size: int
) -> Iterator[Fragment]:
    everywhere = list(_cuts(params, stage, world_size))
    found, offset = [], 0
    for p, there in zip(params, everywhere, strict=True):
        found.append(Range(p, *there[rank], offset, None))
        offset += there[rank][1]
    seats = [Seat(rank, world_size, NOBODY)] * len(params)
    return cut(found, everywhere, seats, *optimizer._stand_ins.known(params, group))


def _cuts(params: list[Tensor], stage: int, world_size: int) -> Iterator[list[tuple[int, int]]]:
    """(start, length) of each parameter of a group on all ranks.

    Stage 3 cuts every parameter into equal parts; stages 1 and 2 cut the group, put in a row, so that most parameters
    are whole on one rank.
    """
    part, before = -(-sum(p.numel() for p in params) // (_EVEN * world_size)) * _EVEN, 0
    for p in params:
        share, first = (-(-p.numel() // world_size), 0) if stage == 3 else (part, before)
        edges = [min(max(0, rank * share - first), p.numel()) for rank in range(world_size + 1)]
        yield [(start, stop - start) for start, stop in itertools.pairwise(edges)]
        before += p.numel()


def _planned(one: Fragment) -> Fragment:
    """With a layout that counts and sends nothing."""
    kind = _PLANNED.get(type(one.layout))
    return one if kind is None else one._replace(layout=cast(Any, kind)(**vars(one.layout)))
