"""The persistent tensors of one parameter: how they are created, how they follow their parameter, how they are loaded.

All state is plain tensors under string keys, and exists before the first step unless
the parameter is frozen or has no memory. Parts describe what they need in a
`Spec`; a `Store` says which tensors keep it. The counters of a parameter are here, too: `step`, `skipped` and, for each
matrix, `refreshes` and `refreshed_at`.
"""

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

# Counters are on the CPU, where reading them costs no synchronization. They name dtype and device themselves: in a
# default dtype of bfloat16 a step count would end at 256.
COUNTERS = {
    "step",
    "skipped",
    "refreshes",
    "refreshed_at",
    "refresh_gap",
    "overlaps",
}
_COUNT: Any = {"dtype": torch.float32, "device": "cpu"}


def fresh(
    p: Tensor,
    plan: Plan,
    recipe: Recipe,
    group: dict[str, Any],
    layout: Layout,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Return the state of a parameter before the first step.

    Args:
        device: of the new tensors, by default that of p; "meta" if they are only counted.
    """
    device = p.device if device is None else device
    state = {"step": torch.tensor(0.0, **_COUNT), "skipped": torch.tensor(0, device="cpu")}
    for key, stored in kept(plan, recipe, layout, working_dtype(p)):
        state[key] = layout.zeros(plan.batch, stored.shape, stored.dtype, device)
    # A matrix of a stack is refreshed when its own gradient allows, so each has counters: (experts,), or () for a
    # single matrix. -1 stands for a matrix that has no basis yet.
    if plan.projected or recipe.refresh.restarts:
        state["refreshes"] = torch.zeros(plan.batch, dtype=torch.int64, device="cpu")
        state["refreshed_at"] = torch.full(plan.batch, -1, device="cpu")
        for key, counter in recipe.refresh.counters().items():
            state[key] = counter.expand(plan.batch + tuple(counter.shape)).clone()
    if _compensated(p, group):
        state[COMPENSATION] = torch.zeros_like(p.detach(), device=device)
    return state


def kept(plan: Plan, recipe: Recipe, layout: Layout, working: torch.dtype) -> Iterator[tuple[str, Kept]]:
    """Yield (key, shape and dtype) of all stored tensors of one matrix; a side that is cut over ranks is a `Side`."""
    for key, spec in recipe.spec(layout.matrix(plan), plan.rank or 0, plan.small).items():
        store = cast(Store, spec.store)
        for suffix, stored in zip(store.suffixes, store.layout(spec.shape, working), strict=True):
            yield key + suffix, stored


def follow(state: dict[str, Tensor], p: Tensor, group: dict[str, Any]) -> None:
    """Keep state fit for its parameter, if the model was moved or cast after the optimizer was built."""
    device = p.device
    for key, tensor in state.items():
        if tensor.device != device and key not in COUNTERS:
            state[key] = tensor.to(device)
    if _compensated(p, group):
        if COMPENSATION not in state:
            state[COMPENSATION] = torch.zeros_like(p)
    elif COMPENSATION in state:
        # The weight is cast, or rounded in another way from now on. What rounding has kept from it is added to it.
        p.add_(state.pop(COMPENSATION))


def _compensated(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether the rounding errors of a 16-bit weight are kept, as `bf16_update="kahan"` asks."""
    if group["bf16_update"] != "kahan":
        return False
    return p.dtype in (torch.bfloat16, torch.float16) and not is_packed(p)


def loaded(name: str, saved: Mapping[str, Any], like: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return saved state in the dtypes, devices and layouts of `like`. Raise a ValueError if it does not fit.

    All tensors are copies: the saved dict may belong to a live optimizer, whose counters must not move with ours. State
    of a parameter that has no memory yet (meta) stays on the device where it was saved.
    """
    checks.loaded_state(name, saved, like)
    return {key: layout.part(saved[key], new) for key, new in like.items()}
