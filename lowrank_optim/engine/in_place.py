"""Members whose tensors are worked on as they lie: nothing is opened, refitted, stacked or written back.

They need no chunk: the lines of `recipe.py`, which are `update.move_`, run on what there is. A kernel that takes lists
does its part for all of them at once, so a norm vector or a tiny matrix costs little more than its place in a list;
`parts/fused.py` knows these kernels. A member counts its step as soon as its weight is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..distributed.layout import HERE
from ..recipe.algebra import WHOLE
from ..recipe.recipe import Clock, Recipe, State
from ..recipe.weights import is_packed
from . import fused, limits
from .chunk import ages_
from .gradients import in_cache
from .grouping import Asked, Kind, stacked
from .member import Member, RecipeOf
from .refresh import derived
from .update import move_

Work = Callable[[Recipe, list[Member], float], None]


def update_listed_(members: list[Member], recipe_of: RecipeOf, asked: Asked) -> list[Member]:
    """Updates those of the members, all with finite gradients, that it can; returns the others."""
    lists: dict[tuple[Any, ...], tuple[Recipe, list[Member]]] = {}
    others = []
    for one in members:
        kind = asked.kind(one, recipe_of)
        work = _work(one, kind)
        if work is None:
            others.append(one)
        else:
            alike = work, _clock(one, kind.recipe), id(kind.recipe), one.p.dtype, one.p.device
            lists.setdefault(alike, (kind.recipe, []))[1].append(one)
    for (work, t, *_), (recipe, some) in lists.items():
        work(recipe, some, t)
    return others


def _work(one: Member, kind: Kind) -> Work | None:
    """What updates it, if all of it is here, is worked on as it is kept, and stays as it lies."""
    p, grad, projected = one.p, one.grad, one.plan.projected
    if one.layout is not HERE or one.projected or one.plan.batch or is_packed(p):
        return None
    if grad.dtype is not p.dtype or not p.is_contiguous() or not kind.lies(one.state):
        return None
    if kind.listed and not projected and grad.is_contiguous():
        return _whole_
    if stacked(one) or (_due(one, kind.recipe) if projected else kind.recipe.elementwise and p.numel() > limits.SLICE):
        return None
    return _together_ if kind.listed and projected else _alone_


def _due(one: Member, recipe: Recipe) -> bool:
    counters = {key: one.state[key] for key in recipe.refresh.counters()}
    return recipe.refresh.due(int(one.state["step"]), int(one.state["refreshed_at"]), one.plan.place, counters)


def _clock(one: Member, recipe: Recipe) -> float:
    """Steps that the moments have seen, this one included."""
    birth = max(0, int(one.state["refreshed_at"])) if recipe.refresh.restarts else 0
    return float(int(one.state["step"]) + 1 - birth)


def _whole_(recipe: Recipe, some: list[Member], t: float) -> None:
    """Plain parameters, in one kernel."""
    group, states = some[0].group, [one.state for one in some]
    tensors = [one.p.detach() for one in some], [one.grad for one in some], states
    fused.whole(recipe)(recipe, *tensors, float(group["lr"]), group["weight_decay"], t)  # type: ignore[misc]
    torch._foreach_add_([state["step"] for state in states], 1)


def _together_(recipe: Recipe, members: list[Member], t: float) -> None:
    """Matrices between refreshes: products one by one, the direction of all in one kernel."""
    lr = float(members[0].group["lr"])
    for some in in_cache(members):  # R of all of them, and more, is held
        g = [one.plan.oriented(one.grad) for one in some]
        states = [_state(recipe, one, x) for one, x in zip(some, g, strict=True)]
        r = [recipe.basis.down(WHOLE, x, st) for x, st in zip(g, states, strict=True)]
        d = fused.directions(recipe, states, r, g, t)
        for i, one in enumerate(some):
            _move_(recipe, one, g[i], r[i], states[i], lr, t, d[i])


def _alone_(recipe: Recipe, members: list[Member], t: float) -> None:
    """One by one."""
    lr = float(members[0].group["lr"])
    for one in members:
        g = one.plan.oriented(one.grad)
        st = _state(recipe, one, g)
        g = recipe.residual.before(g, st)
        _move_(recipe, one, g, None, st, lr, ages_(st, recipe.refresh, g.dtype) if recipe.aged else t)


def _state(recipe: Recipe, one: Member, g: Tensor) -> State:
    """All tensors that a step needs, with those that nobody keeps."""
    state = one.state
    if not recipe.basis.derives or not one.plan.projected:
        return state
    return {**state, **derived(recipe, WHOLE, one.plan, 0, g, state, int(state["refreshes"]))}


def _move_(
    recipe: Recipe, one: Member, g: Tensor, r: Tensor | None, st: State, lr: float, t: Clock, d: Tensor | None = None
) -> None:
    """One matrix or vector, and then its step: who interrupts a list finds that each weight knows its count."""
    group, count = one.group, one.state["step"]
    w, now = one.plan.oriented(one.p.detach()), float(count) + 1
    move_(recipe, WHOLE, w, g, r, st, lr, group["weight_decay"], group["maximize"], t, now, None, d=d)
    count.fill_(now)  # a third of the time of an addition
