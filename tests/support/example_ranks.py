"""Runs of examples/pretrain.py in several processes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.example import StopAt

from pretraining import loop  # isort: skip
from pretraining.interrupt import Interrupt  # isort: skip
from pretraining.team import Team  # isort: skip


GALORE = ["--optimizer", "galore", "--set", "rank=4", "update_proj_gap=3"]
# 4 and 2 sequences per forward pass of two processes, of one 4, 4 and 4.
SIZES = ["--layers", "2", "--batch", "12", "--micro-batch", "4"]


def spawn(worker, world, *args):
    folder = args[0]
    (folder / "meet").unlink(missing_ok=True)
    mp.spawn(_entry, (world, worker, args), nprocs=world)


def _entry(rank, world, worker, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{args[0]}/meet", rank=rank, world_size=world)
    team = Team(rank, world)
    worker(team, *args)
    team.leave()


def go(job, path, team, stop=None, only=None):
    """Train from the checkpoint in `path`, if there is one, to the end or until `stop` steps are done."""
    if team.main:
        path.mkdir(exist_ok=True)
    dist.barrier()
    interrupt = Interrupt() if stop is None or only not in (None, team.rank) else StopAt(stop)
    run = loop.Run(dataclasses.replace(job, world=team.world), path, interrupt, team)
    if run.path.exists():
        run.load()
    if isinstance(interrupt, StopAt):
        interrupt.run = run
    assert run.train() is (stop is None)
    assert stop is None or run.step == stop
    return run


def assert_close(history, other, limit=1e-5):
    assert history.losses == pytest.approx(other.losses, abs=limit)
    assert [step for step, _ in history.validation] == [step for step, _ in other.validation]
    expected = [loss for _, loss in other.validation]
    assert [loss for _, loss in history.validation] == pytest.approx(expected, abs=limit)
