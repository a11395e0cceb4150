"""DeepSpeed: gradients (stage 2), weights (3) and what the optimizer keeps (1, 2, 3) are spread over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from . import folders, optimizers
from . import model as models
from .errors import PretrainError
from .job import Job
from .team import Team
from .update import Updater

TAG = "deepspeed"  # the folder of its files in a checkpoint


def config(job: Job, stage: int) -> dict[str, Any]:
    """What DeepSpeed is told; the optimizer, the schedule and the data are ours."""
    return {
        "train_micro_batch_size_per_gpu": job.micro_batch,
        "gradient_accumulation_steps": job.micro_batches,
        "gradient_clipping": job.clip,
        "bf16": {"enabled": job.dtype == "bf16"},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


class Engine(Updater):
    """DeepSpeed's engine averages, accumulates, clips and steps."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        job: Job,
        scaler: torch.amp.GradScaler | None,
        stage: int,
    ) -> None:
        super().__init__(model, optimizer, job, scaler)
        deepspeed = _deepspeed(job.device)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(job, stage))
        self.network = self.engine

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        yield
        if not last:
            self.engine.step()  # so it counts; the last one's is `step`

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)  # which is of the mean over all micro-batches already

    def clip(self) -> None:
        self.gradient_norm = None  # the engine clips within its step

    def step(self) -> bool:
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        self.gradient_norm = None if norm is None else float(norm)
        return True

    def gradient_bytes(self) -> int | None:
        return None  # in buckets that come and go


class Zero:
    def __init__(self, team: Team, stage: int) -> None:
        self._team, self._stage = team, stage

    def build(self, job: Job) -> torch.nn.Module:
        return models.build(job)

    def updater(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, job: Job, scaler: torch.amp.GradScaler | None
    ) -> Updater:
        return Engine(model, optimizer, job, scaler, self._stage)

    def path(self, folder: Path) -> Path:
        return folders.newest(folder)

    def save(self, folder: Path, updater: Updater, rest: dict[str, Any]) -> None:
        engine = cast(Engine, updater).engine
        folders.save(folder, self._team, rest, lambda part: engine.save_checkpoint(part, tag=TAG, save_latest=False))

    def read(self, path: Path) -> dict[str, Any]:
        return folders.read(path)

    def restore(self, content: dict[str, Any], updater: Updater) -> None:
        """With as many processes as saved it, and the same stage."""
        loaded, _ = cast(Engine, updater).engine.load_checkpoint(content["path"], tag=TAG)
        if loaded is None:
            raise PretrainError(f"DeepSpeed cannot read its part of the checkpoint {content['path']}")

    def whole(self, model: torch.nn.Module, job: Job) -> torch.nn.Module:
        """Of stage 3 a copy, converted as the model was, which gets its weights one by one."""
        if self._stage < 3:
            return model
        copy = models.build(job)
        optimizers.build(copy, job)
        with torch.no_grad():
            for ours, p in zip(copy.parameters(), model.parameters(), strict=True):
                with _deepspeed(job.device).zero.GatheredParameters([p]):
                    ours.copy_(p)
            for ours, buffer in zip(copy.buffers(), model.buffers(), strict=True):
                ours.copy_(buffer)
        return copy


def _deepspeed(device: str) -> Any:
    import deepspeed

    deepspeed.logger.setLevel("WARNING")  # else a page of settings for every process
    if device == "cpu":  # else it compiles its own collectives, or dies where there is no compiler; gloo's do
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if device == "cpu" else "nccl", verbose=False)
    return deepspeed
