"""Runs of several processes that are killed, in a step or in a save, go on from the last whole checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.multiprocessing import ProcessExitedException

from lowrank_optim import ddp_project, full_state, load_full_state
from tests.cases import CASES
from tests.support.processes import spawn
from tests.support.wrapped import apart, build, steps, weights

GALORE = next(case for case in CASES if case.name == "galore_adamw")
SAVE_EVERY, LAST = 3, 13  # refreshes before steps 0 and 7
IN_A_STEP, IN_A_SAVE = 8, 12  # both after what is saved at 6


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# -- checkpoints: written next to where they belong, then renamed ----------------------------------------------------


def save_file(model, optimizer, path, killed):
    """DistributedDataParallel: all is on rank 0."""
    state = full_state(optimizer)
    if state is None:
        return
    part = path.with_suffix(".part")
    torch.save({"model": model.module.state_dict(), "optimizer": state}, part)
    if killed:
        os.truncate(part, part.stat().st_size // 2)
        die()
    os.replace(part, path)


def load_file(model, optimizer, path):
    saved = torch.load(path, weights_only=True)
    model.module.load_state_dict(saved["model"])
    load_full_state(optimizer, saved["optimizer"])


def save_shards(model, optimizer, path, killed):
    """FSDP2: every rank writes what it has."""
    state, part = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), f"{path}.part"
    if killed and dist.get_rank() == 1:
        die()  # the others have begun, and find nobody to finish with
    dcp.save(state, checkpoint_id=part)
    if dist.get_rank() == 0:
        os.replace(part, path)


def load_shards(model, optimizer, path):
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


KINDS = {"ddp": (save_file, load_file), "projected": (save_file, load_file), "shards": (save_shards, load_shards)}


# -- the run -----------------------------------------------------------------------------------------------------------


def run(rank, world, folder, kind, kill):
    """From the last checkpoint there is to the end; `kill` names the step or save in which a rank is killed."""
    save, load = KINDS[kind]
    model, optimizer = build(GALORE, "ddp" if kind == "projected" else kind)
    if kind == "projected":
        ddp_project(model, optimizer)
    done = max((int(path.suffix[1:]) for path in Path(folder).glob("step.*") if path.suffix != ".part"), default=0)
    dist.barrier()  # nobody saves before all have looked
    if done:
        load(model, optimizer, Path(folder) / f"step.{done}")
    for step in range(done, LAST):
        if kill == ("step", step) and rank == 1:
            die()
        steps(model, optimizer, step, step + 1, rank, world)
        if (step + 1) % SAVE_EVERY == 0:
            save(model, optimizer, Path(folder) / f"step.{step + 1}", kill == ("save", step + 1))
            dist.barrier()
    end = weights(model)
    if rank == 0:
        torch.save((done, end), f"{folder}/end.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_exactly(kind, tmp_path):
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    for folder in (quiet, killed):
        folder.mkdir()
    spawn(run, 2, str(quiet), kind, None)
    for kill in (("step", IN_A_STEP), ("save", IN_A_SAVE)):
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            spawn(run, 2, str(killed), kind, kill)
    begun = list(killed.glob("*.part"))
    assert begun or kind == "shards", "the save was interrupted when it had written something"
    spawn(run, 2, str(killed), kind, None)
    start, end = torch.load(killed / "end.pt", weights_only=True)
    assert start == IN_A_SAVE - SAVE_EVERY
    assert apart(end, torch.load(quiet / "end.pt", weights_only=True)[1]) == 0
    shutil.rmtree(killed)
