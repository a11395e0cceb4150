"""Plain parameters that one kernel updates as they lie, several at a time: no chunk is formed, nothing copied.

What has such a kernel says `parts/fused.py`: AdamW on float32 tensors. A norm vector then costs a place in a list.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .distributed.layout import HERE
from .forming import Asked, Member, RecipeOf
from .parts import fused
from .recipe import AGE, Clock


def update_listed_(members: list[Member], recipe_of: RecipeOf, asked: Asked) -> list[Member]:
    """Updates those of the members, all with finite gradients, that it can; returns the others."""
    lists: dict[tuple[Any, ...], list[Member]] = {}
    others = []
    for one in members:
        kernel = None if one.plan.projected else fused.whole(asked.recipe(one.plan, one.group, recipe_of))
        if kernel is None or not _fits(one):
            others.append(one)
        else:
            lists.setdefault((kernel, id(one.group), one.p.dtype, one.p.device), []).append(one)
    for (kernel, *_), some in lists.items():
        group, states = some[0].group, [one.state for one in some]
        tensors = [one.p.detach() for one in some], [one.grad for one in some], states
        recipe, clocks = asked.recipe(some[0].plan, group, recipe_of), [_clock(state) for state in states]
        kernel(recipe, *tensors, group["lr"], group["weight_decay"], clocks)
        torch._foreach_add_([state["step"] for state in states], 1)
    return others


def _fits(one: Member) -> bool:
    """All of it is here, has one clock, and is laid out as a kernel wants it."""
    restarted = one.state.get("refreshed_at")
    one_clock = AGE not in one.state and (restarted is None or restarted.numel() == 1)
    return one.layout is HERE and one_clock and not one.group["maximize"] and fused.suits(one.p, one.grad, one.state)


def _clock(state: dict[str, Tensor]) -> Clock:
    """Steps that the moments have seen, this one included."""
    birth = max(0, int(state["refreshed_at"])) if "refreshed_at" in state else 0
    return float(int(state["step"]) + 1 - birth)
