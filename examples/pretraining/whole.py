"""Every process has the whole model: one alone, or several under DistributedDataParallel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint, model
from .job import Job
from .team import Team
from .update import Updater


class Parallel(Updater):
    """Gradients are averaged over processes while the last micro-batch computes them."""

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, job: Job, scaler: torch.amp.GradScaler | None
    ) -> None:
        super().__init__(model, optimizer, job, scaler)
        # Gradients are views of what is sent, not copies of it.
        self.network: DistributedDataParallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self._settle(torch.zeros(min(job.micro_batch, job.share), 2, dtype=torch.int64, device=job.device))

    def _settle(self, windows: Tensor) -> None:
        """A backward for nothing: after the first one torch rearranges what it sends, and adds up in another order.

        The first step of a run that goes on would then differ from that step of an undisturbed one.
        """
        self.network(input_ids=windows).logits.sum().backward()
        self.model.zero_grad(set_to_none=True)

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.network.no_sync()

    def clip(self) -> None:
        """One norm for all, also of what the wrapper leaves alone: LoQT's quantized weights on their turns."""
        for name, p in self.model.named_parameters():
            if name in self.network.parameters_to_ignore and p.grad is not None:
                dist.all_reduce(p.grad.div_(dist.get_world_size()))
        super().clip()


class Whole:
    def __init__(self, team: Team) -> None:
        self._team = team

    def build(self, job: Job) -> torch.nn.Module:
        return model.build(job)

    def updater(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, job: Job, scaler: torch.amp.GradScaler | None
    ) -> Updater:
        return (Parallel if job.strategy == "ddp" else Updater)(model, optimizer, job, scaler)

    def path(self, folder: Path) -> Path:
        return folder / "checkpoint.pt"

    def save(self, folder: Path, updater: Updater, rest: dict[str, Any]) -> None:
        content = {**rest, "model": updater.model.state_dict(), "optimizer": updater.optimizer.state_dict()}
        self._team.first(lambda: checkpoint.save(content, self.path(folder)))

    def read(self, path: Path) -> dict[str, Any]:
        return checkpoint.load(path)

    def restore(self, content: dict[str, Any], updater: Updater) -> None:
        updater.model.load_state_dict(content["model"])
        updater.optimizer.load_state_dict(content["optimizer"])

    def whole(self, model: torch.nn.Module, job: Job) -> torch.nn.Module:
        return model
