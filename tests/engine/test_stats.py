"""`stats()`: what it counts is what happened, it follows definitions, and it is no part of checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank_optim
from tests.cases import Net, every_case, gradients, ranked, train
from tests.support.selection import FEW


def stepped(p, optimizer, grads):
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()


@pytest.mark.few(case=FEW)
@ranked
def test_captured_energy_is_that_of_the_last_refresh(case):
    p = nn.Parameter(torch.randn(24, 10, dtype=torch.float64))
    optimizer = case.build([("w", p)], rank=4, update_proj_gap=3, stagger=False, orthonormal=True)
    grads = gradients((24, 10), 8, torch.float64)
    if case.basis == "basis":  # methods that keep P; the last refresh is before step number 7, or every step
        seen = []
        for grad in grads:
            before = int(optimizer.state[p]["refreshes"])
            stepped(p, optimizer, [grad])
            if int(optimizer.state[p]["refreshes"]) > before:
                turned = grad.mT if optimizer.table.plans[p].side == "right" else grad
                basis = optimizer.state[p]["basis"]
                seen.append(float((basis.mT @ turned).square().sum() / turned.square().sum()))
        if case.name != "ldadam":  # whose gradient has the error in it
            assert optimizer.stats()["captured_energy/w"] == pytest.approx(seen[-1], rel=1e-6)
    else:
        stepped(p, optimizer, grads)
    energy = optimizer.stats().get("captured_energy")
    assert energy is None or 0 < energy <= 1 + 1e-9
    assert (energy is None) == (case.name == "apollo")  # which has no orthonormal projection


@pytest.mark.few(case=FEW)
@every_case
def test_counts(case):
    model = Net()
    optimizer = case.build(model.named_parameters(), update_proj_gap=4, stagger=False)
    train(model, optimizer, 9)
    states = [optimizer.state[p] for p in model.parameters()]
    stats = optimizer.stats()
    assert stats["refreshes"] == sum(int(state["refreshes"].sum()) for state in states if "refreshes" in state)
    assert (stats["refreshes"] > 0) == (stats["refresh_seconds"] > 0) == case.make.ranked
    assert stats["skipped_gradients"] == 0
    assert (stats["limiter_hits"] > 0) == (case.name in ("fira", "apollo"))
    assert all(isinstance(value, float) for value in stats.values())


def test_resets_and_skips_are_counted():
    model = Net()
    optimizer = lowrank_optim.GaLoreAdamW(
        model.named_parameters(), rank=3, moments="reset", update_proj_gap=4, stagger=False
    )
    train(model, optimizer, 9)  # refreshes before steps 1, 5 and 9
    matrices = 4 + 3  # conv, up, down, square, and three experts
    assert optimizer.stats()["refreshes"] == 3 * matrices
    assert optimizer.stats()["moment_resets"] == 2 * matrices
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    with pytest.warns(UserWarning, match="non-finite"):
        optimizer.step()
    assert optimizer.stats()["skipped_gradients"] == len(list(model.parameters()))


def test_every_hit_of_the_limiter_is_counted():
    p = nn.Parameter(torch.randn(12, 30))
    optimizer = lowrank_optim.FiraAdamW([("w", p)], rank=3, limit=1.5, betas=(0.0, 0.999))
    grad = torch.randn(12, 30)
    stepped(p, optimizer, [grad] * 4)
    hits = optimizer.stats()["limiter_hits"]
    stepped(p, optimizer, [grad * 0, grad * 0])  # nothing grows
    assert optimizer.stats()["limiter_hits"] == hits
    stepped(p, optimizer, [grad * 1e3])  # far above what the second moment has seen
    assert optimizer.stats()["limiter_hits"] == hits + 1


def test_an_expert_without_gradient_counts_once_it_has_one():
    p = nn.Parameter(torch.randn(3, 20, 18))
    optimizer = lowrank_optim.GaLoreAdamW([("experts", p)], rank=4)
    grad = torch.randn(3, 20, 18)
    grad[1] = 0
    stepped(p, optimizer, [grad])
    assert optimizer.stats()["refreshes"] == 2


@pytest.mark.parametrize("foreach", [False, True])
def test_stacked_matrices_have_a_number_each(foreach):
    torch.manual_seed(0)
    params = [(f"w{i}", nn.Parameter(torch.randn(20, 18))) for i in range(4)]
    optimizer = lowrank_optim.GaLoreAdamW(params, rank=4, foreach=foreach)
    for i, (_, p) in enumerate(params):  # the last one is in a subspace of 4 dimensions
        p.grad = torch.randn(20, 4) @ torch.randn(4, 18) if i == 3 else torch.randn(20, 18)
    optimizer.step()
    shares = [optimizer.stats()[f"captured_energy/w{i}"] for i in range(4)]
    assert shares[3] == pytest.approx(1, abs=1e-5)
    assert all(0.2 < share < 0.8 for share in shares[:3])
    assert optimizer.stats()["captured_energy"] == pytest.approx(sum(shares) / 4)


def test_stats_are_in_no_checkpoint_and_survive_copies():
    model = Net()
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), rank=3)
    train(model, optimizer, 2)
    assert "captured_energy" in optimizer.stats()
    twin = copy.deepcopy(optimizer)
    assert twin.stats()["refreshes"] == optimizer.stats()["refreshes"]
    assert "captured_energy" not in twin.stats()
    optimizer.load_state_dict(optimizer.state_dict())
    assert "captured_energy" in optimizer.stats()
