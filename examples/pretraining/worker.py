"""The child process of one run: its peak memory is its own. Reads `job.json`, writes `result.json`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import lowrank_optim
from lowrank_optim.modes.gradient_memory import most_gradients

from . import model
from .interrupt import Interrupt
from .job import Job
from .loop import Run
from .optimizers import find
from .team import Team

RESULT = "result.json"
EXECUTION = {"foreach", "fused", "capturable"}  # how a step is computed, not what it keeps; unknown to the meta device


def work(folder: Path, interrupt: Interrupt, team: Team | None = None) -> bool:
    """Train the job in `folder` from its checkpoint, if it has one; True when it is finished."""
    team = team or Team()
    job = team.placed(Job.read(folder / "job.json"))
    if job.device.startswith("cuda"):  # sums in atomic order would make a resumed run another run
        torch.use_deterministic_algorithms(True, warn_only=True)
    run = team.together(lambda: Run(job, folder, interrupt, team))
    predicted = predict(run)  # before the training, so that a surprise comes early
    run.write_report()
    if run.path.exists():
        team.together(run.load)
    elif team.any(interrupt.requested):  # nothing trained, nothing to save
        return False
    if not run.train():
        return False
    found = result(run, predicted)
    if run.converted:
        found["merged_validation_loss"] = run.merge()
        if found["merged_validation_loss"] is None:  # stopped; the checkpoint is that of the last step
            return False
    if team.main:
        part = folder / f".{RESULT}.part"
        part.write_text(json.dumps(found, indent=2) + "\n")
        os.replace(part, folder / RESULT)
    return True


def predict(run: Run) -> dict[str, int]:
    """Bytes that should last from step to step, of this optimizer and of AdamW; after a warm start."""
    plain = model.skeleton(run.job)
    keywords = {key: value for key, value in run.job.keywords.items() if key not in EXECUTION}
    steps = run.job.micro_batches
    ours = lowrank_optim.estimate_memory(plain, find(run.job.optimizer), accumulation_steps=steps, **keywords)
    adamw = lowrank_optim.estimate_memory(plain, torch.optim.AdamW)
    return {
        "weights": ours.weights,
        "gradients": _gradients(run, ours.gradients),
        "optimizer_predicted": ours.optimizer,
        "optimizer_predicted_adamw": adamw.optimizer,
    }


def _gradients(run: Run, whole: int) -> int:
    """The most that live at once: all, or in backward what micro-batches leave behind and what waits for its update."""
    if run.updater.handle is None:
        return whole
    return most_gradients(run.optimizer.table, run.job.micro_batches, run.job.accumulate)


def result(run: Run, predicted: dict[str, int]) -> dict[str, Any]:
    job, clock = run.job, run.clock
    measured = {
        "weights_measured": run.weights,
        "gradients_measured": run.gradients or None,  # None where there never are all of them
        "optimizer_measured": lowrank_optim.state_bytes(run.optimizer),
        "peak": run.peak,
    }
    tokens = run.step * job.batch * job.sequence
    in_optimizer = None if job.step_in_backward else clock.optimizer  # backward is the optimizer then
    return {
        "label": job.label,
        "job": job.to_dict(),
        "parameters": run.parameters,
        "initial_weights": run.initial_weights,
        "bytes": {**predicted, **measured},
        "seconds": {**asdict(clock), "optimizer": in_optimizer},
        "optimizer_share_of_time": None if in_optimizer is None else in_optimizer / clock.training,
        "tokens": tokens,
        "tokens_per_second": tokens / clock.training,
        "validation_tokens": run.corpus.validation_tokens - 1,  # the first one is never a target
        "validation": run.history.validation,
        "validation_loss": run.history.validation[-1][1],
        "training_loss": run.history.losses[-1],
        "overflows": run.history.overflows,
    }
