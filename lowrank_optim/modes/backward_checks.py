"""The refusals of `step_in_backward` and their messages. All are checked before the first hook is registered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import checks, hyperparameters
from ..distributed import checks as shard_checks
from ..distributed.lockstep import ranks
from ..engine.table import ParameterTable
from ..optimizer import LowRankOptimizer
from ..recipe.plan import Plan
from .gradient_memory import ever_thin


def everything(model: nn.Module, optimizer: LowRankOptimizer, options: dict[str, Any], scaled: bool) -> None:
    """Refuse what cannot step during backward. `scaled`: a GradScaler scales the losses."""
    _objects(model, optimizer)
    hyperparameters.check(options, {})
    _options_with_effect(options)
    if optimizer.mode is not None:
        raise ValueError(already(optimizer.mode.name))
    checks.of_model(model, optimizer.table.plans)
    table = optimizer.table
    for p, layout in table.layouts.items():
        if layout.sharded:
            shard_checks.unsharded(table.plans[p].name, "step_in_backward")
    _one_process(any(isinstance(module, DistributedDataParallel) for module in model.modules()))
    skips_nonfinite(optimizer.param_groups)
    if scaled:
        _scalable(table.plans)
    if options["clip_norm"] is not None:
        _norms_are_known(table, options["accumulation_steps"], options["accumulate"])


def already(mode: str) -> str:
    """Return the message for an optimizer that has a mode."""
    if mode == "step_in_backward":
        return "this optimizer steps during backward already; remove() the earlier handle first"
    return f"this optimizer has the mode {mode}, and can have one at a time; build a new optimizer"


def skips_nonfinite(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse groups with nonfinite="raise"; checked at each step, because groups may change."""
    if any(group["nonfinite"] == "raise" for group in groups):
        raise ValueError(
            'nonfinite="raise" promises that nothing was updated, and a step during backward has already '
            'updated earlier parameters. Use nonfinite="skip", and read the counts of report()'
        )


def _objects(model: object, optimizer: object) -> None:
    """Refuse arguments of the wrong type."""
    if not isinstance(optimizer, LowRankOptimizer):
        raise TypeError(
            f"step_in_backward needs an optimizer of lowrank_optim, got {type(optimizer).__name__}. For one of "
            "torch.optim, see PyTorch's tutorial on fusing the optimizer step into backward"
        )
    checks.module(model)


def _options_with_effect(options: Mapping[str, Any]) -> None:
    """Refuse an option that has no effect next to another option."""
    if options["clip"] != "tensor" and options["clip_norm"] is None:
        raise ValueError(f"clip={options['clip']!r} without clip_norm clips nothing. Pass clip_norm, or leave clip out")
    if options["basis_from"] == "micro-batch" and options["accumulate"] == "whole":
        raise ValueError(
            "basis_from='micro-batch' with accumulate='whole': gradients are not projected before the window is "
            "complete, so bases are fitted to all of it anyway. Leave out one of the two options"
        )


def _one_process(ddp: bool) -> None:
    """Refuse several processes, because gradients are used before other ranks have added theirs."""
    _, world = ranks()
    if ddp or world > 1:
        where = "under DistributedDataParallel" if ddp else f"in a group of {world} processes"
        raise NotImplementedError(
            f"step_in_backward {where} would use gradients before they are averaged over ranks, whose weights would "
            "then differ. Call optimizer.step() after backward, as usual"
        )


def _scalable(plans: Mapping[Tensor, Plan]) -> None:
    """Refuse float16 weights, whose gradients cannot be unscaled one at a time without losing bits."""
    for p, plan in plans.items():
        if p.dtype == torch.float16:
            raise ValueError(
                f"{plan.name} is float16, whose gradients lose bits when they are divided by the scale; a GradScaler "
                "needs float32 weights with autocast, as in torch"
            )


def _norms_are_known(table: ParameterTable, accumulation_steps: int, accumulate: str) -> None:
    """Refuse to clip gradients that accumulate projected."""
    if any(ever_thin(table, p, group, accumulation_steps, accumulate) for p, group in table.members()):
        raise ValueError(
            "clip_norm needs the norm of the sum of all micro-batches, which is unknown when they are projected. Pass "
            'accumulate="whole", which keeps a gradient per matrix, or accumulation_steps=1'
        )
