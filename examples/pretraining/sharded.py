"""Every process has a part of each parameter, of its gradient and of its state: FSDP2 (`fully_shard`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from . import folders, model
from .errors import PretrainError
from .job import Job
from .team import Team
from .update import Updater


class Sharded:
    def __init__(self, team: Team) -> None:
        self._team = team

    def build(self, job: Job) -> torch.nn.Module:
        """Drawn by the first process, so that no other one ever holds all weights."""
        sharded = model.skeleton(job)
        mesh = init_device_mesh(torch.device(job.device).type, (self._team.world,))
        for layer in cast(Any, sharded).model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        sharded.to_empty(device=job.device)
        whole = model.drawn(job) if self._team.main else None
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(sharded, whole.state_dict() if whole else {}, options=options)
        for name, buffer in sharded.named_buffers():  # rotary frequencies, which no state dict has
            if whole:
                buffer.copy_(whole.get_buffer(name))
            dist.broadcast(buffer, 0)
        return sharded

    def updater(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, job: Job, scaler: torch.amp.GradScaler | None
    ) -> Updater:
        """Gradients are summed over processes with each micro-batch: sums of whole ones would need their memory."""
        return Updater(model, optimizer, job, scaler)

    def path(self, folder: Path) -> Path:
        return folders.newest(folder)

    def save(self, folder: Path, updater: Updater, rest: dict[str, Any]) -> None:
        folders.save(folder, self._team, rest, lambda part: dcp.save(_state(updater), checkpoint_id=part))

    def read(self, path: Path) -> dict[str, Any]:
        return folders.read(path)

    def restore(self, content: dict[str, Any], updater: Updater) -> None:
        """Also with another number of processes than saved it."""
        state = _state(updater)
        try:
            dcp.load(state, checkpoint_id=content["path"])
        except CheckpointException as error:
            raise PretrainError(f"cannot read the checkpoint {content['path']}: {error}") from error
        set_model_state_dict(updater.model, state["model"])
        set_optimizer_state_dict(updater.model, updater.optimizer, state["optimizer"])


def _state(updater: Updater) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(updater.model),
        "optimizer": get_optimizer_state_dict(updater.model, updater.optimizer),
    }
