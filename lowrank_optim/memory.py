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
from .optimizer import LowRankOptimizer
from .plan import Plan
from .recipe import Recipe
from .report import human, state_bytes

Shapes = Mapping[str, tuple[int, ...]] | Iterable[tuple[int, ...]]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training process, without activations.

    Attributes:
        weights, gradients: of the parameters that are trained.
        states: moments and counters; exact.
        bases: exact.
        step_workspace: the most that a step without a refresh holds for one matrix.
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
    model_or_shapes: nn.Module | Shapes,
    optimizer: type[Optimizer],
    *,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> MemoryEstimate:
    """What training with `optimizer(..., **options)` will hold.

    Args:
        model_or_shapes: a model (also on the meta device; grouped by `param_groups`), or shapes, by name or bare.
        optimizer: a class of this package, or of torch.optim (then workspaces are not known and 0).
        dtype: of weights and gradients; default: the model's own, float32 for shapes.
        options: keyword arguments of the optimizer.

    Example::

        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        print(lowrank_optim.estimate_memory(model, lowrank_optim.GaLoreAdamW, rank=1024, dtype=torch.bfloat16))
    """
    low_rank = issubclass(optimizer, LowRankOptimizer)
    groups = _meta_groups(model_or_shapes, dtype, low_rank)
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
        step = max(step, _step_elements(p, plan, recipe) * working)
        if plan.projected:
            m, n = plan.matrix
            refresh = max(refresh, recipe.basis.fit_workspace(m, n, plan.rank or 0) * working)
    return MemoryEstimate(weights, weights, states, bases, step, refresh)


def _step_elements(p: Tensor, plan: Plan, recipe: Recipe) -> int:
    """Coordinates and one scratch of their size; for 16-bit weights also G, W and rounding noise in 32 bits."""
    size = p.numel()
    if recipe.elementwise:
        size = min(size, SLICE)
        coordinates = size
    else:
        coordinates = plan.count * math.prod(recipe.basis.coordinates(plan.matrix, plan.rank or 0))
    copies = 4 * size if working_dtype(p) != p.dtype else 0
    return 2 * coordinates + copies


def _meta_groups(source: nn.Module | Shapes, dtype: torch.dtype | None, low_rank: bool) -> list[dict[str, Any]]:
    if isinstance(source, nn.Module):
        groups = param_groups(source, verbose=False)
    else:
        named = source.items() if isinstance(source, Mapping) else ((f"{i}", s) for i, s in enumerate(source))
        groups = [{"params": [(name, torch.empty(shape, device="meta")) for name, shape in named]}]
    for group in groups:
        group["params"] = [(name, _meta(p, dtype)) for name, p in group["params"]]
    return groups if low_rank else [{"params": group["params"]} for group in groups]


def _meta(p: Tensor, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(p.shape, dtype=dtype or p.dtype, device="meta"))


def _bytes_after_step(optimizer: Optimizer, params: list[nn.Parameter]) -> int:
    """torch.optim makes its state at the first step; on the meta device that costs nothing."""
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()
    return state_bytes(optimizer)
