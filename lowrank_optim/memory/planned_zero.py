"""What DeepSpeed ZeRO will give one rank, planned on the meta device with the fragments that a run will have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..distributed.deepspeed import Range
from ..distributed.fragments import Fragment, Seat, Stretch, TouchedRows, cut
from ..distributed.layout import Layout
from ..distributed.overlapping import Overlapping
from ..distributed.pieces import Piece
from ..distributed.shards import Meter
from ..optimizer import LowRankOptimizer
from ..recipe.algebra import Algebra
from ..wrappers.adoption import flat_rules
from .planned import NOBODY, Counting, Tally

_EVEN = 2  # DeepSpeed pads the flat tensor of a group so that the part of every rank has an even number of elements


class _CountingRows(Counting, Overlapping):
    """Counts what rows would send that others have as well."""


class _PlannedRows(TouchedRows):
    @property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return *self.pieces.items(), self.skipped, self.elements, self.edges

    def algebra(self, layouts: Sequence[Layout]) -> Algebra:
        return _CountingRows(self.pieces, None, Tally([self.meter]), self.twice, self.own)


class _PlannedStretch(Stretch):
    @property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return tuple(self.pieces.items())

    def _shards(self, sides: Mapping[int, Piece], meters: Sequence[Meter]) -> Algebra:
        return Counting(sides, self.both, Tally(meters))


_PLANNED: dict[type[Layout], type[Layout]] = {TouchedRows: _PlannedRows, Stretch: _PlannedStretch}


def rank_by_rank(optimizer: LowRankOptimizer, stage: int, world_size: int) -> Iterator[None]:
    """Puts fragments in the place of parameters, those of each rank in turn.

    Raises:
        NotImplementedError: what is raised there of a matrix that is cut.
    """
    groups = [(group, list(group["params"])) for group in optimizer.param_groups]
    for rank in range(world_size):
        for group, params in groups:
            group["params"] = [
                _put(optimizer, one, group) for one in _cut(optimizer, params, group, stage, rank, world_size)
            ]
        yield


def _put(optimizer: LowRankOptimizer, one: Fragment, group: dict[str, Any]) -> Tensor:
    """A tensor that stands for a fragment, as `StandIns` has one, with a layout that counts and sends nothing."""
    kind, layout = _PLANNED.get(type(one.layout)), one.layout
    if kind is not None:
        layout = cast(Any, kind)(**vars(layout))
        optimizer.table.admit_shard(one.plan, layout, group)
    piece = nn.Parameter(torch.empty(one.length, device="meta"))
    optimizer.table.plans[piece], optimizer.table.layouts[piece] = one.plan, layout
    return piece


def _cut(
    optimizer: LowRankOptimizer, params: list[Tensor], group: dict[str, Any], stage: int, rank: int, world_size: int
) -> Iterator[Fragment]:
    plans = [optimizer.table.plans[p] for p in params]
    everywhere = list(_cuts(params, stage, world_size))
    found = [Range(p, *there[rank], 0, None) for p, there in zip(params, everywhere, strict=True)]
    seats = [Seat(rank, world_size, NOBODY)] * len(params)
    rules = flat_rules(optimizer.table, plans, group)
    return cut(found, everywhere, seats, plans, rules, [plan.name for plan in plans])


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
