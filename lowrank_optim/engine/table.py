"""The parameters of one optimizer: which there are, and the plan, layout, state and recipe of each.

Code that needs any of this takes a `ParameterTable`, and reads no private attribute of the optimizer. A wrapper such as
DeepSpeed puts other tensors in place of parameters: float32 copies, or flat tensors that hold ranges of many
parameters. The table knows these too (`wrappers/adoption.py` enters them), so that whatever tensor is updated, its plan
is that of the parameter.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from torch import Tensor

from .. import checks, hyperparameters
from ..distributed import checks as shard_checks
from ..distributed.common import Common
from ..distributed.deepspeed import Range, verify
from ..distributed.fragments import Fragment
from ..distributed.layout import Cut, Layout
from ..distributed.lockstep import Peers
from ..distributed.placement import layout_of
from ..recipe.method import Method
from ..recipe.plan import Plan, decide, shape_of
from ..recipe.recipe import Recipe
from .member import Member
from .state import fresh

GROUP = "group_id"  # key of a param group: its number, which stays the same when the content of the group changes


class Home(NamedTuple):
    """The place of a fragment of a parameter: its flat tensor, and the group of that."""

    flat: Tensor
    fragment: Fragment
    group: dict[str, Any]


class Spread(NamedTuple):
    """A parameter whose elements are in flat tensors of several processes.

    Attributes:
        range: the local range of its elements in the flat tensor.
        pieces: the local fragments.
        peers: the processes that hold the parameter together.
    """

    group: dict[str, Any]
    flat: Tensor
    range: Range
    pieces: list[Tensor]
    peers: Peers

    @property
    def whole(self) -> slice:
        """Return the local elements, as a range of the whole parameter."""
        return slice(self.range.start, self.range.start + self.range.length)

    @property
    def here(self) -> slice:
        """Return the local elements, as a range of the flat tensor."""
        return slice(self.range.offset, self.range.offset + self.range.length)


class ParameterTable:
    """Which parameters an optimizer updates, with which plan, layout, state and recipe.

    Args:
        method: the optimizer, weakly referenced by its caller, so that the two do not keep each other alive.

    Attributes:
        groups, states: the live `param_groups` and `state` of the optimizer, bound at each access of `optimizer.table`.
        plans, layouts: by the tensor that is updated: a parameter, its copy, or a fragment of it.
        given: (name, parameter) pairs of each group as the optimizer was given them, by group number.
        homes: by fragment. A fragment is a tensor, a view of a flat tensor.
        pieces: the fragments of each flat tensor.
        spread: the parameters in flat tensors, in an order that all ranks share.
        copies: the tensor that is updated in place of a parameter.
        sharded: whether a step needs other processes.
        version: increases when a group is added or edited; everything derived from groups before is then out of date.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.name = method.__class__.__name__
        self.groups: list[dict[str, Any]] = []
        self.states: dict[Tensor, Any] = {}
        # By the tensor that is updated. Without a wrapper this is the parameter itself.
        self.plans: dict[Tensor, Plan] = {}
        self.layouts: dict[Tensor, Layout] = {}
        self.given: dict[int, list[tuple[str, Tensor]]] = {}
        # Filled by `wrappers/adoption.py` alone: what DeepSpeed has put in place of parameters.
        self.homes: dict[Tensor, Home] = {}
        self.pieces: dict[Tensor, list[Tensor]] = {}
        self.spread: dict[Tensor, Spread] = {}
        self.copies: dict[Tensor, Tensor] = {}
        self.unverified: list[tuple[Tensor, list[Range]]] = []  # flat tensors whose content was not compared yet
        self.sharded = False
        self.version = 0
        self._seen: dict[int, dict[str, Any]] = {}  # options of each group when they were last checked
        self._searched: dict[int, list[Tensor]] = {}  # tensors of each group when it was last searched for new ones
        self._commons: dict[tuple[Tensor, ...], Common] = {}

    # -- groups are added ----------------------------------------------------------------------------------------------

    def admit(self, group: dict[str, Any]) -> None:
        """Enter a new group: check it, plan and lay out its parameters, create their state. All of it, or nothing."""
        # A number of its own, since positions in `param_groups` change if a caller removes a group.
        number = group[GROUP] = max(self._seen, default=-1) + 1
        self._note_given(group)
        try:
            self.method.refuse_group(group)
            plans = self.decide(group)
            layouts = self.lay_out(plans, group)
            if group["strict"]:
                checks.nothing_lost(self.name, ((plan.name, plan.reason) for plan in plans.values() if plan.fallback))
            # Parameters without memory (meta, ZeRO-3) or without gradients (frozen) get state with the first gradient.
            ready = [p for p in plans if p.requires_grad and not (p.is_meta or hasattr(p, "ds_shape"))]
            states = {p: fresh(p, plans[p], self.recipe(plans[p], group), group, layouts[p]) for p in ready}
        except Exception:
            # Everything that may raise is above, and has changed nothing but the note of the parameters.
            del self.given[number]
            raise
        self.enter(plans, layouts)
        # Other ranks may share the new parameters, so the groups of ranks that decide together may change. (Fragments
        # that are adopted later are decided about per set of flat tensors, and ranks agree on each set once.)
        self._commons = {}
        self._seen[number] = hyperparameters.snapshot(group)
        self.states.update(states)

    def rebuilt(
        self, groups: list[dict[str, Any]], states: dict[Tensor, Any], numbers: list[int] | None
    ) -> ParameterTable:
        """Return the table of groups that a state dict, a pickle or a copy has brought.

        Args:
            numbers: the numbers of the groups, if their parameters are those of this table; None if they are new.
        """
        # A new table, so that a state dict that does not fit leaves the present one as it is.
        new = ParameterTable(self.method)
        new.groups, new.states = groups, states
        if numbers is not None:
            new.given = self.given
        for number, group in zip(numbers or range(len(groups)), groups, strict=True):
            group[GROUP] = number
            if numbers is None:
                new._note_given(group)
            # Loaded options replace those of the constructor, and may come from another version or from a user's edit.
            hyperparameters.check(group, self.method.choices)
            plans = new.decide(group)
            new.enter(plans, new.lay_out(plans, group))
            new._seen[number] = hyperparameters.snapshot(group)
        return new

    def _note_given(self, group: dict[str, Any]) -> None:
        """Note the parameters of a group as the optimizer was given them, before a wrapper replaces them."""
        names = group.get("param_names", [""] * len(group["params"]))
        self.given[group[GROUP]] = list(zip(names, group["params"], strict=True))

    def decide(self, group: dict[str, Any]) -> dict[Tensor, Plan]:
        """Return the plans of a group's parameters, in the order in which they were given."""
        plans: dict[Tensor, Plan] = {}
        # Unnamed parameters are keyed by their number, and projected matrices take their turns in a staggered schedule
        # by their place. Both count over all groups, so a group that is added later moves no earlier parameter.
        before = [self.plans[p] for given in self.given.values() for _, p in given if p in self.plans]
        taken = sum(plan.count for plan in before if plan.projected)
        for name, p in self.given[group[GROUP]]:
            # The local shape plays no part, so a sharded run decides as one process does.
            plan = decide(name, len(before) + len(plans), taken, shape_of(p), group, self.method.ranked)
            checks.parameter(plan.name, p)
            if plan.projected:
                self.method.refuse(plan, group)
                taken += plan.count
            plans[p] = plan
        return plans

    def lay_out(self, plans: dict[Tensor, Plan], group: dict[str, Any]) -> dict[Tensor, Layout]:
        """Return the layouts of some tensors. Refuse a shard that this method or its way of stepping cannot serve."""
        layouts = {p: layout_of(p, plan) for p, plan in plans.items()}
        for p, layout in layouts.items():
            if layout.sharded:
                self.admit_shard(plans[p], cast(Cut, layout), group)
        return layouts

    def admit_shard(self, plan: Plan, layout: Cut, group: dict[str, Any]) -> None:
        """Refuse whatever the method, or the way in which its step is run, cannot do on a shard."""
        for way, used in self.method.ways(group).items():
            if used:
                shard_checks.unsharded(plan.name, way)
        # Parts see the sides of the whole matrix, in which a cut side is marked: so a spec shows which state is cut.
        recipe = self.recipe(plan, group)
        spec = recipe.spec(layout.matrix(plan), plan.rank or 0, plan.small)
        shard_checks.cut(self.name, plan, layout.pieces, recipe.uncut(), layout.cut_blocks(spec))
        self.method.refuse_shard(plan, group)

    def enter(self, plans: dict[Tensor, Plan], layouts: dict[Tensor, Layout]) -> None:
        """Enter tensors with their plans and layouts."""
        self.plans.update(plans)
        self.layouts.update(layouts)
        self.sharded = self.sharded or any(layout.sharded for layout in layouts.values())
        self.version += 1

    # -- groups change ---------------------------------------------------------------------------------------------

    def strangers(self) -> bool:
        """Whether a group holds other tensors than when it was last searched, for example those of a wrapper."""
        # By identity: `==` would compare the elements of tensors.
        for group in self.groups:
            params, before = group["params"], self._searched.get(group[GROUP], ())
            if len(params) != len(before) or not all(map(operator.is_, params, before)):
                return True
        return False

    def note_searched(self) -> None:
        """Remember that all tensors of the groups are known now."""
        self._searched = {group[GROUP]: list(group["params"]) for group in self.groups}

    def recheck(self) -> None:
        """Check edits of a group as its first options were checked, once per edit and before anything is updated."""
        # Schedulers and users write into live groups. A snapshot leaves out lr, which may change in each step.
        for group in self.groups:
            options, before = hyperparameters.snapshot(group), self._seen[group[GROUP]]
            if self.pieces:
                options["params"] = before["params"]  # their number: flat tensors are in a group only for a while
            if options == before:
                continue
            hyperparameters.known_keys(group, self.method.defaults)
            hyperparameters.unchanged(options, before, self.method.fixed)
            self.method.refuse_group(group)
            # Options may be valid as such, but not for the matrices of the group.
            for p in self.of_group(group):
                if self.plans[p].projected:
                    self.method.refuse(self.plans[p], group)
                if self.layouts[p].sharded:
                    self.admit_shard(self.plans[p], cast(Cut, self.layouts[p]), group)
            self._seen[group[GROUP]] = options
            self.version += 1

    # -- what is known of a parameter --------------------------------------------------------------------------------

    def recipe(self, plan: Plan, group: dict[str, Any]) -> Recipe:
        """Return the recipe of a parameter. Recipes are derived from groups and never stored."""
        return self.method.recipe(group) if plan.projected else self.method.plain(group)

    def fresh_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter as it is before the first step."""
        plan = self.plans[p]
        return fresh(p, plan, self.recipe(plan, group), group, self.layouts[p])

    def state(self, p: Tensor) -> dict[str, Any]:
        """Return the live state of a parameter or fragment; empty if there is none yet."""
        # A fragment has no entry in `optimizer.state`: its state is within that of its flat tensor, under its key.
        home = self.homes.get(p)
        if home is None:
            return self.states.get(p, {})  # type: ignore[no-any-return]
        return self.states.get(home.flat, {}).get(home.fragment.key, {})  # type: ignore[no-any-return]

    def keep(self, p: Tensor, state: dict[str, Tensor]) -> None:
        """Store the state of a parameter, or that of a fragment within the state of its flat tensor."""
        home = self.homes.get(p)
        if home is None:
            self.states[p] = state
        else:
            self.states.setdefault(home.flat, {})[home.fragment.key] = state

    def all_states(self) -> Iterator[dict[str, Tensor]]:
        """Yield the state of each parameter that has any."""
        return (state for p, _ in self.members() if (state := self.state(p)))

    # -- which tensors are updated -----------------------------------------------------------------------------------

    def members(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield (tensor, group) of every updated tensor, also of fragments whose flat tensor is in no group now."""
        for group in self.groups:
            yield from ((p, group) for p in group["params"] if p not in self.pieces)
        yield from ((piece, home.group) for piece, home in self.homes.items())

    def of_group(self, group: dict[str, Any]) -> Iterator[Tensor]:
        """Yield the tensors that are updated for the present content of a group."""
        for p in group["params"]:
            yield from self.pieces.get(p, (p,))

    def of_parameter(self, p: Tensor) -> list[Tensor]:
        """Return the local tensors that are updated for a parameter."""
        return self.spread[p].pieces if p in self.spread else [self.copies.get(p, p)]

    def with_gradients(self) -> list[Member]:
        """Return a member for each tensor that has a gradient."""
        # This runs in every step, so what a plain parameter needs is read here and not through `member`.
        found: list[Member] = []
        for group in self.groups:
            for p in group["params"]:
                grad = p.grad
                if grad is None:
                    continue
                if self.pieces and p in self.pieces:
                    found += self._fragments_with_gradients(p, grad)
                    continue
                state = self.states.get(p) or self._first_state(p, group)
                found.append(Member(p, group, grad, False, self.plans[p], self.layouts[p], state))
        return found

    def member(self, p: Tensor, group: dict[str, Any], grad: Tensor, projected: bool = False) -> Member:
        """Return the member of one tensor, with a given gradient (see `Member`)."""
        state = self.state(p) or self._first_state(p, group)
        return Member(p, group, grad, projected, self.plans[p], self.layouts[p], state)

    def _first_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Create state now, for a parameter that was frozen, or without memory, until now."""
        state = self.fresh_state(p, group)
        self.keep(p, state)
        return state

    def _fragments_with_gradients(self, flat: Tensor, grad: Tensor) -> Iterator[Member]:
        """Yield a member for each fragment of a flat tensor, with views of the flat tensor and of its gradient."""
        for piece in self.pieces[flat]:
            _, fragment, group = self.homes[piece]
            span = slice(fragment.offset, fragment.offset + fragment.length)
            piece.data = flat.data[span]  # DeepSpeed may have moved the flat tensor to other memory
            yield self.member(piece, group, grad[span])

    # -- other ranks ---------------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Compare each new flat tensor with its parameters, once, when its numbers are used first."""
        while self.unverified:
            verify(*self.unverified.pop())

    def anywhere(self, flag: bool) -> bool:
        """Return whether a flag is set on any rank; a process alone asks nobody."""
        return self.common().anywhere(flag) if self.sharded else flag

    def decides_with_others(self) -> bool:
        """Return whether any tensor of this step is sharded, so that its norm is known to all ranks together only."""
        return self.sharded and bool(self.common().groups)

    def common(self) -> Common:
        """Return the decisions that ranks take together, for all parameters or for the flat tensors of this step."""
        # DeepSpeed's stage 3 puts a few flat tensors into the groups at a time, and ranks then decide on these alone.
        flats = tuple(p for group in self.groups for p in group["params"] if p in self.pieces) if self.pieces else ()
        if flats not in self._commons:
            tensors = [piece for flat in flats for piece in self.pieces[flat]] if flats else self.layouts
            self._commons[flats] = Common(self.plans, {p: self.layouts[p] for p in tensors})
            # Once, before the first decision: all ranks must mean the same matrices in the same order.
            self._commons[flats].agree()
        return self._commons[flats]
