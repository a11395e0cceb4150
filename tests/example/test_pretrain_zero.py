"""examples/pretrain.py with DeepSpeed: the losses of one process at every stage, and its own resume."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

from tests.support.example import command, make_job, train
from tests.support.example_ranks import GALORE, SIZES, assert_close, go, spawn

from pretraining import strategy  # isort: skip
from pretraining.errors import PretrainError  # isort: skip

deepspeed = pytest.importorskip("deepspeed")

ADAMW = ["--optimizer", "adamw"]
RELORA = ["--optimizer", "relora", "--set", "merge_every=4"]
RUNS = [
    *(("adamw", name) for name in ("zero0", "zero3")),
    *(("galore", name) for name in strategy.STAGES),
    *(("relora", name) for name in ("zero1", "zero3")),
]


def refusal(job):
    try:
        strategy.check(job)
    except PretrainError as error:
        return str(error)


def every_stage(team, folder, jobs):
    """Undisturbed, and stopped after 5 steps: the same losses. Converted layers are merged at the end."""
    found = {}
    for key, job in jobs.items():
        (path := folder / "-".join(map(str, key))).mkdir(exist_ok=True)
        dist.barrier()
        found[key] = go(job, path / "whole", team).history
        go(job, path / "parts", team, stop=5)
        resumed = go(job, path / "parts", team)
        found["resumed", key] = resumed.history
        if resumed.converted:
            found["merged", key] = resumed.merge()
    if team.main:
        torch.save(found, folder / "found.pt")


@pytest.fixture(scope="module")
def jobs(folder, cache):
    flags = {"adamw": ADAMW, "galore": GALORE, "relora": RELORA}
    some = {label: make_job(command(folder, cache, *SIZES, *own)) for label, own in flags.items()}
    return {(label, name): dataclasses.replace(some[label], strategy=name, world=2) for label, name in RUNS}


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
        label: train(dataclasses.replace(jobs[label, "zero3"], strategy="single", world=1), path / label)
        for label in ("adamw", "galore", "relora")
    }


@pytest.mark.slow
@pytest.mark.parametrize(("label", "name"), RUNS)
def test_losses_are_those_of_one_process(found, alone, label, name):
    assert_close(found[label, name], alone[label].history)
    assert_close(found["resumed", (label, name)], found[label, name], 1e-6)


@pytest.mark.slow
def test_converted_layers_are_merged_at_the_end(found, alone):
    loss = alone["relora"].merge()
    for name in ("zero1", "zero3"):
        assert found["merged", ("relora", name)] == pytest.approx(loss, abs=1e-5)
        assert found["merged", ("relora", name)] == pytest.approx(found["relora", name].validation[-1][1], abs=1e-5)


def test_options_without_deepspeed_support_are_refused(jobs):
    job = jobs["galore", "zero0"]
    for changes, message in (
        ({"amp": "bf16"}, "take --dtype bf16"),
        ({"optimizer": "Muon", "strategy": "zero2"}, "torch's Muon needs matrices"),
        ({"optimizer": "ReLoRA", "warm_start": 3}, "would give the model to DeepSpeed twice"),
        ({"optimizer": "ReLoRA", "keywords": {"base": "nf4"}}, "take base=dense"),
        ({"optimizer": "SST", "strategy": "zero3"}, "stage 3 partitions all weights of SST"),
        ({"optimizer": "LoQT", "dtype": "bf16"}, "trains other tensors in the place of the parameters of LoQT"),
        ({"batch": 13}, "must be a multiple of the number of processes"),
    ):
        assert message in refusal(dataclasses.replace(job, **changes))
