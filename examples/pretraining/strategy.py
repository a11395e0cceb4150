"""How the processes of a run share the model: each with all of it, with a part of it, or through DeepSpeed."""

from __future__ import annotations

import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any, Protocol

import torch

from . import optimizers
from .errors import PretrainError
from .job import WHOLE, Job
from .team import Team
from .update import Updater

STAGES = {f"zero{stage}": stage for stage in range(4)}  # of DeepSpeed
STRATEGIES = ("auto", *WHOLE, "fsdp2", *STAGES)
ONE_PROCESS = "single"
# What torch's optimizers of matrices would do to the flat pieces of DeepSpeed's stages.
NEEDS_MATRICES = {"Muon", "Adafactor"}


class Strategy(Protocol):
    def build(self, job: Job) -> torch.nn.Module:
        """The model, or what this process has of it; the same weights for every strategy."""

    def updater(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, job: Job, scaler: torch.amp.GradScaler | None
    ) -> Updater: ...

    def path(self, folder: Path) -> Path:
        """The last complete checkpoint in the folder of a run, where there is one."""

    def save(self, folder: Path, updater: Updater, rest: dict[str, Any]) -> None:
        """The model, its optimizer, and `rest`, which is the same in all processes; on disk whole or not at all."""

    def read(self, path: Path) -> dict[str, Any]:
        """`rest`, and what `restore` needs."""

    def restore(self, content: dict[str, Any], updater: Updater) -> None: ...

    def whole(self, model: torch.nn.Module, job: Job) -> torch.nn.Module:
        """A model that is trained no more, whole in every process, with its converted layers."""


def of(job: Job, team: Team) -> Strategy:
    if job.strategy in WHOLE:
        from .whole import Whole

        return Whole(team)
    if job.strategy == "fsdp2":
        from .sharded import Sharded

        return Sharded(team)
    from .zero import Zero

    return Zero(team, STAGES[job.strategy])


def chosen(name: str) -> tuple[str, int]:
    """The strategy and the number of processes, from --strategy and what the launcher says."""
    world, launched = int(os.environ.get("WORLD_SIZE", 1)), "RANK" in os.environ
    if name == "auto":
        name = "ddp" if world > 1 else ONE_PROCESS
    if name == ONE_PROCESS and world > 1:
        raise PretrainError(
            f"--strategy single in {world} processes would train {world} times the same; take ddp, fsdp2 or zero1 to "
            "zero3, or start one process"
        )
    if name != ONE_PROCESS and not launched:
        raise PretrainError(
            f"--strategy {name} needs a launcher, also for one process: "
            f"torchrun --nproc_per_node N examples/pretrain.py --strategy {name} ..."
        )
    if name in STAGES and importlib.util.find_spec("deepspeed") is None:
        raise PretrainError(f"--strategy {name} needs DeepSpeed: pip install deepspeed")
    return name, world if name != ONE_PROCESS else 1


def check(job: Job) -> None:
    """Refuse what processes cannot do together, before anything is written."""
    for refused, why in _refusals(job):
        if refused:
            raise PretrainError(f"{job.label} with --strategy {job.strategy}: {why}")


def _of_converted_layers(job: Job) -> list[tuple[bool, str]]:
    """What DeepSpeed cannot do with them."""
    optimizer = optimizers.find(job.optimizer)
    stage = STAGES[job.strategy]
    why, whole = (str(getattr(optimizer, key)) for key in ("irreplaceable", "unpartitionable"))
    base = inspect.signature(optimizer).parameters.get("base")
    return [
        (
            bool(why),
            f"DeepSpeed trains other tensors in the place of the parameters of {job.optimizer}, and {why}; take ddp",
        ),
        (
            bool(whole) and stage == 3,
            f"stage 3 partitions all weights of {job.optimizer}, and {whole}; take another stage, or ddp",
        ),
        (
            base is not None and job.keywords.get("base", base.default) not in ("dense", "none"),
            "DeepSpeed casts all weights, which those in int8 and NF4 refuse; take base=dense, or ddp",
        ),
        (
            job.warm_start > 0,
            "--warm-start would give the model to DeepSpeed twice; train both parts by themselves, or take ddp",
        ),
    ]


def _refusals(job: Job) -> list[tuple[bool, str]]:
    optimizer = optimizers.find(job.optimizer)
    converts = optimizers.is_weight_space(optimizer)
    whole, engine = job.strategy in WHOLE, job.strategy in STAGES
    return [
        (
            job.batch % job.world != 0,
            f"--batch must be a multiple of the number of processes, which is {job.world}, got {job.batch}",
        ),
        (
            job.step_in_backward and job.strategy != ONE_PROCESS,
            "--step-in-backward uses gradients before they are averaged over processes; leave one of the two out",
        ),
        (
            job.amp == "fp16" and not whole,
            "--amp fp16 needs a loss scale, which is not tested on sharded gradients; take --amp bf16, or ddp",
        ),
        (
            job.amp != "none" and engine,
            "--amp is not DeepSpeed's way; take --dtype bf16, which keeps float32 weights beside it there",
        ),
        (
            converts and job.strategy == "fsdp2",
            f"{job.optimizer} converts layers, which must be whole in every process; take ddp",
        ),
        *(_of_converted_layers(job) if converts and engine else ()),
        (
            job.keywords.get("heads") == "ranks",
            "heads='ranks' keeps other weights in every process, and checkpoints here are written by the first one; "
            "give a number of heads",
        ),
        (
            job.optimizer in NEEDS_MATRICES and STAGES.get(job.strategy, 0) > 0,
            f"torch's {job.optimizer} needs matrices, and DeepSpeed gives it flat pieces of them; take zero0, ddp or "
            "fsdp2",
        ),
    ]
