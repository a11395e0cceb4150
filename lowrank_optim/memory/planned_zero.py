"""Planned DeepSpeed ZeRO: each rank's fragments, as a run will have them, on the meta device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..distributed.cutting import Seat, cut
from ..distributed.deepspeed import Range
from ..distributed.fragments import Fragment, Stretch, TouchedRows
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
    """Shards that count the traffic of rows of which neighboring ranks hold parts too."""


class _PlannedRows(TouchedRows):
    """Rows of a matrix in a flat tensor, whose algebra only counts."""

    @property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return *self.pieces.items(), self.skipped, self.elements, self.edges

    def algebra(self, layouts: Sequence[Layout]) -> Algebra:
        return _CountingRows(self.pieces, None, Tally([self.meter]), self.twice, self.own)


class _PlannedStretch(Stretch):
    """A stretch whose algebra only counts."""

    @property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return tuple(self.pieces.items())

    def _shards(self, sides: Mapping[int, Piece], meters: Sequence[Meter]) -> Algebra:
        return Counting(sides, self.both, Tally(meters))


_PLANNED: dict[type[Layout], type[Layout]] = {TouchedRows: _PlannedRows, Stretch: _PlannedStretch}


def rank_by_rank(optimizer: LowRankOptimizer, stage: int, world_size: int) -> Iterator[None]:
    """Replace the parameters of the optimizer by the fragments of rank 0, then of rank 1, and so on.

    Yields:
        None, once per rank, while the groups hold the fragments of that rank.

    Raises:
        NotImplementedError: what the run will refuse for a matrix that is cut.
    """
    groups = [(group, list(group["params"])) for group in optimizer.param_groups]
    for rank in range(world_size):
        for group, params in groups:
            group["params"] = [
                _put(optimizer, fragment, group) for fragment in _cut(optimizer, params, group, stage, rank, world_size)
            ]
        yield


def _put(optimizer: LowRankOptimizer, fragment: Fragment, group: dict[str, Any]) -> Tensor:
    """Enter a tensor that stands for a fragment into the table, with a layout that only counts; return the tensor."""
    kind, layout = _PLANNED.get(type(fragment.layout)), fragment.layout
    if kind is not None:
        layout = cast(Any, kind)(**vars(layout))
        optimizer.table.admit_shard(fragment.plan, layout, group)
    piece = nn.Parameter(torch.empty(fragment.length, device="meta"))
    optimizer.table.plans[piece], optimizer.table.layouts[piece] = fragment.plan, layout
    return piece


def _cut(
    optimizer: LowRankOptimizer, params: list[Tensor], group: dict[str, Any], stage: int, rank: int, world_size: int
) -> Iterator[Fragment]:
    """Yield the fragments of a group's parameters on one rank."""
    plans = [optimizer.table.plans[p] for p in params]
    everywhere = list(_cuts(params, stage, world_size))
    found = [Range(p, *on_ranks[rank], 0, None) for p, on_ranks in zip(params, everywhere, strict=True)]
    seats = [Seat(rank, world_size, NOBODY)] * len(params)
    rules = flat_rules(optimizer.table, plans, group)
    return cut(found, everywhere, seats, plans, rules, [plan.name for plan in plans])


def _cuts(params: list[Tensor], stage: int, world_size: int) -> Iterator[list[tuple[int, int]]]:
    """Yield, for each parameter of a group, its (start, length) on every rank.

    Stage 3 cuts every parameter into equal parts. Stages 1 and 2 concatenate the parameters of a group and cut the
    result into equal parts, so most parameters are whole on one rank.
    """
    part, before = -(-sum(p.numel() for p in params) // (_EVEN * world_size)) * _EVEN, 0
    for p in params:
        share, first = (-(-p.numel() // world_size), 0) if stage == 3 else (part, before)
        edges = [min(max(0, rank * share - first), p.numel()) for rank in range(world_size + 1)]
        yield [(start, stop - start) for start, stop in itertools.pairwise(edges)]
        before += p.numel()
