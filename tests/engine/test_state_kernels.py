"""Moments updated where they are stored: the same trajectories as opened ones, bit for bit, in less memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim import estimate_memory
from lowrank_optim.engine import fused
from lowrank_optim.engine.open_state import Opened, Stored
from lowrank_optim.memory.peak import Peak
from lowrank_optim.ops.philox import Places
from lowrank_optim.ops.products import scratch
from lowrank_optim.parts.store import BFloat16

SHAPES = [(96, 80), (96, 80), (96, 80), (80, 200), (6, 48, 91), (130,), (61, 70)]
STATES = ["float32", "bfloat16", "int8", "int4"]
KINDS = {"float32": fused.Float32, "bfloat16": fused.BFloat16, "int8": fused.Int8}


def trained(make=lowrank_optim.GaLoreAdamW, dtype=torch.float32, steps=7, **options):
    """Weights, and all state; gradients are the same whatever the optimizer does."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    options = dict(lr=0.01, betas=(0.83, 0.97), rank=33, update_proj_gap=4, stagger=False, weight_decay=0.1) | options
    optimizer = make(params, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return [p.detach() for p in params], [dict(optimizer.state[p]) for p in params]


def assert_equal(ours, theirs):
    for x, y in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(x, y)
    for x, y in zip(ours[1], theirs[1], strict=True):
        assert x.keys() == y.keys()
        for key in x:
            assert torch.equal(x[key], y[key]), key


def opened(monkeypatch, **options):
    """The same with moments that are opened, updated and written back."""
    with monkeypatch.context() as patch:
        patch.setattr(fused, "_FROM_STORE", {})
        return trained(**options)


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_stored_moments_take_the_trajectory_of_opened_ones(monkeypatch, state_dtype, foreach, moments):
    options = {"state_dtype": state_dtype, "foreach": foreach, "moments": moments}
    assert_equal(trained(**options), opened(monkeypatch, **options))


@pytest.mark.thin
@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
        {"capturable": True},
        {"capturable": True, "foreach": True, "moments": "reset"},
        {"maximize": True, "foreach": True},
        {"proj_type": "reverse_std"},
        {"make": lowrank_optim.FiraAdamW},
        {"make": lowrank_optim.APOLLO, "weight_decay": 0.3},
    ],
    ids=str,
)
def test_stored_moments_in_every_way_to_run_a_step(monkeypatch, state_dtype, options):
    options = {"state_dtype": state_dtype, **options}
    assert_equal(trained(**options), opened(monkeypatch, **options))


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("foreach", [False, True])
def test_which_kernel_runs(monkeypatch, state_dtype, foreach):
    taken = []

    def spy(kind, kernel):
        def run(pairs, d, rule):
            taken.append((kind, len(d)))
            return kernel(pairs, d, rule)

        return run

    table = {kind: spy(kind, kernel) for kind, kernel in fused._FROM_STORE.items()}
    monkeypatch.setattr(fused, "_FROM_STORE", table)
    trained(state_dtype=state_dtype, foreach=foreach, steps=3)
    kinds = {kind for kind, _ in taken}
    if state_dtype == "int4":
        assert not kinds
    elif not (state_dtype == "float32" and not foreach):  # single ones are open without a copy
        assert KINDS[state_dtype] in kinds
        assert max(count for _, count in taken) == (3 if foreach else 1)


CODE = """
import sys, torch
from tests.engine.test_state_kernels import trained, STATES
torch.set_num_threads(1)
torch.save([trained(state_dtype=s, foreach=f)[1] for s in STATES for f in (False, True)], sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(lowrank_optim.backend_info()["cpu"].kernels != "native", reason="no native kernels here")
def test_plain_torch_leaves_the_same_state(tmp_path):
    from tests.support.subprocesses import environment

    env = environment(LOWRANK_OPTIM_NATIVE="off")
    subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "state")], env=env, check=True)
    saved = torch.load(tmp_path / "state", weights_only=True)
    for theirs, (state_dtype, foreach) in zip(saved, [(s, f) for s in STATES for f in (False, True)], strict=True):
        ours = trained(state_dtype=state_dtype, foreach=foreach)[1]
        assert_equal(([], ours), ([], theirs))


def test_columns_of_a_shard_are_rounded_after_they_were_opened():
    """Their elements have numbers with gaps, which the kernel does not know."""
    kept = [torch.ones(4, 5, dtype=torch.bfloat16) for _ in range(2)]
    noise = 7, (11, 3), Places(0, 2, 5, 6)
    stored = {key: [Stored(BFloat16(), {"": x}, noise)] for key, x in zip(fused._MOMENTS, kept, strict=True)}
    st = Opened(stored, lambda key: stored[key][0].kept[""].float(), stored.__getitem__, lambda x: [x])
    assert not fused._from_store(st, torch.randn(4, 5), (0.9, 0.99, 1e-8, 3.0, None))
    assert all(bool((x == 1).all()) for x in kept)
    whole = {key: [one._replace(noise=(7, (11, 3), 2)) for one in some] for key, some in stored.items()}
    st = Opened(whole, lambda key: whole[key][0].kept[""].float(), whole.__getitem__, lambda x: [x])
    assert fused._from_store(st, torch.randn(4, 5), (0.9, 0.99, 1e-8, 3.0, None))
    assert not any(bool((x == 1).all()) for x in kept)
    assert not any(map(st.is_open, fused._MOMENTS))


def test_an_opened_moment_replaces_the_stored_one():
    st = Opened(["exp_avg"], lambda key: torch.zeros(3), lambda key: [], lambda x: [x])
    assert "exp_avg" in st
    assert "exp_avg_sq" not in st
    assert st.stored("exp_avg") == []
    assert st["exp_avg"] is st["exp_avg"]
    assert st.stored("exp_avg") is None
    assert list(st) == ["exp_avg"]
    del st["exp_avg"]
    assert not len(st)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_no_float32_copies_of_moments(state_dtype):
    """Of R (256, 1024) only R itself, which becomes the direction, and what plain torch opens of it at once."""
    shape, rank, r = (512, 1024), 256, 4 * 256 * 1024
    options = {"rank": rank, "state_dtype": state_dtype, "update_proj_gap": 100}
    p = nn.Parameter(torch.randn(shape))
    optimizer = lowrank_optim.GaLoreAdamW([p], **options)
    for _ in range(2):
        p.grad = torch.randn_like(p)
        optimizer.step()
    with Peak() as peak:
        optimizer.step()
    basis = 4 * shape[0] * rank  # read from bfloat16
    planned = estimate_memory([shape], lowrank_optim.GaLoreAdamW, **options).step_workspace
    block = 4 * scratch(shape, rank)  # of the back-projection
    assert peak.most <= r + basis + max(block, 4096) <= planned
    assert planned < r + basis + block + 4 * r, "what opened moments, and their rounding, would take"
