"""The loop of one step: decide once which parameters step together and on which path, keep that, and run it.

A step takes these stops: `optimizer.step` -> `Stepper.step` -> `in_place.py`, or a chunk (`chunk.py`) -> `update.move_`
-> the parts. Deciding is apart from doing: `grouping.works` decides, and is asked again only if the signature of the
members has changed (their dtypes, memory layouts, recipes, clocks, or which of them are due for a refresh).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch

from .. import checks
from ..distributed import checks as shard_checks
from ..distributed.fragments import complete_edges
from ..distributed.layout import HERE
from ..distributed.lockstep import together
from ..recipe.algebra import WHOLE
from . import grouping
from .autograd import full_precision
from .chunk import Chunk
from .gradients import gradient_norms, in_cache, one_by_one
from .grouping import Recipes, Work
from .member import Member
from .mode import StepMode
from .refresh import refresh_due
from .state import follow
from .table import ParameterTable
from .update import Move, update_
from .watch import Watch

Rescale = Callable[[Member, float], float]


class Stepper:
    """Runs the steps of one optimizer.

    Attributes:
        table: the parameters.
        watch: counters for `stats()`.
        mode: another way to take a step, or None.
        move: what replaces `update.move_`, or None; `optimizer.compile()` sets it.
    """

    def __init__(self, table: ParameterTable, watch: Watch) -> None:
        self.table, self.watch = table, watch
        self.mode: StepMode | None = None
        self.move: Move | None = None
        # Recipes hold until a group is edited, works until the signature of their members changes.
        self._recipes: Recipes | None = None
        self._kept: dict[int, tuple[Any, list[Work]]] = {}  # (signature, works), by the plan of the first member

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        self.table.recheck()
        members = self.table.with_gradients()
        self.prepare(members)
        if not self.dry_run(members):
            self.update(members)

    def prepare(self, members: list[Member]) -> None:
        """Refuse gradients that no rule can use, and move state to where its parameter is."""
        if self.table.unverified:
            self.table.verify()
        # Rules need dense gradients that are cut like their parameters. State follows a model that was moved or cast.
        for p, group, grad, _, plan, layout, state in members:
            if grad.layout is not torch.strided:
                checks.gradient(plan.name, grad)
            if layout is not HERE and hasattr(p, "device_mesh"):
                shard_checks.same_layout(plan.name, grad, cast(Any, p).placements)
            follow(state, p, group)

    def dry_run(self, members: list[Member]) -> bool:
        """Whether this is a first step on zero gradients, as checkpoint helpers and DeepSpeed make one.

        Such a step creates state and changes nothing: a basis fitted to zeros would stay for a whole interval. Nobody
        makes one with flat tensors, of which a step has only a few at a time and could not tell.
        """
        # From the second step on, counters on the CPU answer.
        if self.table.pieces or any(member.state["step"] or member.state["skipped"] for member in members):
            return False
        if any(state["step"] or state["skipped"] for state in self.table.all_states()):
            return False
        # Ranks decide together: a rank whose shards are zero must not leave the others waiting in a collective.
        nonzero = any(bool(member.layout.here(member.grad).any()) for member in members)
        return not self.table.anywhere(nonzero)

    @torch._disable_dynamo
    def update(self, members: list[Member], rescale: Rescale | None = None) -> None:
        """Take the whole step of some members. A mode passes a single member, as soon as its gradient is complete.

        Args:
            rescale: returns the factor for the gradient of a member, given the member and the norm of its gradient. The
                gradient is multiplied in place.
        """
        if self._recipes is None or self._recipes.version != self.table.version:
            self._recipes = Recipes(self.table.recipe, self.table.version, self._recipes)
        recipes = self._recipes
        with full_precision(member.p for member in members):
            # On a CPU a gradient is still in cache from its norm when its update reads it. Over ranks one message has
            # the norms of all gradients, so they come first.
            cached = one_by_one(members) and not self.table.decides_with_others()
            for batch in in_cache(members) if cached else [members]:
                finite = self.finite(batch, rescale)
                if not finite:
                    continue
                # A cut of ZeRO may fall within a row: neighboring ranks then add up their parts of its gradient.
                if self.table.sharded:
                    complete_edges((member.layout, member.grad) for member in finite)
                works = self._works(finite, recipes)
                # Members in place first. A chunk is formed when its turn comes, from the gradients of this step.
                for work in works:
                    if work.in_place is not None:
                        work.in_place(work.recipe, [finite[i] for i in work.places])
                chunks = (work.chunk([finite[i] for i in work.places], self.watch) for work in works if work.bucket)
                if self.table.sharded:
                    self._in_lockstep(finite, chunks, recipes)
                else:
                    for piece in _pieces(chunks):
                        update_(piece, WHOLE, self.move)

    def _works(self, members: list[Member], recipes: Recipes) -> list[Work]:
        """Return the works of these members: those of the last step, unless something has changed since."""
        signature = grouping.signature(members, recipes, self.move is None)
        # Batches of one step begin with different members, and each keeps its own works.
        key = id(members[0].plan)
        kept = self._kept.get(key)
        if kept is None or kept[0] != signature:
            kept = self._kept[key] = signature, list(grouping.works(members, recipes, self.move is None))
        return kept[1]

    def _in_lockstep(self, members: list[Member], chunks: Iterator[Chunk], recipes: Recipes) -> None:
        """Update chunks of which other ranks have parts, so that their thin sums over ranks are sent together."""
        # The stacks must be found first: after the updates none of their matrices is due any more.
        stacks = self._spread_stacks_due(members, recipes)
        # The chunks of a wave run as tasks that stop at each sum, and all sums that wait then travel in one message.
        for wave in grouping.waves(_pieces(chunks)):
            together([partial(update_, piece, piece.algebra, self.move) for piece in wave])
        # Each rank has advanced the refresh counters of its own matrices; now all ranks learn all of them.
        together([partial(member.layout.tell_all_, member.state) for member in stacks])

    def _spread_stacks_due(self, members: list[Member], recipes: Recipes) -> list[Member]:
        """Return the stacks that are spread over ranks and of which any rank may refit a matrix in this step."""
        apart = [member for member in members if member.layout.counts_apart]
        # A chunk has the local matrices only. All ranks must find the same stacks, so the schedule is asked about the
        # matrices of all ranks, whose counters every rank keeps.
        chunks = (chunk for member in apart for chunk in self.chunks([member], recipes))
        wholes = (
            replace(chunk, plans=[member.plan], states=[member.state], first=0)
            for member, chunk in zip(apart, chunks, strict=True)
        )
        return [member for member, whole in zip(apart, wholes, strict=True) if refresh_due(whole)]

    def chunks(self, members: list[Member], recipes: Recipes | None = None) -> Iterator[Chunk]:
        """Yield the chunks that these members form, whatever path they would take in a step."""
        for work in grouping.buckets(members, recipes or Recipes(self.table.recipe, self.table.version)):
            yield work.chunk([members[i] for i in work.places], self.watch)

    def finite(self, members: list[Member], rescale: Rescale | None) -> list[Member]:
        """Return the members whose gradients are finite. Count the others, or refuse them before any update."""
        norms = gradient_norms(
            [member.grad if member.layout is HERE else member.layout.here(member.grad) for member in members]
        )
        # The norm of a shard says nothing about the whole gradient. One all-reduce gives the norms of all of them, so
        # every rank skips the same parameters.
        if self.table.decides_with_others():
            pairs = ((member.p, norm) for member, norm in zip(members, norms, strict=True))
            whole = self.table.common().norms(pairs)
            norms = [whole.get(member.p, norm) for member, norm in zip(members, norms, strict=True)]
        # Clipping and unscaling during backward need the norm of the gradient, which is known only now.
        if rescale is not None:
            for member, factor in zip(members, map(rescale, members, norms), strict=True):
                if factor != 1:
                    member.grad.mul_(factor)
        if all(map(math.isfinite, norms)):
            return members
        self.skip([member for member, norm in zip(members, norms, strict=True) if not math.isfinite(norm)])
        return [member for member, norm in zip(members, norms, strict=True) if math.isfinite(norm)]

    def skip(self, members: list[Member]) -> None:
        """Count members with a non-finite gradient and warn the first time, or raise."""
        names = [member.plan.name for member in members]
        # In a normal step such a group makes all norms come first (`one_by_one`), so nothing has been updated yet.
        if any(member.group["nonfinite"] == "raise" for member in members):
            checks.nonfinite(names)
        expected = self.mode is not None and self.mode.expects_overflow
        if not expected and not any(int(state["skipped"]) for state in self.table.all_states()):
            checks.warn(
                f"non-finite gradient in {checks.few(names)}: left out of this step, as will be any later one without "
                "a further warning. report() counts them"
            )
        for member in members:
            member.state["skipped"] += 1


def _pieces(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Yield the pieces that are updated at once, and count the step of a parameter after its last piece."""
    for chunk in chunks:
        yield from chunk.pieces()
        for state in chunk.states:
            state["step"] += 1
