"""From the loss of a micro-batch to new weights: scaling, clipping and the step, after backward or during it."""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import lowrank_optim
from lowrank_optim.modes.backward import StepInBackward
from lowrank_optim.reports.storages import stored

from . import precision
from .errors import PretrainError
from .job import Job


class Updater:
    """For each micro-batch call `network`, then `backward`, both within `micro_batch`; then `clip` and `step`.

    Attributes:
        network: the model, or the wrapper through which it must be called.
        gradient_norm: of all gradients before they were clipped, inf after an overflow. None where nobody knows it: if
            backward uses gradients, before the step, and if it projects some of them, after it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        job: Job,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.model, self.optimizer, self._clip = model, optimizer, job.clip
        self.network: torch.nn.Module = model
        self.gradient_norm: float | None = None
        self.scaler = precision.scaler(job) if scaler is None else scaler
        if self.scaler.is_enabled():  # its first step often overflows, and torch then misses an optimizer.step()
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        self.handle = attach(model, optimizer, job, self.scaler) if job.step_in_backward else None

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of each; `last`: of the update."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def clip(self) -> None:
        if self.handle is not None:  # backward has used them
            self.gradient_norm = None
            return
        self.scaler.unscale_(self.optimizer)
        norm: Any = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip or math.inf)
        self.gradient_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def step(self) -> bool:
        """Did the gradients fit into float16? If not, there is no update, or in backward only of those that did."""
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.handle is not None:
            self.gradient_norm = self.handle.grad_norm
        return self.scaler.get_scale() >= scale

    def gradient_bytes(self) -> int | None:
        """Of all gradients before the step; None where that is never the case."""
        return None if self.handle else stored([p.grad for p in self.model.parameters()])


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
