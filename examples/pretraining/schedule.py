"""The learning rate of a run: a warm-up, one cosine, and ramps after restarts. Functions of the step alone."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from . import optimizers
from .errors import PretrainError
from .job import Job

FLOOR = 0.1  # the cosine ends at this share of the peak lr
PUBLISHED = {"ReLoRA": 100, "SST": 20}  # updates of a ramp; of the other methods:
USUAL = 10
LARGEST = 5  # a ramp that nobody asked for takes at most one in so many updates


def scheduler(optimizer: torch.optim.Optimizer, job: Job, step: int) -> LambdaLR:
    """For an optimizer that begins after `step` updates of the run."""
    warmup, period = int(job.warmup * job.steps), restart_period(optimizers.find(job.optimizer), job.keywords)

    def factor(step: int) -> float:
        ramp = restart_factor(step, period, job.restart_warmup, job.warm_start)
        return lr_factor(step, job.steps, warmup) * ramp

    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return LambdaLR(optimizer, factor, last_epoch=step - 1)


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """Linear from 1/warmup to 1 over `warmup` steps, then a cosine that reaches FLOOR in the last step."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))


def restart_factor(step: int, period: int | None, ramp: int, first: int = 0) -> float:
    """Linear from 1/ramp to 1 over the `ramp` updates after each restart, 1 otherwise.

    Args:
        step: number of the update in the run, from 0.
        period: updates between restarts, None for none.
        first: when the method takes over; unless the run begins with it, that is a restart as well.
    """
    since = step - first
    phase = since % period if period else since
    if ramp == 0 or since < 0 or (first == 0 and phase == since):
        return 1.0
    return min(1.0, (phase + 1) / ramp)


def restart_period(optimizer: type[torch.optim.Optimizer], keywords: dict[str, Any]) -> Any:
    """Updates between restarts at which all layers lose their moments together; None where there are none."""
    if not optimizers.is_weight_space(optimizer):
        return None
    options = {name: one.default for name, one in inspect.signature(optimizer).parameters.items()} | keywords
    if options.get("reset", "keep") != "keep":
        return options["merge_every"]
    return options.get("reset_every", options.get("iteration_steps"))


def ramp(optimizer: type[torch.optim.Optimizer], keywords: dict[str, Any], given: int | None, warm_start: int) -> int:
    """Updates of each ramp: --restart-warmup, or what suits the method."""
    period = restart_period(optimizer, keywords)
    restarts = period is not None or bool(warm_start)
    if given and not restarts:
        raise PretrainError(
            f"--restart-warmup {given}: {optimizer.__name__} with these keywords never restarts all layers at once; "
            "leave it out"
        )
    if given is not None or not restarts:
        return given or 0
    usual = PUBLISHED.get(optimizer.__name__, USUAL)
    return min(usual, period // LARGEST) if isinstance(period, int) else usual


def check(job: Job) -> None:
    """For jobs whose optimizer accepted its arguments."""
    period = restart_period(optimizers.find(job.optimizer), job.keywords)
    if period is not None and job.restart_warmup >= max(period, 2):
        raise PretrainError(
            f"--restart-warmup must be below the {period} updates between two restarts of {job.label}, or lr never "
            f"gets up; got {job.restart_warmup}"
        )
