"""Laws of Q-GaLore, on the paper's loop and on the engine."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim.parts import Affine
from lowrank_optim.recipe.plan import resolve_side
from tests.cases import gradients
from tests.reference import q_galore
from tests.reference.galore import exact
from tests.support.laws import ADAM, COMMON, RANK, close, moves, problem, steps_of


@pytest.mark.cpus
def test_doubles_its_gap_first_at_the_sixth_refresh(run):
    """A constant gradient has a constant basis. Refreshes at 0, 3, ..., 15; then the gap is 6, then 12, then 24."""
    weight, grads = problem(steps=1)
    refreshed = []
    options = {**COMMON, "gap": 3, "threshold": 0.4, "refreshed": refreshed}
    run.q_galore(weight, grads * 50, None, **options)
    assert refreshed == [0, 3, 6, 9, 12, 15, 18, 24, 48]


@pytest.mark.cpus
def test_overlap_of_equal_bases_is_one(run):
    weight, grads = problem(steps=1)
    for threshold, last in ((0.99, 24), (1.01, 27)):
        refreshed = []
        run.q_galore(weight, grads * 30, None, **COMMON, gap=3, threshold=threshold, refreshed=refreshed)
        assert refreshed[-1] == last


@pytest.mark.cpus
def test_keeps_its_gap_while_the_basis_turns(run):
    weight, _ = problem()
    grads = list(torch.randn(30, 40, 8, dtype=torch.float64))
    refreshed = []
    weight = torch.zeros(40, 8, dtype=torch.float64)
    run.q_galore(weight, grads, None, **COMMON, gap=3, threshold=0.9, refreshed=refreshed)
    assert refreshed == list(range(0, 30, 3))


@pytest.mark.cpus
def test_without_quantization_is_galore_at_its_refreshes(run, loop):
    weight, grads = problem(steps=20)
    refreshed = []
    actual = run.q_galore(weight, grads, None, **COMMON, gap=1, threshold=0.1, refreshed=refreshed)
    assert len(refreshed) < 20
    close(actual, loop.galore(weight, grads, set(refreshed), **COMMON))


@pytest.mark.cpus
def test_uses_the_quantized_basis_for_everything(loop):
    weight, grads = problem(steps=1)
    (step,) = moves(loop.q_galore, weight, grads, **COMMON, gap=1, threshold=0.4, quantize=lambda p: (8 * p).round())
    p = (8 * exact(grads[0], RANK, "left", None)[0]).round()
    r = p.T @ grads[0]
    close(step, ADAM["lr"] * COMMON["scale"] * p @ (r / (r.abs() + ADAM["eps"])))


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96, 70), (64, 90)])
def test_int4_bases_equal_the_loop_with_the_same_quantizer(shape):
    weight, grads = 0.2 * torch.randn(shape, dtype=torch.float64), gradients(shape, 20, torch.float64)
    p = nn.Parameter(weight.clone())
    options = dict(lr=3e-3, betas=(0.83, 0.97), eps=3e-7, weight_decay=0.1, scale=0.7)
    optimizer = lowrank_optim.QGaLoreAdamW(
        [p], rank=9, update_proj_gap=4, basis="svd", state_dtype="float32", threshold=0.3, queue=2, **options
    )
    assert optimizer.state[p]["basis"].dtype == torch.uint8
    assert optimizer.state[p]["basis"].numel() == min(shape) * 9 // 2
    got = steps_of(optimizer, p, grads)
    want = q_galore.q_galore_adamw(
        weight, grads, set(), rank=9, side=resolve_side("std", *shape), gap=4, threshold=0.3, queue=2,
        quantize=lambda basis: Affine(4).rounded(basis, torch.float64), **options,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_refreshes_become_rare_where_the_subspace_stands_still():
    p, q = nn.Parameter(torch.zeros(20, 30)), nn.Parameter(torch.zeros(20, 30))
    optimizer = lowrank_optim.QGaLoreAdamW([p, q], rank=3, update_proj_gap=2, stagger=False)
    g = torch.randn(20, 3) @ torch.randn(3, 30)
    for _ in range(60):
        p.grad, q.grad = g.clone(), torch.randn(20, 30)
        optimizer.step()
    still, turning = optimizer.state[p], optimizer.state[q]
    assert int(still["refresh_gap"]) > 8
    assert int(still["refreshes"]) < 13
    assert int(turning["refresh_gap"]) == 2, "noise has no subspace: overlap 3 / 20"
    assert int(turning["refreshes"]) == 30


@pytest.mark.parametrize("make", [lowrank_optim.QGaLoreAdamW, lowrank_optim.FiraAdamW, lowrank_optim.SubsetNormAdamW])
def test_int8_weights_train(make):
    torch.manual_seed(1)
    teacher, x = torch.randn(64, 64) / 8, torch.randn(256, 64)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    plain = copy.deepcopy(model)
    lowrank_optim.quantize_weights(model)
    losses = {}
    for name, net in (("int8", model), ("float32", plain)):
        optimizer = make(net.named_parameters(), lr=3e-3)
        for _ in range(80):
            optimizer.zero_grad()
            loss = (net(x) - torch.tanh(x @ teacher)).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert isinstance(model[0].weight, lowrank_optim.Int8Weight)
    assert losses["int8"] < 1.3 * losses["float32"]


def test_int8_weights_resume_bit_for_bit():
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    lowrank_optim.quantize_weights(model)
    x = torch.randn(32, 64)

    def run(net, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

    optimizer = lowrank_optim.QGaLoreAdamW(model.named_parameters(), rank=8, update_proj_gap=3, lr=1e-2)
    run(model, optimizer, 5)
    model2 = copy.deepcopy(model)
    optimizer2 = lowrank_optim.QGaLoreAdamW(model2.named_parameters(), rank=8, update_proj_gap=3, lr=1e-2)
    optimizer2.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(model, optimizer, 5)
    run(model2, optimizer2, 5)
    for p, q in zip(model.parameters(), model2.parameters(), strict=True):
        assert torch.equal(p.detach() + 0, q.detach() + 0)


def test_the_estimate_knows_int8_weights():
    model = nn.Sequential(nn.Linear(64, 96, bias=False))
    lowrank_optim.quantize_weights(model)
    planned = lowrank_optim.estimate_memory({"w": (64, 96)}, lowrank_optim.QGaLoreAdamW, rank=8)
    packed = lowrank_optim.estimate_memory(
        [{"params": list(model.named_parameters())}], lowrank_optim.QGaLoreAdamW, rank=8
    )
    assert planned.weights == 4 * 64 * 96
    assert packed.weights == 64 * 96 + 8 * 64 * 96 // 256
    assert packed.gradients == planned.gradients
