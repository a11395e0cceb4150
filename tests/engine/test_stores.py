"""Moments, weights and compensations in few bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_optim
from tests.cases import gradients
from tests.support.laws import steps_of


def test_the_original_packages_names():
    p = nn.Parameter(torch.randn(80, 90))
    optimizer = lowrank_optim.GaLoreAdamW8bit([p], lr=1e-3, rank=8)
    assert optimizer.state[p]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[p]["basis"].dtype == torch.bfloat16
    assert optimizer.param_groups[0]["state_dtype"] == "int8"
    assert lowrank_optim.GaLoreAdamW8bit([p], rank=8, state_dtype="int4").param_groups[0]["state_dtype"] == "int4"


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_vectors_and_small_matrices_keep_full_precision(state_dtype):
    large, small, vector = (
        nn.Parameter(torch.randn(64, 80)),
        nn.Parameter(torch.randn(20, 30)),
        nn.Parameter(torch.randn(9000)),
    )
    optimizer = lowrank_optim.GaLoreAdamW([large, small, vector], rank=4, state_dtype=state_dtype)
    assert optimizer.state[large]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32
    assert optimizer.state[small]["basis"].dtype == torch.float32
    assert optimizer.state[vector]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize(("state_dtype", "tolerance"), [("int8", 0.05), ("int4", 0.35)])
def test_quantized_moments_follow_exact_ones(state_dtype, tolerance):
    ends, signal = [], torch.randn(64, 96)
    for kept in ("float32", state_dtype):
        p = nn.Parameter(torch.zeros(64, 96))
        optimizer = lowrank_optim.GaLoreAdamW([p], lr=1e-2, rank=16, basis="svd", state_dtype=kept, weight_decay=0.0)
        torch.manual_seed(3)
        ends.append(steps_of(optimizer, p, [signal + 0.5 * torch.randn(64, 96) for _ in range(40)]))
    assert (ends[0] - ends[1]).norm() < tolerance * ends[0].norm()


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_quantized_second_moments_never_vanish(state_dtype):
    """Nine decades within a block: rounded to zero, a second moment would leave its first to be divided by eps."""
    p = nn.Parameter(torch.zeros(64, 96))
    optimizer = lowrank_optim.GaLoreAdamW([p], lr=1.0, rank=16, state_dtype=state_dtype, weight_decay=0.0)
    for g in gradients((64, 96), 20):
        before = p.detach().clone()
        steps_of(optimizer, p, [g])
        assert (p - before).norm() < 2 * (16 * 96) ** 0.5, "entries of Adam's direction have about size 1"


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_quantized_moments_have_no_preferred_sign(state_dtype):
    """The maps have 1 and no -1: a block with a negative peak would lose a part of it at every write."""
    p, q = nn.Parameter(torch.zeros(64, 128)), nn.Parameter(torch.randn(8, 8))
    groups = [{"params": [p], "rank": None}, {"params": [q], "rank": 2}]
    options = dict(lr=1.0, betas=(0.99, 0.999), weight_decay=0.0, state_dtype=state_dtype)
    optimizer = lowrank_optim.GaLoreAdamW(groups, **options)
    rows = torch.where(torch.arange(64) < 32, -1.0, 1.0).unsqueeze(1)  # whole blocks of either sign
    for _ in range(300):
        before = p.detach().clone()
        p.grad = 0.01 * rows.expand(64, 128).contiguous()
        optimizer.step()
    moved = (p.detach() - before) * rows
    assert moved.abs().min() > 0.9
    assert (moved[:32].mean() - moved[32:].mean()).abs() < 1e-3


def test_maximize_is_minimizing_the_negative_also_in_int4():
    ends, grads = [], [torch.randn(64, 96) for _ in range(30)]
    for up in (False, True):
        p = nn.Parameter(torch.zeros(64, 96))
        options = dict(lr=1e-2, rank=8, state_dtype="int4", maximize=up, weight_decay=0.0)
        ends.append(steps_of(lowrank_optim.GaLoreAdamW([p], **options), p, [-g if up else g for g in grads]))
    assert (ends[0] - ends[1]).norm() < 0.01 * ends[0].norm()


def test_int4_second_moments_follow_growth():
    """A step adds a thousandth; rounded to the nearest sixteenth, it would be lost."""
    p = nn.Parameter(torch.zeros(64, 128))
    optimizer = lowrank_optim.GaLoreAdamW([p], lr=1e-3, rank=32, state_dtype="int4", update_proj_gap=10_000)
    store = optimizer.recipe(optimizer.param_groups[0]).spec((64, 128), 32)["exp_avg_sq"].store
    kept = {suffix: torch.zeros(shape, dtype=dtype) for suffix, (shape, dtype, _) in
            zip(store.suffixes, store.layout((32, 128), torch.float32), strict=True)}  # fmt: skip
    v = torch.full((32, 128), 0.01)
    v[:, ::2] = 1.0
    for step in range(3000):
        store.write_(kept, v, (7, (1, step), 0))
        v = 0.999 * store.read(kept, (32, 128), torch.float32) + 0.001
    assert float(v[:, 1::2].mean()) == pytest.approx(1.0, rel=0.1)


def test_kahan_owes_nothing_after_a_cast():
    model = nn.Linear(64, 64, bias=False).bfloat16()
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), rank=8, bf16_update="kahan", weight_decay=0.0)
    steps_of(optimizer, model.weight, [torch.randn(64, 64).bfloat16() for _ in range(5)])
    model.float()
    owed = optimizer.state[model.weight]["compensation"].float()
    before = model.weight.detach() + owed
    optimizer.param_groups[0]["lr"] = 0.0
    after = steps_of(optimizer, model.weight, [torch.randn(64, 64) for _ in range(5)])
    assert owed.any()
    assert torch.equal(after, before)
    assert "compensation" not in optimizer.state[model.weight]


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_blocks_of_a_plain_stack_are_not_cut(state_dtype, monkeypatch):
    monkeypatch.setattr("lowrank_optim.engine.limits.SLICE", 1024)
    ends = []
    for turned in (False, True):  # a gradient with strides of its own is never cut
        torch.manual_seed(2)
        p, q = nn.Parameter(torch.zeros(5, 41, 33)), nn.Parameter(torch.randn(8, 8))
        groups = [{"params": [p], "rank": None, "as_matrix": "batch"}, {"params": [q], "rank": 2}]
        optimizer = lowrank_optim.GaLoreAdamW(groups, lr=1e-2, state_dtype=state_dtype)
        for _ in range(6):
            g = torch.randn(5, 41, 33) * torch.logspace(-3, 3, 5).view(-1, 1, 1)
            p.grad = g.mT.contiguous().mT if turned else g
            optimizer.step()
        ends.append(p.detach())
    assert torch.allclose(*ends, atol=1e-5)
