"""Resets of moments outside a refresh: all moments of a parameter, or a share of their entries.

Weight-space methods reset the moments of a factor when its layer restarts; no other file does so. Entries that are
reset get a clock of their own. With the old clock, bias correction would take emptied moments for long averages. Adam's
next update would be 3.16 lr long (with betas 0.9 and 0.999), or 31.6 lr where only v was emptied.
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
    """Reset moments of one parameter in place, whatever store they have, and their clocks with them.

    Args:
        state: the state of the parameter, whose recipe has `Outside` as its refresh (with `single=True` for partial
            resets).
        how: "drop" resets all entries. "magnitude" resets the share `ratio` of entries whose first moment is smallest
            (and entries equal to the largest of them). "random" resets each entry with probability `ratio`. First and
            second moment are reset at the same entries: never m without v, or v without m.

    Returns:
        The number of entries that were reset.
    """
    spec = recipe.spec(plan.matrix, plan.rank or 0, plan.small)
    if how == "drop":
        # Zeros read as zeros in every store, so stored tensors need not be opened.
        for key, entry in spec.items():
            for suffix in cast(Store, entry.store).suffixes:
                state[key + suffix].zero_()
        # Clocks count from `refreshed_at`.
        if "refreshed_at" in state:
            state["refreshes"] += 1
            state["refreshed_at"].fill_(int(state["step"]))
        return math.prod(plan.shape)
    if AGE not in state:
        raise ValueError(f"{plan.name}: a partial reset needs an age of each entry, which this recipe does not keep")
    first = _read(state, "exp_avg", spec["exp_avg"], working)
    lost = _smallest(first.abs(), ratio) if how == "magnitude" else _any(first, ratio, plan, int(state["step"]))
    # This includes the ages, which are the clocks of the entries.
    for key, entry in spec.items():
        x = _read(state, key, entry, working)
        store = cast(Store, entry.store)
        # Codes cannot be masked: a code of 0 does not stand for the number 0 in any of the narrow stores.
        store.write_({s: state[key + s] for s in store.suffixes}, x.masked_fill(lost, 0), None)
    return int(lost.sum())


def _read(state: dict[str, Tensor], key: str, spec: Spec, working: torch.dtype) -> Tensor:
    """Return one state tensor in the working dtype, however it is stored."""
    store = cast(Store, spec.store)
    return store.read({s: state[key + s] for s in store.suffixes}, spec.shape, working)


def _smallest(x: Tensor, ratio: float) -> Tensor:
    """Return a mask of the entries that are not above the `ratio`-quantile of x."""
    count = math.floor(ratio * x.numel())
    # A GPU finds the quantile of one long row no faster in another way, and in a deterministic way only by sorting.
    return x <= x.flatten().sort().values[count - 1] if count else torch.zeros_like(x, dtype=torch.bool)


def _any(x: Tensor, ratio: float, plan: Plan, time: int) -> Tensor:
    """Return a mask of random entries, each set with probability `ratio`; the same on every device."""
    return ops.uniform(tuple(x.shape), plan.key, ops.stream_of("reset", time), x.device) < ratio
