"""The child process of one run: its peak memory is its own. Reads `job.json`, writes `result.json`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import lowrank_optim

from .interrupt import Interrupt
from .job import Job
from .loop import Run
from .optimizers import find

RESULT = "result.json"
EXECUTION = {"foreach", "fused", "capturable"}  # how a step is computed, not what it keeps; unknown to the meta device


def work(folder: Path, interrupt: Interrupt) -> bool:
    """Train the job in `folder` from its checkpoint, if it has one; True when it is finished."""
    job = Job.read(folder / "job.json")
    if job.device.startswith("cuda"):  # sums in atomic order would make a resumed run another run
        torch.use_deterministic_algorithms(True, warn_only=True)
    run = Run(job, folder, interrupt)
    predicted = predict(run)  # before the training, so that a surprise comes early
    if hasattr(run.optimizer, "report"):
        (folder / "report.txt").write_text(f"{run.optimizer.report()}\n")
    if run.path.exists():
        run.load()
    elif interrupt.requested:  # nothing trained, nothing to save
        return False
    finished = run.train()
    if finished:
        part = folder / f".{RESULT}.part"
        part.write_text(json.dumps(result(run, predicted), indent=2) + "\n")
        os.replace(part, folder / RESULT)
    return finished


def predict(run: Run) -> dict[str, int]:
    """Bytes that should last from step to step, of this optimizer and of AdamW."""
    keywords = {key: value for key, value in run.job.keywords.items() if key not in EXECUTION}
    ours = lowrank_optim.estimate_memory(run.model, find(run.job.optimizer), **keywords)
    adamw = lowrank_optim.estimate_memory(run.model, torch.optim.AdamW)
    return {
        "weights": ours.weights,
        "gradients": ours.gradients,
        "optimizer_predicted": ours.optimizer,
        "optimizer_predicted_adamw": adamw.optimizer,
    }


def result(run: Run, predicted: dict[str, int]) -> dict[str, Any]:
    job, clock = run.job, run.clock
    measured = {"optimizer_measured": lowrank_optim.state_bytes(run.optimizer), "peak": run.peak}
    tokens = run.step * job.batch * job.sequence
    return {
        "label": job.label,
        "job": job.to_dict(),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "initial_weights": run.initial_weights,
        "bytes": {**predicted, **measured},
        "seconds": asdict(clock),
        "optimizer_share_of_time": clock.optimizer / clock.training,
        "tokens": tokens,
        "tokens_per_second": tokens / clock.training,
        "validation_tokens": run.corpus.validation_tokens - 1,  # the first one is never a target
        "validation": run.history.validation,
        "validation_loss": run.history.validation[-1][1],
        "training_loss": run.history.losses[-1],
    }
