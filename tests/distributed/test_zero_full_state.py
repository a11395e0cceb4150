"""full_state under DeepSpeed ZeRO: a run of one stage and number of processes resumes in any other.

Two processes work through everything and end with a kill; three then go on from the files that were left.
"""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

from lowrank_optim import full_state, load_full_state
from tests.cases import case_of
from tests.support.processes import message
from tests.support.wrapped import equal
from tests.support.zero import Weights, alone, apart, build, initialized, spawn, train, weights, whole_gradients

pytestmark = pytest.mark.slow  # its processes take long

MIDDLE = 8  # refreshes before steps 0, 7 and 14
SUB_GROUPS = {"sub_group_size": 300, "offload_optimizer": {"device": "cpu"}}
CASE, OPTIONS = case_of("galore_adamw"), {"moments": "rotate"}
# dtype, stage, the next stage, its section of the config
MOVES = [
    (torch.float32, 0, 1, {}), (torch.float32, 1, 2, {}), (torch.float32, 2, 3, {}), (torch.float32, 3, 0, {}),
    (torch.bfloat16, 0, 2, {}), (torch.bfloat16, 3, 0, SUB_GROUPS),
]  # fmt: skip
EARLY = [(torch.float32, 1), (torch.float32, 3)]  # the next stages that take what was loaded before DeepSpeed begins


def begun(stage, dtype=torch.float32, saved=None, zero=None, early=False):
    """An engine and its optimizer, at the beginning or with what was saved; `early`: loaded before DeepSpeed begins."""
    model = Weights()
    if saved is not None:
        model.load_state_dict(saved["model"])
    optimizer = build(model, CASE, **OPTIONS)
    if early:
        load_full_state(optimizer, saved["optimizer"])
    engine = initialized(model, optimizer, stage, dtype, zero)
    if saved is not None and not early:
        load_full_state(optimizer, saved["optimizer"])
    return engine, optimizer


def save(engine, optimizer, stage, path):
    """Write it next to where it belongs, then renamed."""
    names = [name for name, _ in engine.module.named_parameters()]
    state, model = full_state(optimizer), dict(zip(names, weights(engine, stage), strict=True))
    if state is not None:
        torch.save({"model": model, "optimizer": state}, f"{path}.part")
        os.replace(f"{path}.part", path)
    dist.barrier()
    return torch.load(path, weights_only=True)


# -- two processes -----------------------------------------------------------------------------------------------------


def two(rank, world, folder):
    found = {}
    for dtype, stage, other, zero in MOVES:
        grads = whole_gradients(dtype)
        engine, optimizer = begun(stage, dtype, zero=zero)
        train(engine, grads[:MIDDLE])
        saved = save(engine, optimizer, stage, f"{folder}/{stage}.{dtype}.pt")
        train(engine, grads[MIDDLE:])
        ends = [weights(engine, stage)]
        for to in (stage, other):
            engine, optimizer = begun(to, dtype, saved, zero, to == other and (dtype, other) in EARLY)
            again = full_state(optimizer)
            train(engine, grads[MIDDLE:])
            ends.append(weights(engine, to))
            parts = [key for key in saved["optimizer"] if key != "borders" or to == stage]
            same = rank > 0 or all(equal(again[key], saved["optimizer"][key]) for key in parts)
            found[stage, dtype, to] = apart(ends[0], ends[-1]), same, parts
    found["refused"], engine = refused(saved, rank)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    train(engine, whole_gradients(torch.float32)[2:4])
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)  # in the middle of a run, when checkpoints are on disk
    dist.barrier()


