"""Members whose tensors are worked on as they lie: nothing is opened, refitted, stacked or written back.

They need no chunk. The lines of `recipe.py` are the same, and a kernel that takes lists does all of them at once, so a
norm vector or a tiny matrix costs little more than its place in a list. `parts/fused.py` knows these kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .apply import apply_
from .chunk import is_packed
from .distributed.algebra import WHOLE
from .distributed.layout import HERE
from .forming import Asked, Member, RecipeOf, in_cache, stacked
from .parts import fused
from .recipe import AGE, Recipe

Work = Callable[[Recipe, list[Member], float], None]


def update_listed_(members: list[Member], recipe_of: RecipeOf, asked: Asked) -> list[Member]:
    """Updates those of the members, all with finite gradients, that it can; returns the others."""
    lists: dict[tuple[Any, ...], list[Member]] = {}
    others = []
    for one in members:
        recipe = asked.recipe(one, recipe_of)
        work = _work(one, recipe, asked)
        if work is None:
            others.append(one)
        else:
            lists.setdefault((work, id(one.group), _clock(one, recipe), one.p.dtype, one.p.device), []).append(one)
    for (work, _, clock, *_), alike in lists.items():
        recipe = asked.recipe(alike[0], recipe_of)
        for some in in_cache(alike) if work is _project_ else [alike]:  # which holds R of all of them, and more
            work(recipe, some, clock)
            torch._foreach_add_([one.state["step"] for one in some], 1)
    return others


def _work(one: Member, recipe: Recipe, asked: Asked) -> Work | None:
    """What updates it, if all of it is here, has one clock, and is laid out as kernels want it."""
    known = fused.listed(recipe) if one.plan.projected else fused.whole(recipe) is not None
    if not known or one.layout is not HERE or one.projected or one.plan.batch or one.group["maximize"]:
        return None
    if AGE in one.state or is_packed(one.p) or not fused.suits(one.p, one.grad, one.state):
        return None
    if not one.plan.projected:
        return _whole_
    return None if stacked(one) or asked.spec(one).narrow or _due(one, recipe) else _project_


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


def _project_(recipe: Recipe, some: list[Member], t: float) -> None:
    """Matrices between refreshes: products one by one, the state of all in one kernel."""
    lr, decay = float(some[0].group["lr"]), some[0].group["weight_decay"]
    states = [one.state for one in some]
    g = [recipe.residual.before(one.plan.oriented(one.grad), one.state) for one in some]
    r = [recipe.basis.down(WHOLE, x, st) for x, st in zip(g, states, strict=True)]
    d = fused.directions(recipe, states, r, g, t)
    for i, one in enumerate(some):
        w, step = one.plan.oriented(one.p.detach()), float(one.state["step"]) + 1
        change = recipe.residual.after(WHOLE, recipe, one.state, g[i], r[i], d[i], 1.0)
        length = recipe.step_size(WHOLE, lr, w, step) * recipe.scale
        apply_(recipe, w, one.state, change.times(length), 1 - lr * decay if decay else 1.0)
