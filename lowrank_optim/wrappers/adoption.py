"""Enters tensors that a wrapper has put in place of parameters, after the optimizer was made with the parameters.

DeepSpeed does this: float32 copies (stage 0 in bfloat16), or flat tensors that hold ranges of many parameters, of
which a group shows only a few at a time. Whatever tensor a parameter is updated through, the plan stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from ..distributed import checks as shard_checks
from ..distributed.cutting import fragments, peers_in
from ..distributed.deepspeed import later, ranges
from ..distributed.layout import HERE, Cut
from ..engine.table import GROUP, Home, ParameterTable, Spread
from ..recipe.plan import Plan, bare_name, shape_of
from . import assembly


def flat_rules(table: ParameterTable, plans: Sequence[Plan], group: dict[str, Any]) -> list[bool]:
    """Return which parameters have a rule that does not depend on their shape, so that they may be cut anywhere."""
    return [table.recipe(plan, group).elementwise and not plan.projected for plan in plans]


def adopt(table: ParameterTable, early: bool = False) -> None:
    """Enter tensors of the groups that the table does not know. All ranks call it, at the same steps.

    Args:
        early: also search for tensors that a group holds only during a step.
    """
    for group in table.groups:
        given = [p for _, p in table.given[group[GROUP]]]
        held = [*group["params"], *(later(given) if early else ())]
        new = [p for p in dict.fromkeys(held) if p not in table.plans and p not in table.pieces]
        if not new or any(p is q for p in group["params"] for q in given):
            continue  # a parameter that a user has appended to the group is refused elsewhere
        method = table.method
        shard_checks.can_be_replaced(table.name, method.ways(group), method.irreplaceable)
        _refuse_nothing(table)
        trained = [p for p in given if p.requires_grad and shape_of(p).numel()]
        if [p.shape for p in new] == [p.shape for p in trained]:
            _adopt_copies(table, trained, new, group)
        else:
            for flat in new:
                _adopt_flat(table, flat, group, given)
    table.note_searched()  # only now: a wrapper that is refused here is refused at every step


def take_apart(table: ParameterTable, full: Mapping[str, Any]) -> None:
    """Distribute what `full_state` has assembled by name over the tensors that replace parameters."""
    adopt(table, early=True)
    names = {p: bare_name(plan.name) for p, plan in table.plans.items()}
    for p in table.spread:
        if names[p] in full["state"]:
            assembly.take_apart(table, p, full["state"][names[p]], full["borders"].get(names[p], {}))
    given = [p for pairs in table.given.values() for _, p in pairs]
    assembly.set_masters(table, {p: full["masters"][names[p]] for p in given if names[p] in full["masters"]})


def _refuse_nothing(table: ParameterTable) -> None:
    """Wrappers leave frozen parameters out; the remaining ones must not all be plain."""
    found = [(table.plans[p], p) for pairs in table.given.values() for _, p in pairs]
    table.method.refuse_nothing(
        [(plan.name, plan.reason or ("" if p.requires_grad else "frozen")) for plan, p in found]
    )


def _adopt_copies(table: ParameterTable, given: list[Tensor], copies: list[Tensor], group: dict[str, Any]) -> None:
    """Update copies in place of parameters, with the state that the parameters have."""
    table.copies.update(zip(given, copies, strict=True))
    plans = {copy: table.plans[p] for p, copy in zip(given, copies, strict=True)}
    layouts = table.lay_out(plans, group)
    for p, copy in zip(given, copies, strict=True):
        state = table.states.pop(p, None)
        if state and layouts[copy] is HERE is table.layouts[p]:
            table.states[copy] = state
    table.enter(plans, layouts)


def _adopt_flat(table: ParameterTable, flat: Tensor, group: dict[str, Any], given: list[Tensor]) -> None:
    """Update the fragments of a flat tensor in place of the parameters that it holds parts of."""
    found = ranges(table.name, flat, given, group)
    if any(hasattr(part.param, "ds_tensor") for part in found):
        shard_checks.can_be_partitioned(table.name, table.method.unpartitionable)
    plans = [table.plans[part.param] for part in found]
    numbers = {p: i for i, (_, p) in enumerate(pair for pairs in table.given.values() for pair in pairs)}
    keys = [f"m{numbers[part.param]}" for part in found]
    cut = list(fragments(found, plans, flat_rules(table, plans, group), keys, flat.device))
    for fragment in cut:
        if fragment.layout.sharded:
            table.admit_shard(fragment.plan, cast(Cut, fragment.layout), group)
    pieces = [flat.detach()[fragment.offset : fragment.offset + fragment.length] for fragment in cut]
    table.pieces[flat] = pieces
    own: dict[str, list[Tensor]] = {key: [] for key in keys}
    for piece, fragment in zip(pieces, cut, strict=True):
        own[fragment.key.partition(".")[0]].append(piece)
        table.homes[piece] = Home(flat, fragment, group)
    table.enter(
        {piece: fragment.plan for piece, fragment in zip(pieces, cut, strict=True)},
        {piece: fragment.layout for piece, fragment in zip(pieces, cut, strict=True)},
    )
    for part, key in zip(found, keys, strict=True):
        table.spread[part.param] = Spread(group, flat, part, own[key], peers_in(part.group, flat.device))
        if part.param in table.states:
            assembly.take_apart(table, part.param, table.states.pop(part.param), {})
    table.unverified.append((flat, found))