def refused(saved, rank):
    """By all ranks, also where one alone has what does not fit; what was there before stays."""
    saved = saved["optimizer"]
    engine, optimizer = begun(3)
    train(engine, whole_gradients(torch.float32)[:2])
    before, found = full_state(optimizer), {}
    bias = {**saved["state"]["bias"], "exp_avg": torch.zeros(5)}
    few = {key: x for key, x in saved["state"]["few"].items() if key != "exp_avg"}
    for what, edit in (
        ("shape", {"state": {**saved["state"], "bias": bias}}),
        ("keys", {"state": {**saved["state"], "few": few}}),
        ("method", {"method": "FiraAdamW"}),
        ("masters", {"masters": {"low": torch.zeros(7, 41)}}),
    ):
        found[what] = message(ValueError, load_full_state, optimizer, {**saved, **(edit if rank == 1 else {})})
    found["kept"] = rank > 0 or equal(before, full_state(optimizer)) if rank == 0 else full_state(optimizer) is None
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return everyone, engine


def three(rank, world, folder):
    """Another number of processes resumes from the checkpoint of the killed ones, and one process from that of one."""
    ends, grads = {}, whole_gradients(torch.float32)
    for path, stage in ((1, 3), (3, 2), ("one", 1)):
        name = path if path == "one" else f"{path}.{torch.float32}"
        engine, _ = begun(stage, saved=torch.load(f"{folder}/{name}.pt", weights_only=True))
        train(engine, grads[MIDDLE:])
        ends[path] = weights(engine, stage)
    return ends


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moves")
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        spawn(two, 2, str(folder))
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.mark.parametrize("move", MOVES, ids=lambda move: f"{move[1]}-{move[0]}")
def test_the_same_stage_resumes_bit_for_bit(move, found):
    dtype, stage, *_ = move
    apart, same, parts = found[stage, dtype, stage]
    assert same
    assert apart == 0
    assert ("masters" in parts) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("move", MOVES, ids=lambda move: f"{move[1]}-{move[2]}-{move[0]}")
def test_another_stage_resumes(move, found):
    dtype, stage, other, _ = move
    apart, same, _ = found[stage, dtype, other]
    assert same
    assert apart < (1e-6 if dtype == torch.float32 else 1e-30)


def test_a_state_that_does_not_fit_is_refused_by_all_ranks(found):
    for one in found["refused"]:
        assert "bias: exp_avg is (5,), expected (13,)" in one["shape"]
        assert "few: exp_avg on one side only" in one["keys"]
        assert "it is of FiraAdamW, and this optimizer is GaLoreAdamW" in one["method"]
        assert "low is (7, 40), and its master (7, 41)" in one["masters"]
        assert one["kept"]


def in_one_process(folder, stage):
    """The end of what two processes have begun."""
    saved = torch.load(folder / f"{stage}.{torch.float32}.pt", weights_only=True)
    model = Weights()
    model.load_state_dict(saved["model"])
    optimizer = build(model, CASE, **OPTIONS)
    load_full_state(optimizer, saved["optimizer"])
    assert equal(full_state(optimizer)["state"], saved["optimizer"]["state"])
    go_on(model, optimizer, whole_gradients(torch.float32)[MIDDLE:])
    return [p.detach() for p in model.parameters()]


def go_on(model, optimizer, grads):
    for step in grads:
        for p, g in zip(model.parameters(), step, strict=True):
            p.grad = g
        optimizer.step()


def test_one_process_resumes_from_two(folder):
    undisturbed = alone(CASE, whole_gradients(torch.float32), **OPTIONS)
    for stage in (0, 1, 2, 3):
        assert apart(undisturbed, in_one_process(folder, stage)) < 1e-6, stage


def test_three_processes_resume_after_a_kill(folder):
    grads = whole_gradients(torch.float32)
    model = Weights()
    optimizer = build(model, CASE, **OPTIONS)
    go_on(model, optimizer, grads[:MIDDLE])
    torch.save({"model": model.state_dict(), "optimizer": full_state(optimizer)}, folder / "one.pt")
    ends = spawn(three, 3, str(folder))
    go_on(model, optimizer, grads[MIDDLE:])
    for path, end in ends.items():
        assert apart(list(model.parameters()), end) < 1e-6, path
