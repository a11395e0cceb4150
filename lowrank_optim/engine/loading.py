"""Loading: the state that a state dict brings, checked and copied before anything of the optimizer changes."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor

from .. import checks
from ..distributed import checks as shard_checks
from ..recipe.plan import bare_name
from .state import loaded
from .table import ParameterTable


def check(table: ParameterTable, state_dict: dict[str, Any]) -> None:
    """Refuse a state dict without state, or whose names would give other subspaces than it was trained with."""
    if not (table.states or table.pieces):
        return
    checks.has_state(state_dict.get("full", state_dict))
    for saved, group in zip(state_dict["param_groups"], table.groups, strict=False):
        projected = any(table.plans[p].projected for p in table.of_group(group))
        if projected and table.method.recipe(group).basis.seeded:
            names = [entry.get("param_names") for entry in (saved, group)]
            bare = [None if given is None else [bare_name(name) for name in given] for given in names]
            checks.same_names(table.name, *bare)


def take_state(table: ParameterTable, state_dict: dict[str, Any]) -> None:
    """Replace all state by copies of the saved state, or none of it.

    A parameter without saved state was frozen when the state was saved, and starts with fresh state.
    """
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    members = ((p, group) for group in table.groups for p in group["params"])
    new: dict[Tensor, dict[str, Any]] = {}
    for key, (p, group) in zip(saved, members, strict=True):
        was, pieces = state_dict["state"].get(key), table.pieces.get(p)
        if was and pieces is not None:  # the state of a flat tensor is that of each of its fragments
            ours = {table.homes[piece].fragment.key: piece for piece in pieces}
            shard_checks.same_fragments(was.keys() == ours.keys())
            new[p] = {name: _copied(table, piece, was[name], group) for name, piece in ours.items()}
        elif was:
            new[p] = _copied(table, p, was, group)
        elif p.requires_grad and pieces is None:
            new[p] = table.fresh_state(p, group)
    table.states.clear()
    table.states.update(new)


def _copied(table: ParameterTable, p: Tensor, saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    return loaded(table.plans[p].name, saved, table.fresh_state(p, group), table.layouts[p])
