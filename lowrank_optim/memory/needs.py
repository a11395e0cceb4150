"""Count the bytes that one parameter needs: its state by kind, and what a step or a refresh holds for it."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..distributed.layout import HERE
from ..engine import fused, limits
from ..engine.state import COUNTERS as COUNTER_KEYS
from ..engine.state import fresh
from ..ops.blocks import largest_block
from ..ops.philox import WORKSPACE
from ..ops.quantize import PIECE
from ..optimizer import LowRankOptimizer
from ..recipe.plan import Plan
from ..recipe.recipe import Recipe
from ..recipe.store import Spec, Store
from ..recipe.weights import is_packed, working_dtype

BASES, COUNTERS = "bases", "counters"  # kinds of state


class Needs(NamedTuple):
    """The bytes of one parameter: state by kind, shared tensors by name, and workspaces.

    Attributes:
        listed: coordinates and derived bases that stay alive together with those of other matrices in a list.
    """

    state: Counter[str]
    shared: dict[str, int]
    step: int
    refresh: int
    listed: int = 0


def needs(optimizer: LowRankOptimizer, p: Tensor, group: dict[str, Any]) -> Needs:
    """Return the bytes that one parameter needs in this process."""
    layout, state = optimizer.table.layouts[p], expected_state(optimizer, p, group)
    plan = layout.plan(optimizer.table.plans[p])
    if not plan.count:  # other processes have all matrices of a stack
        return Needs(state, {}, 0, 0)
    recipe, shared, refresh, listed = optimizer.table.recipe(plan, group), dict[str, int](), 0, 0
    if plan.projected:
        size = working_dtype(p).itemsize
        shared = {key: count * size for key, count in recipe.basis.shared(plan.matrix).items()}
        refresh = _refresh_bytes(layout.here(p), plan, recipe)
        if layout is HERE and p.nbytes <= limits.CACHE and p.dtype == working_dtype(p) and fused.listed(recipe):
            rank = plan.rank or 0
            r = math.prod(recipe.basis.coordinates(plan.matrix, rank))
            # R alone if the recipe is thin; otherwise D is alive next to it.
            listed = (r * (1 if recipe.thin else 2) + recipe.basis.derived(plan.matrix, rank)) * size
    return Needs(state, shared, _step_bytes(layout.here(p), plan, recipe, group), refresh, listed)


def expected_state(
    optimizer: LowRankOptimizer, p: Tensor, group: dict[str, Any], plan: Plan | None = None
) -> Counter[str]:
    """Return the bytes of the state of one parameter, by kind.

    Args:
        group, plan: may differ from the parameter's own, to ask what another option would cost.
    """
    if not (p.requires_grad or optimizer.table.state(p)):
        return Counter()  # frozen: no state yet
    plan = optimizer.table.plans[p] if plan is None else plan
    recipe, found = optimizer.table.recipe(plan, group), Counter[str]()
    kinds = state_kinds(recipe, plan)
    for key, tensor in fresh(p, plan, recipe, group, optimizer.table.layouts[p], "meta").items():
        found[kinds.get(key, key)] += optimizer.table.layouts[p].here(tensor).nbytes
    return found


def state_kinds(recipe: Recipe, plan: Plan) -> dict[str, str]:
    """Return the kind of each key of a parameter's state: BASES, COUNTERS, or the key itself without its suffix."""
    fitted = recipe.basis.spec(plan.matrix, plan.rank or 0)
    kinds = dict.fromkeys(COUNTER_KEYS, COUNTERS)
    for key, spec in recipe.spec(plan.matrix, plan.rank or 0, plan.small).items():
        kinds |= {key + suffix: BASES if key in fitted else key for suffix in cast(Store, spec.store).suffixes}
    return kinds


