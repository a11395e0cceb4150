"""Bytes before anything is allocated, from the recipe and the shapes; works on the meta device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .chunk import SLICE, working_dtype
from .groups import param_groups
from .ops.philox import WORKSPACE
from .optimizer import LowRankOptimizer
from .plan import Plan
from .recipe import Recipe
from .report import human, state_bytes

Groups = list[dict[str, Any]]
Shapes = Mapping[str, tuple[int, ...]] | Iterable[tuple[int, ...]]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training process, without activations.

    Attributes:
        weights, gradients: of the parameters that are trained.
        states: moments and counters; exact.
        bases: exact.
        step_workspace: the most that a step without a refresh holds for one matrix. Where equal matrices are stacked
            (on accelerators, or with `foreach=True`), the stack takes up to 64 MiB per operand instead.
        refresh_workspace: the most that refitting one basis holds (LAPACK's own buffers not counted).
    """

    weights: int
    gradients: int
    states: int
    bases: int
    step_workspace: int
    refresh_workspace: int

    @property
    def optimizer(self) -> int:
        """Persistent bytes of the optimizer."""
        return self.states + self.bases

    @property
    def total(self) -> int:
        """Everything at the moment when it is most: during a refresh, if that needs more than a step."""
        return self.weights + self.gradients + self.optimizer + max(self.step_workspace, self.refresh_workspace)

    def __str__(self) -> str:
        rows = ("weights", "gradients", "states", "bases", "step_workspace", "refresh_workspace", "total")
        return "\n".join(f"{row.replace('_', ' '):<18}{human(getattr(self, row)):>12}" for row in rows)


def estimate_memory(
    source: nn.Module | Groups | Shapes,
    optimizer: type[Optimizer],
    *,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> MemoryEstimate:
    """What training with `optimizer(..., **options)` will hold.

    Args:
        source: a model (also on the meta device; grouped by `param_groups`), groups that `param_groups` made, or
            shapes, by name or bare.
        optimizer: a class of this package, or of torch.optim (then workspaces are not known and 0).
        dtype: of weights and gradients; default: the model's own, float32 for shapes.
        options: keyword arguments of the optimizer.

    Example::

        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        print(lowrank_optim.estimate_memory(model, lowrank_optim.GaLoreAdamW, rank=1024, dtype=torch.bfloat16))
    """
    low_rank = issubclass(optimizer, LowRankOptimizer)
    groups = _meta_groups(source, dtype, low_rank)
    params = [p for group in groups for _, p in group["params"]]
    weights = sum(p.nbytes for p in params)
    instance = optimizer(groups, **options)
    if not isinstance(instance, LowRankOptimizer):
        return MemoryEstimate(weights, weights, _bytes_after_step(instance, params), 0, 0, 0)
    states = bases = step = refresh = 0
    for p, group in instance._members():
        plan = instance._plans[p]
        recipe = instance._recipe_of(plan, group)
        fitted = recipe.basis.spec(plan.matrix, plan.rank or 0)
        for key, tensor in instance._fresh_state(p, group).items():
            if key in fitted:
                bases += tensor.nbytes
            else:
                states += tensor.nbytes
        working = working_dtype(p).itemsize
        step = max(step, _step_bytes(p, plan, recipe, group))
        if plan.projected:
            m, n = plan.matrix
            refresh = max(refresh, recipe.basis.fit_workspace(m, n, plan.rank or 0) * working)
    return MemoryEstimate(weights, weights, states, bases, step, refresh)


def _step_bytes(p: Tensor, plan: Plan, recipe: Recipe, group: dict[str, Any]) -> int:
    """R and the scratch of its size; for 16-bit weights also G, W, the noise and the rounded W."""
    size, working = p.numel(), working_dtype(p)
    if recipe.elementwise:
        size = coordinates = min(size, SLICE)
    else:
        coordinates = plan.count * math.prod(recipe.basis.coordinates(plan.matrix, plan.rank or 0))
    coordinates *= 1 + recipe.scaling.scratch
    if p.dtype == working:
        return coordinates * working.itemsize
    noise = WORKSPACE if group["bf16_update"] == "stochastic" and p.dtype == torch.bfloat16 else 0
    return (coordinates + 4 * size) * working.itemsize + noise


def _meta_groups(source: Any, dtype: torch.dtype | None, low_rank: bool) -> list[dict[str, Any]]:
    if isinstance(source, nn.Module):
        source = param_groups(source, verbose=False)
    source = source if isinstance(source, Mapping) else list(source)
    if not (isinstance(source, list) and source and isinstance(source[0], dict)):
        named = source.items() if isinstance(source, Mapping) else ((f"{i}", s) for i, s in enumerate(source))
        source = [{"params": [(name, torch.empty(shape, device="meta")) for name, shape in named]}]
    groups = [{**group, "params": [(name, _meta(p, dtype)) for name, p in group["params"]]} for group in source]
    return groups if low_rank else [{"params": group["params"]} for group in groups]


def _meta(p: Tensor, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(p.shape, dtype=dtype or p.dtype, device="meta"))


def _bytes_after_step(optimizer: Optimizer, params: list[nn.Parameter]) -> int:
    """torch.optim makes its state at the first step; on the meta device that costs nothing."""
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()
    return state_bytes(optimizer)
