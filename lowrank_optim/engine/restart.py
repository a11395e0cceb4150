"""Moments that begin anew: all of a parameter's, or a share of them. The one place where that is done.

Whatever is reset gets a clock of its own. With the old one bias correction would take emptied moments for long
averages, and Adam's next update would be 3.16 lr (with betas 0.9 and 0.999), or 31.6 lr where only v was emptied.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from .. import ops
from ..recipe.plan import Plan
from ..recipe.recipe import AGE, Recipe
from ..recipe.store import Spec, Store

PARTIAL = ("magnitude", "random")


def reset_(
    state: dict[str, Tensor], plan: Plan, recipe: Recipe, working: torch.dtype, how: str = "drop", ratio: float = 1.0
) -> int:
    """Empties moments of one parameter in place, whatever they are stored in, and their clocks with them.

    Args:
        state: of the parameter, whose recipe has `Outside` as its refresh (with `single=True` for partial resets).
        how: "drop" takes all; "magnitude" the share `ratio` of entries whose first moment is smallest (and any that
            are equal to the largest of them); "random" as large a share of any. First and second moment are reset at
            the same entries: never m without v, or v without m.

    Returns:
        The number of entries that were reset.
    """
    spec = recipe.spec(plan.matrix, plan.rank or 0, plan.small)
    if how == "drop":
        for key, one in spec.items():
            for suffix in cast(Store, one.store).suffixes:
                state[key + suffix].zero_()
        if "refreshed_at" in state:
            state["refreshes"] += 1
            state["refreshed_at"].fill_(int(state["step"]))
        return math.prod(plan.shape)
    if AGE not in state:
        raise ValueError(f"{plan.name}: a partial reset needs an age of each entry, which this recipe does not keep")
    first = _read(state, "exp_avg", spec["exp_avg"], working)
    lost = _smallest(first.abs(), ratio) if how == "magnitude" else _any(first, ratio, plan, int(state["step"]))
    for key, one in spec.items():
        x = _read(state, key, one, working)
        store = cast(Store, one.store)
        # Codes cannot be masked: a code of 0 does not stand for the number 0 in any of the narrow stores.
        store.write_({s: state[key + s] for s in store.suffixes}, x.masked_fill(lost, 0), None)
    return int(lost.sum())


def _read(state: dict[str, Tensor], key: str, spec: Spec, working: torch.dtype) -> Tensor:
    store = cast(Store, spec.store)
    return store.read({s: state[key + s] for s in store.suffixes}, spec.shape, working)


def _smallest(x: Tensor, ratio: float) -> Tensor:
    """Where x is not above its `ratio`-quantile."""
    count = math.floor(ratio * x.numel())
    # by sorting: of one long line GPUs find it no faster in another way, and only so where algorithms are deterministic
    return x <= x.flatten().sort().values[count - 1] if count else torch.zeros_like(x, dtype=torch.bool)


def _any(x: Tensor, ratio: float, plan: Plan, time: int) -> Tensor:
    return ops.uniform(tuple(x.shape), plan.key, ops.stream_of("reset", time), x.device) < ratio