def _step_bytes(p: Tensor, plan: Plan, recipe: Recipe, group: dict[str, Any]) -> int:
    """Return the workspace of a step without a refresh.

    It holds R with scratch of its size, and float32 copies of everything stored in 16 bits: G, blocks of W, state.
    """
    size, working, rank = p.numel(), working_dtype(p), plan.rank or 0
    share = _share(p, plan, recipe)
    elements = plan.count * _working_elements(plan, recipe, rank)
    spec, closed = _narrow(plan, recipe, rank, working)
    specs = spec.values()
    # Narrow state is opened; if it changes at each step, its rounded result is a second tensor. Closed state is worked
    # on by a kernel, which in plain torch opens a piece at a time.
    for key, tensor in spec.items():
        count = plan.count * math.prod(tensor.shape)
        elements += min(count, PIECE) if key in closed else count * (1 if tensor.steady else 2)
    lifted = plan.projected and not plan.batch and recipe.residual.lifts
    block = recipe.basis.add_workspace(plan.matrix, rank) if lifted else 0
    if is_packed(p):
        elements += 4 * size
    elif p.dtype != working:  # all of G, or a block of G and then a block of W
        elements += 0 if recipe.thin else size
        worked_on = (math.ceil(share * size),) if recipe.elementwise else (math.ceil(share * plan.count), *plan.matrix)
        block = largest_block(worked_on)
    rounds = any(not spec.steady for spec in specs) or (
        group["bf16_update"] == "stochastic" and p.dtype == torch.bfloat16
    )
    return int((share * elements + block) * working.itemsize) + (WORKSPACE if rounds else 0)


def _share(p: Tensor, plan: Plan, recipe: Recipe) -> float:
    """Return the fraction of a parameter that is worked on at once."""
    if recipe.elementwise:
        return min(1.0, limits.SLICE / max(1, p.numel()))
    if plan.batch:
        return min(1.0, max(1 / plan.count, limits.CHUNK_BYTES / max(1, p.numel() * working_dtype(p).itemsize)))
    return 1.0


def _narrow(plan: Plan, recipe: Recipe, rank: int, working: torch.dtype) -> tuple[dict[str, Spec], set[str]]:
    """Return the narrow state by key, and the keys that a step without a refresh never opens."""
    spec = recipe.spec(plan.matrix, rank, plan.small)
    narrow = {key: tensor for key, tensor in spec.items() if tensor.store and tensor.store.narrow}
    return narrow, fused.stays_closed(recipe, spec, working, bool(plan.batch)) & narrow.keys()


def _refresh_bytes(p: Tensor, plan: Plan, recipe: Recipe) -> int:
    """Return the workspace of fitting one basis.

    It includes the narrow moments that are opened for the turn, and the float32 copy of a whole 16-bit gradient.
    """
    (m, n), rank, working = plan.matrix, plan.rank or 0, working_dtype(p)
    narrow, closed = _narrow(plan, recipe, rank, working)
    elements = recipe.basis.fit_workspace(m, n, rank)
    if recipe.refresh.turns or recipe.refresh.restarts:
        # Moments that a usual step leaves closed are opened here, and written back from a second tensor.
        elements += plan.count * sum(2 * math.prod(narrow[key].shape) for key in closed)
    if recipe.thin and p.dtype != working and not is_packed(p):
        elements += math.ceil(_share(p, plan, recipe) * p.numel())
    return elements * working.itemsize


def _working_elements(plan: Plan, recipe: Recipe, rank: int) -> int:
    """Return the most elements that `update.py` holds at once for one matrix, besides G, W and the state."""
    shape, size = plan.matrix, math.prod(plan.matrix)
    r = math.prod(recipe.basis.coordinates(shape, rank))
    rest, scratch = recipe.residual.workspace(shape, r), recipe.scaling.scratch
    if recipe.scaling_in == "subspace":
        most = r + recipe.scaling.workspace(r) + rest
    elif recipe.momentum_of == "gradient":
        # squares a piece at a time, in float64, and their sums over rows and over columns
        sums = 2 * sum(shape)
        scaled = max(r, min(size, PIECE) + sums) if recipe.scaling.per_column(shape) else size * (1 + scratch)
        most = r + max(rest, r + scaled)
    else:
        most = max(recipe.scaling.workspace(size), size + r + rest)
    derived = recipe.basis.derived(shape, rank) * (2 if plan.batch else 1)
    return max(recipe.basis.derive_workspace(shape, rank), derived + recipe.basis.step_workspace(shape, rank) + most)
