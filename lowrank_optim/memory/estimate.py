"""Estimates of training memory, made before anything is allocated.

The bytes follow from the recipe and the shapes, so everything here works on the meta device.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks, hyperparameters
from ..distributed.dtensors import local, meta
from ..engine import limits
from ..groups import param_groups
from ..layers import checks as layer_checks
from ..modes.gradient_memory import most_gradients
from ..optimizer import LowRankOptimizer
from ..recipe.weights import is_packed
from ..reports.report import human, state_bytes
from ..weight_space import WeightSpaceOptimizer
from . import strategies as shares
from .needs import BASES, Needs, needs
from .strategies import Strategy

Groups = list[dict[str, Any]]
Shapes = Mapping[str, tuple[int, ...]] | Iterable[tuple[int, ...]]


@dataclass(frozen=True)
class MemoryEstimate:
    """The bytes of one training process, without activations. Of a sharded model (DTensor), its shards are counted.

    Attributes:
        weights: bytes of the trained parameters. With weight-space methods: of the whole converted model, including
            frozen bases and indices, without the exact copies of bases, which are in main memory.
        gradients: the most bytes of gradients that are alive at once.
        states: bytes of moments and counters; exact.
        bases: bytes of the bases; exact.
        shared: bytes of dictionaries, one per width of matrix. The first step makes them; no checkpoint has them.
        step_workspace: the most bytes that a step without a refresh holds for one matrix: its coordinates, with 16-bit
            weights a block of a few MiB, and all of G in float32 if the method reads all of it. Where equal matrices
            are stacked (on accelerators, or with `foreach=True`), the stack takes up to 64 MiB per operand instead.
            Copies of weights and gradients that are not contiguous are not counted.
        refresh_workspace: the most bytes that refitting one basis or restarting one layer holds, including the opened
            copies of narrow moments that it turns or resets. Buffers of LAPACK are not counted. Sharded matrices are
            refitted together, up to 64 MiB of gradients at once.
        masters: bytes of the float32 copies that DeepSpeed keeps of this rank's part of the weights.
        sent_per_step: with a strategy, bytes that this process hands to collectives in a step without a refresh: for
            the update (as in `report()`, without the norms of gradients), and for gradients under
            DistributedDataParallel. FSDP2's and DeepSpeed's own traffic is not included. None: unknown.
        sent_per_refresh: additional bytes when all bases are refitted, after the first refresh, on accelerators. CPUs
            send less: there ranks check, at no cost, whether a basis needs a second pass, which would send.
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
        """Return the persistent bytes of the optimizer."""
        return self.states + self.bases

    @property
    def total(self) -> int:
        """Return the bytes at the peak: while the largest matrix refits its basis within a step."""
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
    """Return the bytes that training with `optimizer(..., **options)` will hold.

    With `step_in_backward`, `gradients` is the most that is alive at once. That is the largest gradient; with
    `foreach=True`, and on accelerators (not included here), up to 64 MiB more. Accumulation adds what is kept between
    micro-batches: r x n coordinates of a matrix whose method reads only these, whole gradients of all other parameters.
    The figure holds for windows without a refresh. In the first window and in windows with a refresh, gradients of the
    matrices that are due accumulate whole, unless `basis_from="micro-batch"`.

    Args:
        source: a model (also on the meta device, or sharded; grouped by `param_groups`), groups that `param_groups`
            made, or shapes, as a mapping from names or as a list.
        optimizer: a class of this package or of torch.optim. Workspaces of torch's classes are unknown and given as 0.
            Some of these classes, such as Adafactor, cannot step without memory and raise a ValueError.
        dtype: dtype of weights and gradients. Default: the model's own, or float32 for shapes.
        step_in_backward: estimate training with `lowrank_optim.step_in_backward`, which takes classes of this package.
        accumulation_steps: backward passes per step. Without `step_in_backward`, gradients accumulate whole, and the
            newest gradient is briefly alive next to its sum.
        world_size: number of processes. The estimate is of the process that holds most.
        strategy: how the processes share the work. "ddp": DistributedDataParallel with `gradient_as_bucket_view=True`
            (without it, buckets are a second copy of the gradients); "ddp_project": with our hook; "fsdp2":
            `fully_shard`; "zero1" to "zero3": DeepSpeed. State under FSDP2 and DeepSpeed is counted exactly, and what
            they cannot run is refused here too. Whole layers that they gather for a moment are not counted.
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
        estimate = MemoryEstimate(weights, gradients, _bytes_after_step(instance, updated), 0, 0, 0, 0)
        return _of_torch(estimate, params, strategy, world_size)
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
    """Return the estimate for the process that holds most."""
    if strategy == "ddp":
        return replace(expected(instance, weights, gradients), **_fields(shares.averaged(params)))
    if strategy == "ddp_project":
        return replace(expected(instance, weights, gradients), **_fields(shares.projected(instance)))
    if strategy == "fsdp2":
        shard, sent = shares.sharded(instance, world_size)
        return replace(expected(instance, shard, shard), **_fields(sent))
    ranks = [expected(instance, 0, 0) for _ in shares.rank_by_rank(instance, strategy, world_size)]
    most = max(ranks, key=lambda rank: rank.optimizer)
    parts = shares.partitions(params, strategy, world_size) | shares.sent(instance)  # all ranks send the same
    return replace(most, **_fields(parts))


def _of_torch(
    estimate: MemoryEstimate, params: list[nn.Parameter], strategy: str | None, world_size: int
) -> MemoryEstimate:
    """Adapt the estimate of a torch.optim class to a strategy: its state is cut like its parameters."""
    if strategy in ("ddp", "ddp_project"):
        return replace(estimate, **_fields(shares.averaged(params)))
    if strategy in shares.ZERO:
        parts = {**shares.partitions(params, strategy, world_size), "states": -(-estimate.states // world_size)}
        return replace(estimate, **_fields(parts))
    return estimate


def _masters(groups: Groups) -> Groups:
    """Return groups of float32 copies, which DeepSpeed lets an optimizer update."""
    return [{**group, "params": [(name, nn.Parameter(p.float())) for name, p in group["params"]]} for group in groups]


def _fields(changes: shares.Changes) -> dict[str, Any]:
    """Return changes as keyword arguments that mypy lets `replace` take."""
    return dict(changes)


def _lines(p: nn.Parameter, world_size: int) -> nn.Parameter:
    """Return the part of a parameter that `fully_shard` leaves on rank 0, which never holds less than other ranks."""
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
    """Estimate a weight-space method by converting a copy of the model on the meta device."""
    model = _meta_copy(layer_checks.whole_model(source), dtype)
    instance = optimizer(model, **options)
    tensors: set[Tensor] = {*model.parameters(), *model.buffers()}
    weights = sum(cast(Any, x).stored_bytes() if is_packed(x) else x.nbytes for x in tensors)
    if in_backward:
        return expected(instance, weights, most_gradients(instance.table, accumulation_steps))
    trained = [p.nbytes for p, _ in instance.table.members() if p.requires_grad]
    estimate = expected(instance, weights, whole_gradients(trained, accumulation_steps))
    return estimate if strategy is None else replace(estimate, sent_per_step=sum(trained))


def _meta_copy(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Copy a model without allocating memory; tied weights stay tied."""
    memo: dict[int, Any] = {}
    for x in (*model.parameters(), *model.buffers()):
        kind = dtype if dtype is not None and x.is_floating_point() else x.dtype
        meta = torch.empty(x.shape, dtype=kind, device="meta")
        memo[id(x)] = nn.Parameter(meta, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else meta
    return copy.deepcopy(model, memo)


def whole_gradients(sizes: list[int], accumulation_steps: int = 1) -> int:
    """Return the bytes of gradients that stay until the step.

    Where gradients accumulate, the newest one is briefly alive next to its sum, so the largest is counted twice.
    """
    return sum(sizes) + (max(sizes, default=0) if accumulation_steps > 1 else 0)


def expected(optimizer: LowRankOptimizer, weights: int, gradients: int) -> MemoryEstimate:
    """Return the estimate for an optimizer, from its parameters' shapes alone."""
    # Workspaces count once, for the matrix that needs most. Lists are the exception: `listed` adds up the coordinates
    # of all matrices, because one kernel call updates as many as fit into the cache.
    step, refresh, listed, share = 0, optimizer.restart_workspace(), 0, 0.0
    kept: Counter[str] = Counter()
    shared: dict[str, int] = {}
    seen: dict[tuple[Any, ...], Needs] = {}
    for p, group in optimizer.table.members():
        plan, layout = optimizer.table.plans[p], optimizer.table.layouts[p]
        has_state = p.requires_grad or bool(optimizer.table.state(p))
        equal = id(group), plan.shape, plan.matrix, plan.side, plan.rank, layout.key, p.dtype, is_packed(p), has_state
        if equal not in seen:  # most layers of a large model equal an earlier one
            seen[equal] = needs(optimizer, p, group)
        own = seen[equal]
        kept.update(own.state)
        shared |= own.shared
        step, refresh, listed = max(step, own.step), max(refresh, own.refresh), listed + own.listed
        share = max(share, own.listed / max(1, p.nbytes))
    step += min(listed, math.ceil(share * limits.CACHE))
    bases = kept.pop(BASES, 0)
    return MemoryEstimate(weights, gradients, kept.total(), bases, sum(shared.values()), step, refresh)


def _meta_groups(source: Any, dtype: torch.dtype | None, low_rank: bool) -> list[dict[str, Any]]:
    """Return param groups of (name, parameter on the meta device); for torch.optim without options of ours."""
    if isinstance(source, nn.Module):
        source = param_groups(source, verbose=False)
    source = source if isinstance(source, Mapping) else list(source)
    if not (isinstance(source, list) and source and isinstance(source[0], dict)):
        named = source.items() if isinstance(source, Mapping) else ((f"{i}", s) for i, s in enumerate(source))
        source = [{"params": [(name, _empty(shape)) for name, shape in named]}]
    groups = [{**group, "params": [_meta(p, i, dtype) for i, p in enumerate(group["params"])]} for group in source]
    return groups if low_rank else [{"params": group["params"]} for group in groups]


def _empty(shape: Any) -> Tensor:
    """Return a meta tensor of a shape that the user gave."""
    try:
        return torch.empty(tuple(shape), device="meta")
    except (TypeError, RuntimeError) as error:
        kind = type(shape).__name__
        raise TypeError(
            f"estimate_memory takes a model, groups or shapes, got a collection that holds {kind}"
        ) from error


def _meta(entry: Any, index: int, dtype: torch.dtype | None) -> tuple[str, nn.Parameter]:
    """Return name and meta parameter of an entry of a group, a parameter or a (name, parameter) pair.

    A packed parameter keeps its stored size, and stays recognizable as packed.
    """
    name, p = entry if isinstance(entry, tuple) else (f"{index}", entry)
    empty = nn.Parameter(meta(p, dtype or p.dtype))
    if is_packed(p):
        cast(Any, empty).packed_bytes = cast(Any, p).stored_bytes()
        cast(Any, empty).pack_ = None  # marks it for is_packed: such a weight rounds by itself, without compensation
    return name, empty


def _bytes_after_step(optimizer: Optimizer, params: list[nn.Parameter]) -> int:
    """Return the bytes of state after one step, at which torch.optim makes its state; on the meta device it is free."""
    for p in params:
        p.grad = torch.empty_like(p)
    try:
        optimizer.step()
    except RuntimeError as error:
        name = type(optimizer).__name__
        raise ValueError(f"{name} cannot be estimated: its step needs numbers, not only shapes ({error})") from error
    return state_bytes(optimizer)
