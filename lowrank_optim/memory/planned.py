"""Planned sharding: the bytes that one rank will hold and send.

They are counted by running the real step on the meta device, with layouts that record what they would send.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.fragments import complete_edges
from ..distributed.layout import HERE, Cut, Layout
from ..distributed.lockstep import Peers
from ..distributed.pieces import Piece
from ..distributed.placement import dimension
from ..distributed.shards import Meter, Shards, Traffic
from ..engine.grouping import Recipes
from ..engine.member import Member
from ..engine.update import update_
from ..optimizer import LowRankOptimizer
from ..recipe.algebra import WHOLE, Algebra
from ..recipe.plan import Plan
from ..recipe.recipe import Clock, Recipe, Refresh, State
from ..recipe.store import Shape
from ..recipe.turn import Turn
from ..recipe.weights import working_dtype


class Sent(NamedTuple):
    """The bytes that one rank hands to collectives.

    Attributes:
        per_step: bytes in a step without a refresh.
        per_refresh: additional bytes of a refresh, other than the first, which has no basis to start from. None where
            it depends on the gradients.
        messages, refresh_messages: consecutive collectives, for the matrix that needs most of them. Sums of other
            matrices are sent together with these.
    """

    per_step: float
    per_refresh: float | None
    messages: int = 0
    refresh_messages: int = 0


NOBODY = Peers(cast(Any, None), "meta")  # a group to which nothing is sent


class Tally(Traffic):
    """Traffic that records what would be sent, and sends nothing.

    Attributes:
        unknown: whether an operation was requested whose cost depends on values.
    """

    unknown = False

    def total(self, x: Tensor, peers: Peers, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        self.note(x)
        return x


class Counting(Shards):
    """Shards of tensors without values. It counts the work that accelerators do for any values."""

    def numbers(self, x: Tensor) -> list[Any]:
        # The values are made up: nonzero, as gradients are; as an order of heads, any values cost the same.
        return torch.ones(x.shape, dtype=x.dtype, device="cpu").tolist()

    def leading(self, g: Tensor, rank: int) -> Tensor:
        # The number of passes depends on the values, so the traffic of a refresh is unknown.
        cast(Tally, self.traffic).unknown = True
        return g.new_empty(g.shape[-2], rank)


@dataclass(frozen=True)
class _Unlearning(Refresh):
    """A schedule that ignores the outcome of turns, because tensors on the meta device have no values.

    Everything but the learning is delegated to `schedule`.
    """

    schedule: Refresh

    @property
    def restarts(self) -> bool:
        return self.schedule.restarts

    @property
    def turns(self) -> bool:
        return self.schedule.turns

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        return self.schedule.entrywise

    def counters(self) -> dict[str, Tensor]:
        return self.schedule.counters()

    def due(self, step: int, last: int, place: int, counters: Mapping[str, Tensor]) -> bool:
        return self.schedule.due(step, last, place, counters)

    def carry_(self, algebra: Algebra, recipe: Recipe, st: State, turn: Turn, t: Clock) -> None:
        self.schedule.carry_(algebra, recipe, st, turn, t)


@dataclass(frozen=True, eq=False)
class Planned(Cut):
    """A `Cut` of a tensor on the meta device along its first dimension, without a mesh.

    Attributes:
        shape: the shape of the whole parameter.
    """

    shape: Shape = ()

    def here(self, x: Tensor) -> Tensor:
        """Return the local rows of a whole tensor; other tensors are local already."""
        (piece,) = self.pieces.values()
        return x[piece.start : piece.start + piece.length] if tuple(x.shape) == self.shape else x

    def here_all(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: self.here(x) for key, x in state.items()}

    def _shards(self, sides: Mapping[int, Piece], meters: Sequence[Meter]) -> Algebra:
        return Counting(sides, self.both, Tally(meters))

    def _distributed(self, x: Tensor, shape: Shape, cut: Mapping[int, int]) -> Tensor:
        return x


def rows(plan: Plan, start: int, stop: int, world_size: int) -> Layout:
    """Return the layout of a rank that has rows `start` to `stop` of a parameter's first dimension."""
    if not plan.shape or (start, stop) == (0, plan.shape[0]):
        return HERE
    side, length = dimension(plan, 0), stop - start
    piece = Piece(plan.shape[0], start, length, length, 0, world_size, NOBODY)
    return Planned(None, (), {side: piece}, {side: 0}, len(plan.batch), NOBODY, shape=plan.shape)


