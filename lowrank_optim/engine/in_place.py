"""Updates members where their tensors are stored: nothing is opened, refitted, stacked or written back.

Such members need no chunk: `update.move_`, the lines of `recipe.py`, runs on their own tensors. Where a kernel takes
lists of tensors, it does its part for all members at once, so a norm vector or a tiny matrix costs little more than its
place in a list (`fused.py` knows these kernels). `grouping.py` decides who comes here. The members of one call share
recipe, group, dtype, device and clock.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipe.algebra import WHOLE
from ..recipe.recipe import Clock, Recipe, State
from . import fused
from .chunk import ages_
from .gradients import in_cache
from .member import Member
from .refresh import derived
from .update import MoveArgs, move_


def clock(member: Member, recipe: Recipe) -> float:
    """Return the steps that the moments have seen, this one included."""
    birth = max(0, int(member.state["refreshed_at"])) if recipe.refresh.restarts else 0
    return float(int(member.state["step"]) + 1 - birth)


def whole_(recipe: Recipe, members: list[Member]) -> None:
    """Update plain parameters, all in one kernel."""
    group, states = members[0].group, [member.state for member in members]
    params, grads = [member.p.detach() for member in members], [member.grad for member in members]
    t = clock(members[0], recipe)
    fused.whole(recipe)(recipe, params, grads, states, float(group["lr"]), group["weight_decay"], t)  # type: ignore[misc]
    torch._foreach_add_([state["step"] for state in states], 1)


def together_(recipe: Recipe, members: list[Member]) -> None:
    """Update matrices between refreshes: products one by one, the direction of all in one kernel."""
    t = clock(members[0], recipe)
    # The coordinates R (r, n) of a whole batch are held until its kernel has run, so a batch is what stays in cache.
    for batch in in_cache(members):
        g = [member.plan.oriented(member.grad) for member in batch]  # (m, n), views of p.grad
        states = [_state(recipe, member, x) for member, x in zip(batch, g, strict=True)]
        r = [recipe.basis.down(WHOLE, x, st) for x, st in zip(g, states, strict=True)]
        d = fused.directions(recipe, states, r, g, t)
        for i, member in enumerate(batch):
            _move_(recipe, member, g[i], r[i], states[i], t, d[i])


def alone_(recipe: Recipe, members: list[Member]) -> None:
    """Update matrices and vectors one by one."""
    t: Clock = clock(members[0], recipe)
    for member in members:
        g = member.plan.oriented(member.grad)
        st = _state(recipe, member, g)
        g = recipe.residual.before(g, st)
        _move_(recipe, member, g, None, st, ages_(st, recipe.refresh, g.dtype) if recipe.aged else t)


def _state(recipe: Recipe, member: Member, g: Tensor) -> State:
    """Return all tensors that a step needs: the stored ones, and what the basis derives and nobody stores."""
    state = member.state
    if not recipe.basis.derives or not member.plan.projected:
        return state
    return {**state, **derived(recipe, WHOLE, member.plan, 0, g, state, int(state["refreshes"]))}


def _move_(
    recipe: Recipe, member: Member, g: Tensor, r: Tensor | None, st: State, t: Clock, d: Tensor | None = None
) -> None:
    """Update one matrix or vector, then increment its step count.

    The count follows the weight immediately, so an interrupted list leaves every parameter consistent.
    """
    group, count = member.group, member.state["step"]
    w, step = member.plan.oriented(member.p.detach()), float(count) + 1
    lr, decay, ascend = float(group["lr"]), group["weight_decay"], group["maximize"]
    move_(MoveArgs(recipe, WHOLE, w, g, r, st, lr, decay, ascend, t, step, d=d))
    count.fill_(step)  # a third of the time of an addition
