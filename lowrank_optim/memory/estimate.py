"""Bytes before anything is allocated, from the recipe and the shapes; works on the meta device."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks, hyperparameters
from ..distributed.dtensors import local, meta
from ..distributed.layout import HERE
from ..engine import fused, limits
from ..engine.state import COUNTERS as COUNTER_KEYS
from ..engine.state import fresh
from ..groups import param_groups
from ..layers import checks as layer_checks
from ..modes.gradient_memory import most_gradients
from ..ops.blocks import largest_block
from ..ops.philox import WORKSPACE
from ..ops.quantize import PIECE
from ..optimizer import LowRankOptimizer
from ..recipe.plan import Plan
from ..recipe.recipe import Recipe
from ..recipe.store import Spec, Store
from ..recipe.weights import is_packed, working_dtype
from ..reports.report import human, state_bytes
from ..weight_space import WeightSpaceOptimizer
from . import strategies as shares
from .strategies import Strategy

BASES, COUNTERS = "bases", "counters"  # kinds of state
Groups = list[dict[str, Any]]
Shapes = Mapping[str, tuple[int, ...]] | Iterable[tuple[int, ...]]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training process, without activations; of a sharded model (DTensor) what this process has of it.

    Attributes:
        weights: of the parameters that are trained; with weight-space methods of the whole converted model, frozen
            bases and indices included (exact copies of bases are in main memory, and are not).
        gradients: of the same, alive at once.
        states: moments and counters; exact.
        bases: exact.
        shared: dictionaries, one per width of matrix, which come with the first step and are in no checkpoint.
        step_workspace: the most that a step without a refresh holds for one matrix: its coordinates, and where weights
            are in 16 bits a block of a few MiB; all of G in float32 as well if the method reads all of it. Where equal
            matrices are stacked (on accelerators, or with `foreach=True`), the stack takes up to 64 MiB per operand
            instead. Weights and gradients with strides of their own are copied, which is not counted.
        refresh_workspace: the most that refitting one basis, or restarting one layer, holds (LAPACK's own buffers not
            counted), with moments in few bits that it turns or resets. Sharded matrices are refitted together, up to
            64 MiB of gradients at once.
        masters: the float32 copies of its part of the weights that DeepSpeed keeps.
        sent_per_step: with a strategy, bytes that this process hands to collectives in a step without a refresh: for
            the update (as `report()` counts, so beside the norms of gradients), and under DistributedDataParallel for
            gradients. What FSDP2 and DeepSpeed send of their own accord is not in it. None: not known.
        sent_per_refresh: in addition, when all bases are refitted, not for the first time; as on accelerators. On CPUs
            it is less: there ranks look whether a basis needs a second pass, which costs nothing, and sends.
    """

    weights: int
    gradients: int
    states: int
    bases: int
    shared: int
    step_workspace: int
    refresh_workspace: int
    masters: int = 0
    sent_per_step: float | None = 0
    sent_per_refresh: float | None = 0

    @property
    def optimizer(self) -> int:
        """Persistent bytes of the optimizer."""
        return self.states + self.bases

    @property
    def total(self) -> int:
        """Everything at the moment when it is most: while the largest matrix refits its basis within a step."""
        workspaces = self.step_workspace + self.refresh_workspace
        return self.weights + self.masters + self.gradients + self.optimizer + self.shared + workspaces

    def __str__(self) -> str:
        rows = ["weights", "gradients", "states", "bases", "shared", "step_workspace", "refresh_workspace", "total"]
        rows += [row for row in ("masters", "sent_per_step", "sent_per_refresh") if getattr(self, row)]
        return "\n".join(f"{row.replace('_', ' '):<18}{human(getattr(self, row)):>12}" for row in rows)


