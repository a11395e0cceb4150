"""From the loss of a micro-batch to new weights: scaling, clipping and the step, after backward or during it."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

import lowrank_optim
from lowrank_optim.backward import StepInBackward

from . import precision
from .errors import PretrainError
from .job import Job


class Updater:
    """Call `backward` for each micro-batch, then `clip` and `step`."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        job: Job,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._model, self._optimizer, self._clip = model, optimizer, job.clip
        self.scaler = precision.scaler(job) if scaler is None else scaler
        if self.scaler.is_enabled():  # its first step often overflows, and torch then misses an optimizer.step()
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        self.handle = attach(model, optimizer, job, self.scaler) if job.step_in_backward else None

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def clip(self) -> float | None:
        """The norm of all gradients before they are clipped, inf after an overflow; None if backward has used them."""
        if self.handle is not None:
            return None
        self.scaler.unscale_(self._optimizer)
        return torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip or math.inf).item()

    def step(self) -> bool:
        """Did the gradients fit into float16? If not, there is no update, or in backward only of those that did."""
        scale = self.scaler.get_scale()
        self.scaler.step(self._optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale


def attach(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, job: Job, scaler: torch.amp.GradScaler | None = None
) -> StepInBackward:
    if not isinstance(optimizer, lowrank_optim.LowRankOptimizer):
        raise PretrainError(
            f"--step-in-backward is for optimizers of lowrank_optim, and {job.optimizer} is torch's; leave one of the "
            "two out"
        )
    try:
        return lowrank_optim.step_in_backward(
            model,
            optimizer,
            job.micro_batches,
            accumulate=job.accumulate,
            basis_from=job.basis_from,
            clip=job.clip_by,
            clip_norm=job.clip or None,
            scaler=scaler,
        )
    except ValueError as error:
        raise PretrainError(f"{job.label} cannot step in backward: {_in_flags(str(error), job)}") from error


def _in_flags(message: str, job: Job) -> str:
    """The library's message, in the words of this program."""
    flags = {
        "clip_norm": "--clip",
        'accumulate="whole"': "--clip 0, --accumulate whole",
        "accumulation_steps=1": f"--micro-batch {job.batch}",
    }
    for word, flag in flags.items():
        message = message.replace(word, flag)
    return message
