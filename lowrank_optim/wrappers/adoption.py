"""Tensors that a wrapper has put in the place of parameters, after the optimizer was made with those.

DeepSpeed does: copies in float32 (stage 0 in bfloat16), or flat tensors that hold ranges of many parameters, some of
them at a time. Whatever a parameter is updated as, its plan is that of the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..distributed import checks as shard_checks
from ..distributed.deepspeed import Range, later, ranges, verify
from ..distributed.fragments import Fragment, fragments, peers_in
from ..distributed.layout import HERE
from ..distributed.lockstep import Peers
from ..recipe.plan import Plan, bare_name, shape_of
from . import assembly

if TYPE_CHECKING:
    from ..optimizer import LowRankOptimizer

GROUP = "group_id"  # key of a param group: its number, which survives whatever is done to the group


class Home(NamedTuple):
    """Where a fragment is."""

    flat: Tensor
    fragment: Fragment
    group: dict[str, Any]


class Spread(NamedTuple):
    """A parameter in flat tensors.

    Args:
        range: what is here of it in the flat tensor.
        pieces: the fragments that this is.
        peers: the processes that have the rest.
    """

    group: dict[str, Any]
    flat: Tensor
    range: Range
    pieces: list[Tensor]
    peers: Peers

    @property
    def whole(self) -> slice:
        """Which elements of the parameter."""
        return slice(self.range.start, self.range.start + self.range.length)

    @property
    def here(self) -> slice:
        """Where in the flat tensor."""
        return slice(self.range.offset, self.range.offset + self.range.length)


def flat_rules(optimizer: LowRankOptimizer, plans: Sequence[Plan], group: dict[str, Any]) -> list[bool]:
    """Which of some parameters have a rule that looks at no shape, so that they may be cut anywhere."""
    return [optimizer._recipe_of(plan, group).elementwise and not plan.projected for plan in plans]


class StandIns:
    """Of one optimizer.

    Attributes:
        given: the parameters of each group as the optimizer got them, with their names.
        homes: of each fragment. It is a tensor, a view of the flat one.
        pieces: the fragments of each flat tensor.
        spread: the parameters that are in flat tensors, in an order that all ranks share.
        copies: what is updated in the place of a parameter that has a copy.
    """

    def __init__(self, optimizer: LowRankOptimizer) -> None:
        self.optimizer = optimizer
        self.given: dict[int, list[tuple[str, Tensor]]] = {}
        self.homes: dict[Tensor, Home] = {}
        self.pieces: dict[Tensor, list[Tensor]] = {}
        self.spread: dict[Tensor, Spread] = {}
        self.copies: dict[Tensor, Tensor] = {}
        self._unverified: list[tuple[Tensor, list[Range]]] = []

    def note(self, group: dict[str, Any]) -> None:
        """A group whose tensors are the parameters themselves."""
        names = group.get("param_names", [""] * len(group["params"]))
        self.given[group[GROUP]] = list(zip(names, group["params"], strict=True))

    def again(self) -> StandIns:
        """Without what is known of tensors, because plans have changed."""
        new = StandIns(self.optimizer)
        new.given = self.given
        return new

    # -- finding them --------------------------------------------------------------------------------------------------

    def adopt(self, early: bool = False) -> None:
        """Looks for tensors that are not known yet. All ranks call it, at the same steps.

        `early`: also those that a group only has during a step.
        """
        plans = self.optimizer._plans
        for group in self.optimizer.param_groups:
            given = [p for _, p in self.given[group[GROUP]]]
            there = [*group["params"], *(later(given) if early else ())]
            new = [p for p in dict.fromkeys(there) if p not in plans and p not in self.pieces]
            if not new or any(p is q for p in group["params"] for q in given):
                continue  # a parameter that somebody has appended is refused elsewhere
            shard_checks.can_be_replaced(type(self.optimizer).__name__, self._ways(group), self.optimizer.irreplaceable)
            self._check_served()
            trained = [p for p in given if p.requires_grad and shape_of(p).numel()]
            if [p.shape for p in new] == [p.shape for p in trained]:
                self._adopt_copies(trained, new, group)
            else:
                for flat in new:
                    self._adopt_flat(flat, group, given)

    def _check_served(self) -> None:
        """Wrappers leave frozen parameters out; the others must not all be plain."""
        found = [(self.optimizer._plans[p], p) for pairs in self.given.values() for _, p in pairs]
        reasons = [(plan.name, plan.reason or ("" if p.requires_grad else "frozen")) for plan, p in found]
        self.optimizer._check_served(reasons)

    def _ways(self, group: dict[str, Any]) -> dict[str, bool]:
        """Ways of running a step that need the parameters themselves."""
        optimizer = self.optimizer
        return {
            "capturable=True": group["capturable"],
            "step_in_backward": optimizer._in_backward is not None,
            "compile()": optimizer._move is not None,
        }

    def _adopt_copies(self, given: list[Tensor], copies: list[Tensor], group: dict[str, Any]) -> None:
        optimizer = self.optimizer
        self.copies.update(zip(given, copies, strict=True))
        plans = {copy: optimizer._plans[p] for p, copy in zip(given, copies, strict=True)}
        layouts = optimizer._lay_out(plans, group)
        for p, copy in zip(given, copies, strict=True):
            state = optimizer.state.pop(p, None)
            if state and layouts[copy] is HERE is optimizer._layouts[p]:
                optimizer.state[copy] = state
        optimizer._plans.update(plans)
        optimizer._layouts.update(layouts)

    def _adopt_flat(self, flat: Tensor, group: dict[str, Any], given: list[Tensor]) -> None:
        optimizer = self.optimizer
        found = ranges(type(optimizer).__name__, flat, given, group)
        if any(hasattr(one.param, "ds_tensor") for one in found):
            shard_checks.can_be_partitioned(type(optimizer).__name__, optimizer.unpartitionable)
        plans = [optimizer._plans[one.param] for one in found]
        numbers = {p: i for i, (_, p) in enumerate(pair for pairs in self.given.values() for pair in pairs)}
        keys = [f"m{numbers[one.param]}" for one in found]
        cut = list(fragments(found, plans, flat_rules(optimizer, plans, group), keys, flat.device))
        for one in cut:
            if one.layout.sharded:
                optimizer._admit_shard(one.plan, one.layout, group)  # type: ignore[arg-type]
        self.pieces[flat] = [flat.detach()[one.offset : one.offset + one.length] for one in cut]
        own: dict[str, list[Tensor]] = {key: [] for key in keys}
        for piece, one in zip(self.pieces[flat], cut, strict=True):
            own[one.key.partition(".")[0]].append(piece)
            self.homes[piece] = Home(flat, one, group)
            optimizer._plans[piece], optimizer._layouts[piece] = one.plan, one.layout
        for there, key in zip(found, keys, strict=True):
            self.spread[there.param] = Spread(group, flat, there, own[key], peers_in(there.group, flat.device))
            if there.param in optimizer.state:
                assembly.take_apart(optimizer, there.param, optimizer.state.pop(there.param), {})
        self._unverified.append((flat, found))

    def verify(self) -> None:
        """Once for each flat tensor, when its numbers are to be used: it holds what it is said to hold."""
        while self._unverified:
            verify(*self._unverified.pop())

    # -- using them ----------------------------------------------------------------------------------------------------

    def of_parameter(self, p: Tensor) -> list[Tensor]:
        """What is updated here of a parameter."""
        return self.spread[p].pieces if p in self.spread else [self.copies.get(p, p)]

    def of(self, group: dict[str, Any]) -> Iterator[Tensor]:
        """What is updated of the tensors that are in a group now."""
        for p in group["params"]:
            yield from self.pieces.get(p, (p,))

    def all(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """(parameter or fragment, its group), also of fragments whose group is empty or missing at the moment."""
        for group in self.optimizer.param_groups:
            yield from ((p, group) for p in group["params"] if p not in self.pieces)
        yield from ((piece, home.group) for piece, home in self.homes.items())

    def with_gradients(self) -> Iterator[tuple[Tensor, dict[str, Any], Tensor]]:
        """(parameter or fragment, its group, its gradient) of what has one."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                grad = p.grad
                if grad is None:
                    continue
                if not self.pieces or p not in self.pieces:
                    yield p, group, grad
                    continue
                for piece in self.pieces[p]:
                    one = self.homes[piece].fragment
                    here = slice(one.offset, one.offset + one.length)
                    piece.data = p.data[here]  # which may have been moved
                    yield piece, group, grad[here]

    def state(self, p: Tensor) -> dict[str, Any]:
        """Of a parameter, or of a fragment in that of its flat tensor; empty if there is none yet."""
        home = self.homes.get(p)
        states: Any = self.optimizer.state
        if home is None:
            return states.get(p, {})  # type: ignore[no-any-return]
        return states.get(home.flat, {}).get(home.fragment.key, {})  # type: ignore[no-any-return]

    def take_apart(self, full: Mapping[str, Any]) -> None:
        """Of what `full_state` has put together by name, all that is in other tensors than the parameters."""
        self.adopt(early=True)
        names = {p: bare_name(plan.name) for p, plan in self.optimizer._plans.items()}
        for p in self.spread:
            if names[p] in full["state"]:
                assembly.take_apart(self.optimizer, p, full["state"][names[p]], full["borders"].get(names[p], {}))
        given = [p for pairs in self.given.values() for _, p in pairs]
        assembly.set_masters(
            self.optimizer, {p: full["masters"][names[p]] for p in given if names[p] in full["masters"]}
        )

    def keep(self, p: Tensor, state: dict[str, Tensor]) -> None:
        home = self.homes.get(p)
        if home is None:
            self.optimizer.state[p] = state
        else:
            self.optimizer.state.setdefault(home.flat, {})[home.fragment.key] = state