def estimate_memory(
    source: nn.Module | Groups | Shapes,
    optimizer: type[Optimizer],
    *,
    dtype: torch.dtype | None = None,
    step_in_backward: bool = False,
    accumulation_steps: int = 1,
    world_size: int = 1,
    strategy: Strategy | None = None,
    **options: Any,
) -> MemoryEstimate:
    """What training with `optimizer(..., **options)` will hold.

    With `step_in_backward`, gradients are the most of them alive at once: the largest one (with `foreach=True`, and on
    accelerators without it being said here, up to 64 MiB more), and with accumulation also what is kept between
    micro-batches: r x n coordinates of matrices whose method reads only these, whole gradients of all others. That is
    for windows without a refresh: in the first one, and in those with a refresh, gradients of the matrices that are due
    accumulate whole, unless `basis_from="micro-batch"`.

    Args:
        source: a model (also on the meta device, or sharded; grouped by `param_groups`), groups that `param_groups`
            made, or shapes, by name or bare.
        optimizer: a class of this package, or of torch.optim (then workspaces are not known and 0). Some of torch's,
            such as Adafactor, cannot step without memory and raise a ValueError.
        dtype: of weights and gradients; default: the model's own, float32 for shapes.
        step_in_backward: with `lowrank_optim.step_in_backward`, which takes classes of this package only.
        accumulation_steps: backward passes per step. Without `step_in_backward` gradients accumulate whole, and the
            newest one is beside them for a moment.
        world_size: number of processes; the estimate is of the one that holds most.
        strategy: how they share the work. "ddp": DistributedDataParallel (with `gradient_as_bucket_view=True`, or its
            buckets are there beside gradients); "ddp_project": with our hook; "fsdp2": `fully_shard`; "zero1" to
            "zero3": DeepSpeed. State of the last two is counted exactly, and their refusals are raised. Whole layers
            that are gathered for a moment are not counted.
        options: keyword arguments of the optimizer.

    Example::

        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        print(lowrank_optim.estimate_memory(model, lowrank_optim.GaLoreAdamW, rank=1024, dtype=torch.bfloat16))
        sharing = {"world_size": 8, "strategy": "fsdp2", "proj_type": "right"}
        print(lowrank_optim.estimate_memory(model, lowrank_optim.GaLoreAdamW, rank=1024, **sharing))
    """
    if not isinstance(optimizer, type):
        raise TypeError(f"optimizer must be a class, and its options keywords, got {optimizer!r:.60}")
    hyperparameters.check({"accumulation_steps": accumulation_steps}, {})
    low_rank = issubclass(optimizer, LowRankOptimizer)
    if step_in_backward and not low_rank:
        raise ValueError(
            f"step_in_backward takes optimizers of lowrank_optim, got {optimizer.__name__}. Leave it out, or estimate "
            "a class of this package"
        )
    converts = issubclass(optimizer, WeightSpaceOptimizer)
    shares.check(strategy, world_size, optimizer.__name__ if converts else "", step_in_backward)
    if issubclass(optimizer, WeightSpaceOptimizer):
        return _of_converted(source, optimizer, dtype, step_in_backward, accumulation_steps, options, strategy)
    groups = _meta_groups(source, dtype, low_rank)
    for name, p in () if low_rank else (entry for group in groups for entry in group["params"]):
        checks.whole(name, p, f"estimate_memory of {optimizer.__name__}")
    shares.bare(groups, strategy)
    if strategy == "fsdp2" and not low_rank:
        groups = [{"params": [(name, _lines(p, world_size)) for name, p in group["params"]]} for group in groups]
    params = [p for group in groups for _, p in group["params"]]
    sizes = [local(p).nbytes for p in params]
    weights = sum(getattr(p, "packed_bytes", size) for p, size in zip(params, sizes, strict=True))
    instance = optimizer(_masters(groups) if strategy in shares.ZERO else groups, **options)
    gradients = whole_gradients(sizes, accumulation_steps)
    if not isinstance(instance, LowRankOptimizer):
        updated = [p for group in instance.param_groups for p in group["params"]]
        one = MemoryEstimate(weights, gradients, _bytes_after_step(instance, updated), 0, 0, 0, 0)
        return _of_torch(one, params, strategy, world_size)
    if step_in_backward:
        return expected(instance, weights, most_gradients(instance.table, accumulation_steps))
    if strategy is None:
        return expected(instance, weights, gradients)
    return _of_rank(instance, params, strategy, world_size, weights, gradients)


