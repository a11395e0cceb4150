"""Loading a state dict: its state is checked and copied before anything in the optimizer changes.

torch's own loader casts state to the dtype of its parameter, and leaves an optimizer half loaded when something does
not fit. It still handles the groups and the hooks (`optimizer.load_state_dict`); the state is loaded here.
"""

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
    """Refuse a state dict without state, or one whose names would give other subspaces than it was trained with."""
    if not (table.states or table.pieces):
        return
    checks.has_state(state_dict.get("full", state_dict))
    # A seeded basis is not stored: it follows from the names of the parameters, without what wrappers add to them.
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
    # Saved state is keyed by the position of a parameter in the groups, as in torch.optim.
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    members = ((p, group) for group in table.groups for p in group["params"])
    new: dict[Tensor, dict[str, Any]] = {}
    for key, (p, group) in zip(saved, members, strict=True):
        state, pieces = state_dict["state"].get(key), table.pieces.get(p)
        if state and pieces is not None:
            # The state of a flat tensor is a dict with the state of each of its fragments.
            by_key = {table.homes[piece].fragment.key: piece for piece in pieces}
            shard_checks.same_fragments(state.keys() == by_key.keys())
            new[p] = {name: _copied(table, piece, state[name], group) for name, piece in by_key.items()}
        elif state:
            new[p] = _copied(table, p, state, group)
        elif p.requires_grad and pieces is None:
            new[p] = table.fresh_state(p, group)
    # Everything fits. `states` is the live dict of the optimizer, so its content is exchanged, not the dict.
    table.states.clear()
    table.states.update(new)


def _copied(table: ParameterTable, p: Tensor, saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the saved state of one tensor, laid out like the fresh state of that tensor."""
    return loaded(table.plans[p].name, saved, table.fresh_state(p, group), table.layouts[p])
