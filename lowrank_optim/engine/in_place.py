"""Updates of members where their tensors are stored: nothing is opened, refitted, stacked or written back.

A float32 matrix between refreshes, or a float32 vector, needs no chunk: `update.move_`, the lines of `recipe.py`, runs
on its own tensors. Where a kernel takes lists of tensors, it does its part for all members at once, so a norm vector or
a tiny matrix costs little more than its place in a list (`fused.py` knows these kernels). `grouping.py` decides which
members come here. The members of one call share recipe, group, dtype, device and clock.
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
    """Return the steps that the moments of a member have seen, this one included."""
    # A matrix that has no basis yet has -1 here; its moments have seen every step.
    birth = max(0, int(member.state["refreshed_at"])) if recipe.refresh.restarts else 0
    return float(int(member.state["step"]) + 1 - birth)


def whole_(recipe: Recipe, members: list[Member]) -> None:
    """Update plain parameters, all with one kernel."""
    group, states = members[0].group, [member.state for member in members]
    params, grads = [member.p.detach() for member in members], [member.grad for member in members]
    t = clock(members[0], recipe)
    fused.whole(recipe)(recipe, params, grads, states, float(group["lr"]), group["weight_decay"], t)  # type: ignore[misc]
    # All weights have changed in the one call above, so their counts follow in one call, too.
    torch._foreach_add_([state["step"] for state in states], 1)


def together_(recipe: Recipe, members: list[Member]) -> None:
    """Update matrices between refreshes: products matrix by matrix, the directions of a batch with one kernel."""
    t = clock(members[0], recipe)
    # R (r, n) = P^T G reads G (m, n); the kernel reads R and both moments (r, n), and finds D (r, n). R of a whole
    # batch is held until its kernel has run, so a batch is what stays in cache.
    for batch in in_cache(members):
        g = [member.plan.oriented(member.grad) for member in batch]  # (m, n), views of p.grad
        states = [_state(recipe, member, x) for member, x in zip(batch, g, strict=True)]
        r = [recipe.basis.down(WHOLE, x, st) for x, st in zip(g, states, strict=True)]
        d = fused.directions(recipe, states, r, g, t)
        for i, member in enumerate(batch):
            _move_(recipe, member, g[i], r[i], states[i], t, d[i])


def alone_(recipe: Recipe, members: list[Member]) -> None:
    """Update matrices and vectors one at a time."""
    t: Clock = clock(members[0], recipe)
    for member in members:
        g = member.plan.oriented(member.grad)
        st = _state(recipe, member, g)
        g = recipe.residual.before(g, st)
        # Where each coordinate has an age, the clock is a tensor (r, 1); else the members share a number.
        _move_(recipe, member, g, None, st, ages_(st, recipe.refresh, g.dtype) if recipe.aged else t)


def _state(recipe: Recipe, member: Member, g: Tensor) -> State:
    """Return all tensors that a step reads: the stored ones, and those that the basis derives and nobody stores."""
    state = member.state
    if not recipe.basis.derives or not member.plan.projected:
        return state
    # A new dict: derived tensors live for this step only, while the stored ones are updated where they are.
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
    count.fill_(step)  # takes a third of the time of an addition