def _of_rank(
    instance: LowRankOptimizer,
    params: list[nn.Parameter],
    strategy: str,
    world_size: int,
    weights: int,
    gradients: int,
) -> MemoryEstimate:
    """The process that holds most."""
    if strategy == "ddp":
        return replace(expected(instance, weights, gradients), **_fields(shares.averaged(params)))
    if strategy == "ddp_project":
        return replace(expected(instance, weights, gradients), **_fields(shares.projected(instance)))
    if strategy == "fsdp2":
        here, sent = shares.sharded(instance, world_size)
        return replace(expected(instance, here, here), **_fields(sent))
    ranks = [expected(instance, 0, 0) for _ in shares.rank_by_rank(instance, strategy, world_size)]
    most = max(ranks, key=lambda one: one.optimizer)
    parts = shares.partitions(params, strategy, world_size) | shares.sent(instance)  # all ranks send the same
    return replace(most, **_fields(parts))


def _of_torch(one: MemoryEstimate, params: list[nn.Parameter], strategy: str | None, world_size: int) -> MemoryEstimate:
    """An optimizer whose state is like its parameters, and cut like them."""
    if strategy in ("ddp", "ddp_project"):
        return replace(one, **_fields(shares.averaged(params)))
    if strategy in shares.ZERO:
        parts = {**shares.partitions(params, strategy, world_size), "states": -(-one.states // world_size)}
        return replace(one, **_fields(parts))
    return one


def _masters(groups: Groups) -> Groups:
    """What DeepSpeed lets an optimizer update: float32 copies."""
    return [{**group, "params": [(name, nn.Parameter(p.float())) for name, p in group["params"]]} for group in groups]


def _fields(changes: shares.Changes) -> dict[str, Any]:
    return dict(changes)


def _lines(p: nn.Parameter, world_size: int) -> nn.Parameter:
    """What fully_shard leaves of a parameter in the first process."""
    return nn.Parameter(p[: -(-len(p) // world_size)].detach()) if p.dim() else p


def _of_converted(
    source: Any,
    optimizer: type[WeightSpaceOptimizer],
    dtype: torch.dtype | None,
    in_backward: bool,
    accumulation_steps: int,
    options: dict[str, Any],
    strategy: str | None,
) -> MemoryEstimate:
    """Methods that change how weights are kept: the model is converted, on the meta device."""
    model = _meta_copy(layer_checks.whole_model(source), dtype)
    instance = optimizer(model, **options)
    tensors: set[Tensor] = {*model.parameters(), *model.buffers()}
    weights = sum(cast(Any, x).stored_bytes() if is_packed(x) else x.nbytes for x in tensors)
    if in_backward:
        return expected(instance, weights, most_gradients(instance.table, accumulation_steps))
    trained = [p.nbytes for p, _ in instance.table.members() if p.requires_grad]
    one = expected(instance, weights, whole_gradients(trained, accumulation_steps))
    return one if strategy is None else replace(one, sent_per_step=sum(trained))


def _meta_copy(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy without memory."""
    memo: dict[int, Any] = {}
    for x in (*model.parameters(), *model.buffers()):
        kind = dtype if dtype is not None and x.is_floating_point() else x.dtype
        meta = torch.empty(x.shape, dtype=kind, device="meta")
        memo[id(x)] = nn.Parameter(meta, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else meta
    return copy.deepcopy(model, memo)


def whole_gradients(sizes: list[int], accumulation_steps: int = 1) -> int:
    """Bytes of gradients that stay until the step; where they accumulate, the newest is beside its sum for a moment."""
    return sum(sizes) + (max(sizes, default=0) if accumulation_steps > 1 else 0)


def expected(optimizer: LowRankOptimizer, weights: int, gradients: int) -> MemoryEstimate:
    """What an optimizer will hold, from its parameters' shapes alone."""
    step, refresh, listed, share = 0, optimizer.restart_workspace(), 0, 0.0
    kept: Counter[str] = Counter()
    shared: dict[str, int] = {}
    seen: dict[tuple[Any, ...], _Needs] = {}
    for p, group in optimizer.table.members():
        plan, layout = optimizer.table.plans[p], optimizer.table.layouts[p]
        has_state = p.requires_grad or bool(optimizer.table.state(p))
        equal = id(group), plan.shape, plan.matrix, plan.side, plan.rank, layout.key, p.dtype, is_packed(p), has_state
        if equal not in seen:  # the layers of a large model are
            seen[equal] = _needs(optimizer, p, group)
        one = seen[equal]
        kept.update(one.state)
        shared |= one.shared
        step, refresh, listed = max(step, one.step), max(refresh, one.refresh), listed + one.listed
        share = max(share, one.listed / max(1, p.nbytes))
    step += min(listed, math.ceil(share * limits.CACHE))
    bases = kept.pop(BASES, 0)
    return MemoryEstimate(weights, gradients, kept.total(), bases, sum(shared.values()), step, refresh)


class _Needs(NamedTuple):
    """Bytes of one parameter: state by kind, shared tensors by name, workspaces."""

    state: Counter[str]
    shared: dict[str, int]
    step: int
    refresh: int
    listed: int = 0  # coordinates, where other matrices are updated together with it, and what is derived for it


def _needs(optimizer: LowRankOptimizer, p: Tensor, group: dict[str, Any]) -> _Needs:
    layout, state = optimizer.table.layouts[p], expected_state(optimizer, p, group)
    plan = layout.plan(optimizer.table.plans[p])
    if not plan.count:  # other processes have all of a stack
        return _Needs(state, {}, 0, 0)
    recipe, shared, refresh, listed = optimizer.table.recipe(plan, group), dict[str, int](), 0, 0
    if plan.projected:
        size = working_dtype(p).itemsize
        shared = {key: count * size for key, count in recipe.basis.shared(plan.matrix).items()}
        refresh = _refresh_bytes(layout.here(p), plan, recipe)
        if layout is HERE and p.nbytes <= limits.CACHE and p.dtype == working_dtype(p) and fused.listed(recipe):
            rank = plan.rank or 0
            r = math.prod(recipe.basis.coordinates(plan.matrix, rank))
            listed = (
                r * (1 if recipe.thin else 2) + recipe.basis.derived(plan.matrix, rank)
            ) * size  # R, and D beside it
    return _Needs(state, shared, _step_bytes(layout.here(p), plan, recipe, group), refresh, listed)


def expected_state(
    optimizer: LowRankOptimizer, p: Tensor, group: dict[str, Any], plan: Plan | None = None
) -> Counter[str]:
    """Bytes of the state of one parameter by kind; `group` and `plan` may be others than it has."""
    if not (p.requires_grad or optimizer.table.state(p)):
        return Counter()  # frozen: no state yet
    plan = optimizer.table.plans[p] if plan is None else plan
    recipe, found = optimizer.table.recipe(plan, group), Counter[str]()
    kinds = state_kinds(recipe, plan)
    for key, tensor in fresh(p, plan, recipe, group, optimizer.table.layouts[p], "meta").items():
        found[kinds.get(key, key)] += optimizer.table.layouts[p].here(tensor).nbytes
    return found


def state_kinds(recipe: Recipe, plan: Plan) -> dict[str, str]:
    """What each key of a parameter's state is: a moment, a basis, a counter; others are called as their key."""
    fitted = recipe.basis.spec(plan.matrix, plan.rank or 0)
    kinds = dict.fromkeys(COUNTER_KEYS, COUNTERS)
    for key, spec in recipe.spec(plan.matrix, plan.rank or 0, plan.small).items():
        kinds |= {key + suffix: BASES if key in fitted else key for suffix in cast(Store, spec.store).suffixes}
    return kinds


def _step_bytes(p: Tensor, plan: Plan, recipe: Recipe, group: dict[str, Any]) -> int:
    """R and the scratch of its size, and whatever is kept in 16 bits and worked on in 32: G, blocks of W, state."""
    size, working, rank = p.numel(), working_dtype(p), plan.rank or 0
    share = _share(p, plan, recipe)
    elements = plan.count * _working_elements(plan, recipe, rank)
    spec, closed = _narrow(plan, recipe, rank, working)
    specs = spec.values()
    # opened, and for what changes at each step rounded; piece by piece where a kernel does it, if that is plain torch
    for key, one in spec.items():
        count = plan.count * math.prod(one.shape)
        elements += min(count, PIECE) if key in closed else count * (1 if one.steady else 2)
    lifted = plan.projected and not plan.batch and recipe.residual.lifts
    block = recipe.basis.add_workspace(plan.matrix, rank) if lifted else 0
    if is_packed(p):
        elements += 4 * size
    elif p.dtype != working:  # all of G, or a block of it and then one of W
        elements += 0 if recipe.thin else size
        some = (math.ceil(share * size),) if recipe.elementwise else (math.ceil(share * plan.count), *plan.matrix)
        block = largest_block(some)
    rounds = any(not spec.steady for spec in specs) or (
        group["bf16_update"] == "stochastic" and p.dtype == torch.bfloat16
    )
    return int((share * elements + block) * working.itemsize) + (WORKSPACE if rounds else 0)


def _share(p: Tensor, plan: Plan, recipe: Recipe) -> float:
    """What of a parameter is worked on at once."""
    if recipe.elementwise:
        return min(1.0, limits.SLICE / max(1, p.numel()))
    if plan.batch:
        return min(1.0, max(1 / plan.count, limits.CHUNK_BYTES / max(1, p.numel() * working_dtype(p).itemsize)))
    return 1.0


def _narrow(plan: Plan, recipe: Recipe, rank: int, working: torch.dtype) -> tuple[dict[str, Spec], set[str]]:
    """State that is kept in fewer bits than it is worked on, and the names of what of it a usual step never opens."""
    spec = recipe.spec(plan.matrix, rank, plan.small)
    narrow = {key: one for key, one in spec.items() if one.store and one.store.narrow}
    return narrow, fused.stays_closed(recipe, spec, working, bool(plan.batch)) & narrow.keys()


def _refresh_bytes(p: Tensor, plan: Plan, recipe: Recipe) -> int:
    """What fitting one basis takes, with the moments that are opened for it, and all of a gradient in 16 bits."""
    (m, n), rank, working = plan.matrix, plan.rank or 0, working_dtype(p)
    narrow, closed = _narrow(plan, recipe, rank, working)
    elements = recipe.basis.fit_workspace(m, n, rank)
    if recipe.refresh.turns or recipe.refresh.restarts:
        elements += plan.count * sum(2 * math.prod(narrow[key].shape) for key in closed)
    if recipe.thin and p.dtype != working and not is_packed(p):
        elements += math.ceil(_share(p, plan, recipe) * p.numel())
    return elements * working.itemsize


def _working_elements(plan: Plan, recipe: Recipe, rank: int) -> int:
    """What the lines of `update.py` hold at once for one matrix, beside G, W and the state."""
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


def _meta_groups(source: Any, dtype: torch.dtype | None, low_rank: bool) -> list[dict[str, Any]]:
    if isinstance(source, nn.Module):
        source = param_groups(source, verbose=False)
    source = source if isinstance(source, Mapping) else list(source)
    if not (isinstance(source, list) and source and isinstance(source[0], dict)):
        named = source.items() if isinstance(source, Mapping) else ((f"{i}", s) for i, s in enumerate(source))
        source = [{"params": [(name, _empty(shape)) for name, shape in named]}]
    groups = [{**group, "params": [_meta(p, i, dtype) for i, p in enumerate(group["params"])]} for group in source]
    return groups if low_rank else [{"params": group["params"]} for group in groups]


def _empty(shape: Any) -> Tensor:
    try:
        return torch.empty(tuple(shape), device="meta")
    except (TypeError, RuntimeError) as error:
        kind = type(shape).__name__
        raise TypeError(f"estimate_memory takes a model, groups or shapes, got something that holds {kind}") from error


def _meta(entry: Any, index: int, dtype: torch.dtype | None) -> tuple[str, nn.Parameter]:
    name, p = entry if isinstance(entry, tuple) else (f"{index}", entry)
    empty = nn.Parameter(meta(p, dtype or p.dtype))
    if is_packed(p):
        cast(Any, empty).packed_bytes = cast(Any, p).stored_bytes()
        cast(Any, empty).pack_ = None  # is_packed: it does its own rounding, and Kahan's compensation is not for it
    return name, empty


def _bytes_after_step(optimizer: Optimizer, params: list[nn.Parameter]) -> int:
    """torch.optim makes its state at the first step; on the meta device that costs nothing."""
    for p in params:
        p.grad = torch.empty_like(p)
    try:
        optimizer.step()
    except RuntimeError as error:
        name = type(optimizer).__name__
        raise ValueError(f"{name} cannot be estimated: its step needs numbers, not only shapes ({error})") from error
    return state_bytes(optimizer)