def lay_out(optimizer: LowRankOptimizer, world_size: int) -> None:
    """Give every parameter the layout that `fully_shard` will give it on rank 0, which never holds less than others.

    Raises:
        NotImplementedError: what a sharded run will refuse.
    """
    for p, group in optimizer.table.members():
        plan = optimizer.table.plans[p]
        layout = rows(plan, 0, -(-plan.shape[0] // world_size) if plan.shape else 0, world_size)
        if layout.sharded:
            optimizer.table.admit_shard(plan, cast(Cut, layout), group)
        optimizer.table.layouts[p] = layout


def traffic(optimizer: LowRankOptimizer) -> Sent:
    """Return the traffic of all parameters, without the norms of gradients (16 bytes per sharded parameter)."""
    found: dict[tuple[Any, ...], Sent] = {}
    total: list[Sent] = []
    for p, group in optimizer.table.members():
        plan, layout = optimizer.table.plans[p], optimizer.table.layouts[p]
        if layout.sharded and p.requires_grad:
            equal = id(group), plan.shape, plan.side, plan.rank, p.dtype, layout.key
            if equal not in found:
                found[equal] = _of_one(optimizer, p, group, cast(Cut, layout))
            total.append(found[equal])
    refreshes = [sent.per_refresh for sent in total]
    return Sent(
        per_step=sum(sent.per_step for sent in total),
        per_refresh=None if None in refreshes else sum(cast(list[float], refreshes)),
        messages=max((sent.messages for sent in total), default=0),
        refresh_messages=max((sent.refresh_messages for sent in total), default=0),
    )


def _of_one(optimizer: LowRankOptimizer, p: Tensor, group: dict[str, Any], layout: Cut) -> Sent:
    """Return the traffic of one parameter, from three steps: the first refresh, no refresh, a later refresh."""
    if layout.algebra([layout]) is WHOLE:
        return Sent(0.0, 0.0)  # every process has whole matrices of a stack, and sends nothing
    layout = replace(layout, meter=Meter())
    state, unknown, meter = optimizer.table.fresh_state(p, group), False, layout.meter
    counts: list[Meter] = []

    def unlearning(plan: Plan, group: dict[str, Any]) -> Recipe:
        recipe = optimizer.table.recipe(plan, group)
        return replace(recipe, refresh=_Unlearning(recipe.refresh))

    for due in (True, False, True):
        if due and "refreshed_at" in state:
            # The mark of a matrix without a refresh makes it due whatever the schedule.
            state["refreshed_at"].fill_(-1)
        member = Member(p, group, torch.empty_like(p), False, optimizer.table.plans[p], layout, state)
        complete_edges([(layout, member.grad)], add_up=lambda x, _: x)
        for chunk in optimizer.stepper.chunks([member], Recipes(unlearning)):
            update_(chunk, chunk.algebra)
            unknown = cast(Tally, cast(Counting, chunk.algebra).traffic).unknown
        state["step"] += 1
        counts.append(replace(meter))
    first, quiet, last = counts  # running totals, so differences of neighbors belong to one step
    return Sent(
        per_step=quiet.between - first.between,
        per_refresh=None if unknown else last.refreshing - quiet.refreshing,
        messages=quiet.messages_between - first.messages_between,
        refresh_messages=last.messages_refreshing - quiet.messages_refreshing,
    )


def projected_traffic(optimizer: LowRankOptimizer) -> Sent:
    """Return the traffic of `ddp_project`: coordinates of matrices whose recipe is thin, otherwise whole gradients."""
    per_step, whole = 0.0, 0.0
    for p, group in optimizer.table.members():
        if p.requires_grad:
            plan = optimizer.table.plans[p]
            recipe = optimizer.table.recipe(plan, group)
            size = p.numel() * p.element_size()
            whole += size
            if recipe.thin:
                coordinates = torch.Size(recipe.basis.coordinates(plan.matrix, plan.rank or 0)).numel()
                size = plan.count * coordinates * working_dtype(p).itemsize
            per_step += size
    return Sent(per_step, whole - per_step)
