"""examples/pretrain.py with DeepSpeed: the losses of one process at every stage, and its own resume."""

from __future__ import annotations

import dataclasses

import pytest
import test_pretrain
import torch
import torch.distributed as dist
from test_pretrain import command, make_job, train
from test_pretrain_ranks import GALORE, SIZES, assert_close, go, spawn

from pretraining import strategy  # isort: skip
from pretraining.errors import PretrainError  # isort: skip

deepspeed = pytest.importorskip("deepspeed")
folder, cache, process = test_pretrain.folder, test_pretrain.cache, test_pretrain.process

ADAMW = ["--optimizer", "adamw"]


def refusal(job):
    try:
        strategy.check(job)
    except PretrainError as error:
        return str(error)


def every_stage(team, folder, jobs):
    """Undisturbed, and stopped after 5 steps: the same losses."""
    found = {}
    for key, job in jobs.items():
        (path := folder / "-".join(map(str, key))).mkdir(exist_ok=True)
        dist.barrier()
        found[key] = go(job, path / "whole", team).history
        go(job, path / "parts", team, stop=5)
        found["resumed", key] = go(job, path / "parts", team).history
    if team.main:
        torch.save(found, folder / "found.pt")


@pytest.fixture(scope="module")
def jobs(folder, cache):
    made = {}
    for label, flags in (("adamw", ADAMW), ("galore", GALORE)):
        one = make_job(command(folder, cache, *SIZES, *flags))
        for name in strategy.STAGES:
            made[label, name] = dataclasses.replace(one, strategy=name, world=2)
    return made


@pytest.fixture(scope="module")
def found(jobs, tmp_path_factory):
    path = tmp_path_factory.mktemp("zero")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("LOCAL_RANK", "0")
        spawn(every_stage, 2, path, jobs)
    return torch.load(path / "found.pt", weights_only=False)


@pytest.fixture(scope="module")
def alone(jobs, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone")
    return {
        label: train(dataclasses.replace(jobs[label, "zero0"], strategy="single", world=1), path / label).history
        for label in ("adamw", "galore")
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", strategy.STAGES)
@pytest.mark.parametrize("label", ["adamw", "galore"])
def test_losses_are_those_of_one_process(found, alone, label, name):
    assert_close(found[label, name], alone[label])
    assert_close(found["resumed", (label, name)], found[label, name], 1e-6)


def test_what_is_refused(jobs):
    job = jobs["galore", "zero0"]
    for changes, message in (
        ({"amp": "bf16"}, "take --dtype bf16"),
        ({"optimizer": "Muon", "strategy": "zero2"}, "torch's Muon needs matrices"),
        ({"optimizer": "ReLoRA"}, "must be whole in every process"),
        ({"batch": 13}, "must be a multiple of the number of processes"),
    ):
        assert message in refusal(dataclasses.replace(job, **changes))
