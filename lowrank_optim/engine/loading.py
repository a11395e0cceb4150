"""Loading: what a state dict, a pickle or a copy brings becomes state, all of it or nothing."""

from __future__ import annotations

from collections import OrderedDict
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from .. import checks, hyperparameters
from ..distributed import checks as shard_checks
from ..recipe.plan import bare_name
from ..wrappers.adoption import GROUP, StandIns
from . import captured
from .state import loaded
from .watch import Watch

if TYPE_CHECKING:
    from ..optimizer import LowRankOptimizer


def load(optimizer: LowRankOptimizer, state_dict: dict[str, Any]) -> None:
    """`load_state_dict`: torch's own takes the groups, `take_state` the state."""
    optimizer._stand_ins.adopt()
    state_dict, hooks = state_dict.copy(), optimizer._optimizer_load_state_dict_pre_hooks
    for hook in hooks.values():
        replaced = hook(optimizer, state_dict)
        state_dict = state_dict if replaced is None else replaced
    if optimizer.state or optimizer._stand_ins.pieces:
        checks.has_state(state_dict.get("full", state_dict))
        _same_names(optimizer, state_dict)
    derived = "param_groups", "_plans", "_seen", "_layouts", "_stand_ins"
    before, state = {name: getattr(optimizer, name) for name in derived}, dict(optimizer.state)
    optimizer._optimizer_load_state_dict_pre_hooks = OrderedDict()  # they have run
    optimizer._incoming = state_dict
    try:
        Optimizer.load_state_dict(optimizer, {**state_dict, "state": {}})
    except Exception:
        vars(optimizer).update(before)
        optimizer.state.clear()
        optimizer.state.update(state)
        raise
    finally:
        optimizer._incoming = None
        optimizer._optimizer_load_state_dict_pre_hooks = hooks
    if optimizer._in_backward is not None or optimizer._projecting is not None:
        optimizer.zero_grad()  # what was accumulated belongs to the weights before


def restore(optimizer: LowRankOptimizer, state: dict[str, Any]) -> None:
    """`__setstate__`: all that is derived, made anew; the state itself too where torch's loader is at work."""
    incoming = optimizer._incoming
    numbers = None if incoming is None else [group[GROUP] for group in optimizer.param_groups]
    Optimizer.__setstate__(optimizer, state if incoming is None else {**state, "state": optimizer.state})
    for group in optimizer.param_groups:
        for key, value in optimizer.defaults.items():
            if key != "differentiable":  # which torch adds to defaults here
                group.setdefault(key, value)
    optimizer._plans, optimizer._layouts, optimizer._seen, optimizer._commons = {}, {}, {}, {}
    optimizer._watch = getattr(optimizer, "_watch", None) or Watch()
    optimizer._captured = captured.Captured(optimizer)
    optimizer._stand_ins = StandIns(optimizer) if numbers is None else optimizer._stand_ins.again()
    for group, number in zip(optimizer.param_groups, numbers or range(len(optimizer.param_groups)), strict=True):
        group[GROUP] = number
        if numbers is None:
            optimizer._stand_ins.note(group)
        hyperparameters.check(group, optimizer.choices)
        plans = optimizer._decide(group)
        optimizer._layouts.update(optimizer._lay_out(plans, group))
        optimizer._plans.update(plans)
        optimizer._seen[number] = hyperparameters.snapshot(group)
    optimizer._stand_ins.adopt()
    if incoming is not None:
        _take_state(optimizer, incoming)


def _same_names(optimizer: LowRankOptimizer, state_dict: dict[str, Any]) -> None:
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=False):
        projected = any(optimizer._plans[p].projected for p in optimizer._stand_ins.of(group))
        if projected and optimizer.recipe(group).basis.seeded:
            names = [one.get("param_names") for one in (saved, group)]
            bare = [None if given is None else [bare_name(name) for name in given] for given in names]
            checks.same_names(type(optimizer).__name__, *bare)


def _take_state(optimizer: LowRankOptimizer, state_dict: dict[str, Any]) -> None:
    """All or nothing. A parameter without saved state was frozen when the state was saved, and starts afresh."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    members = ((p, group) for group in optimizer.param_groups for p in group["params"])
    new: dict[Tensor, dict[str, Any]] = {}
    for key, (p, group) in zip(saved, members, strict=True):
        was, pieces = state_dict["state"].get(key), optimizer._stand_ins.pieces.get(p)
        if was and pieces is not None:
            new[p] = _of_pieces(optimizer, was, pieces, group)
        elif was:
            new[p] = _of(optimizer, p, was, group)
        elif p.requires_grad and pieces is None:
            new[p] = optimizer._fresh_state(p, group)
    optimizer.state.clear()
    optimizer.state.update(new)
    if "full" in state_dict:
        optimizer._stand_ins.take_apart(state_dict["full"])


def _of_pieces(
    optimizer: LowRankOptimizer, saved: dict[str, Any], pieces: list[Tensor], group: dict[str, Any]
) -> dict[str, Any]:
    """The state of a flat tensor, which is that of each of its fragments."""
    ours = {optimizer._stand_ins.homes[piece].fragment.key: piece for piece in pieces}
    shard_checks.same_fragments(saved.keys() == ours.keys())
    return {key: _of(optimizer, p, saved[key], group) for key, p in ours.items()}


def _of(optimizer: LowRankOptimizer, p: Tensor, saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    name, layout = optimizer._plans[p].name, optimizer._layouts[p]
    return loaded(name, saved, optimizer._fresh_state(p, group), layout)
