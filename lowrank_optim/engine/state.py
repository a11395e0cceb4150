"""The persistent tensors of one parameter: how they begin, where they live, how they are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from .. import checks
from ..distributed.layout import Layout
from ..recipe.plan import Plan
from ..recipe.recipe import Recipe
from ..recipe.store import Kept, Store
from ..recipe.weights import COMPENSATION, is_packed, working_dtype

COUNTERS = {
    "step",
    "skipped",
    "refreshes",
    "refreshed_at",
    "refresh_gap",
    "overlaps",
}  # on the CPU, where reading them costs no synchronisation, whatever torch's defaults are
_COUNT: Any = {"dtype": torch.float32, "device": "cpu"}


def fresh(
    p: Tensor,
    plan: Plan,
    recipe: Recipe,
    group: dict[str, Any],
    layout: Layout,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """All state before the first step; on the device of the parameter, or where it only is to be counted on "meta"."""
    device = p.device if device is None else device
    state = {"step": torch.tensor(0.0, **_COUNT), "skipped": torch.tensor(0, device="cpu")}
    for key, one in kept(plan, recipe, layout, working_dtype(p)):
        state[key] = layout.zeros(plan.batch, one.shape, one.dtype, device)
    if plan.projected or recipe.refresh.restarts:
        state["refreshes"] = torch.zeros(plan.batch, dtype=torch.int64, device="cpu")
        state["refreshed_at"] = torch.full(plan.batch, -1, device="cpu")
        for key, counter in recipe.refresh.counters().items():
            state[key] = counter.expand(plan.batch + tuple(counter.shape)).clone()
    if _compensated(p, group):
        state[COMPENSATION] = torch.zeros_like(p.detach(), device=device)
    return state


def kept(plan: Plan, recipe: Recipe, layout: Layout, working: torch.dtype) -> Iterator[tuple[str, Kept]]:
    """What the parts ask for, of one matrix; a side that is cut is a `Side`."""
    for key, spec in recipe.spec(layout.matrix(plan), plan.rank or 0, plan.small).items():
        store = cast(Store, spec.store)
        for suffix, one in zip(store.suffixes, store.layout(spec.shape, working), strict=True):
            yield key + suffix, one


def follow(state: dict[str, Tensor], p: Tensor, group: dict[str, Any]) -> None:
    """Keeps state fit for its parameter, if the model was moved or cast after the optimizer was built."""
    device = p.device
    for key, tensor in state.items():
        if tensor.device != device and key not in COUNTERS:
            state[key] = tensor.to(device)
    if _compensated(p, group):
        if COMPENSATION not in state:
            state[COMPENSATION] = torch.zeros_like(p)
    elif COMPENSATION in state:
        p.add_(state.pop(COMPENSATION))  # the weight, cast or rounded in another way, owes nothing from now on


def _compensated(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether rounding errors of a 16-bit weight are kept."""
    if group["bf16_update"] != "kahan":
        return False
    return p.dtype in (torch.bfloat16, torch.float16) and not is_packed(p)


def loaded(name: str, saved: Mapping[str, Any], ours: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Saved state in the dtypes, places and layouts of `ours`, or a ValueError if it does not fit.

    Copies: the saved dict may belong to a live optimizer, whose counters must not move with ours. State for parameters
    that have no memory yet (meta) waits where it was.
    """
    checks.loaded_state(name, saved, ours)
    return {key: layout.part(saved[key], new) for key, new in ours.items()}
