"""The lattice: at the right settings one rule must become another, to rounding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from lowrank_optim import LowRankOptimizer
from lowrank_optim.parts import EMA, SVD, Constant, Drop, Every, Float32, Identity, NoMomentum, NoScaling
from lowrank_optim.recipe.recipe import Recipe
from tests.cases import Net, every_case, gradients, train
from tests.support.selection import FEW


@pytest.mark.few(case=FEW)
@every_case
def test_without_projection_it_is_the_rule_in_full_space(case):
    """Vectors, embeddings, head and every matrix of a group without rank, next to one projected matrix."""
    make, options, overrides = case.full
    ours, theirs = Net().double(), Net().double()
    theirs.load_state_dict(ours.state_dict())
    extra = nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
    mine = case.build([{"params": [extra], "rank": 2}, {"params": list(ours.parameters()), "rank": None}], **overrides)
    if make is torch.optim.Adafactor:  # beyond two dimensions torch factors the last two and clips the whole tensor
        for model in (ours, theirs):
            model.experts.requires_grad_(False)
            model.conv.requires_grad_(False)
    their = make([p for p in theirs.parameters() if p.requires_grad], foreach=False, **options)
    assert train(ours, mine, 20) == pytest.approx(train(theirs, their, 20), abs=1e-12)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-12


class _Linear(LowRankOptimizer):
    """A linear rule: heavy averaging, no scaling."""

    rule = "SGD"
    basis, beta = SVD(), 0.7

    def __init__(self, params, *, rank):
        defaults = dict(lr=0.05, weight_decay=0.1, rank=rank, proj_type="std", maximize=False, foreach=None)
        super().__init__(params, {**defaults, "bf16_update": "none", "nonfinite": "skip", "seed": 0})

    def recipe(self, group):
        momentum = EMA(self.beta, debias=False) if self.beta else NoMomentum()
        return Recipe(self.basis, Every(1000), momentum, NoScaling(), Drop(), Float32(), Constant())


class _FullRank(_Linear):
    """The basis spans everything: m columns for an m x n matrix, which the public classes refuse as useless."""

    def _serve(self, table, watch):
        decide = table.decide
        table.decide = lambda group: {
            p: dataclasses.replace(plan, rank=min(plan.matrix)) for p, plan in decide(group).items()
        }
        super()._serve(table, watch)


@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9), (1, 1)])
def test_a_linear_rule_at_full_rank_is_the_rule_in_full_space(shape, beta, monkeypatch):
    monkeypatch.setattr(_Linear, "beta", beta)
    shape = (2, 7) if shape == (1, 1) else shape
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    w, m = p.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    optimizer = _FullRank([p], rank=1)
    for g in gradients(shape, 10, torch.float64):
        p.grad = g
        optimizer.step()
        m = beta * m + (1 - beta) * g
        w = (1 - 0.05 * 0.1) * w - 0.05 * m
    assert optimizer.state[p]["basis"].shape == (min(shape), min(shape))
    assert (p - w).abs().max() < 1e-12


class _Identity(_FullRank):
    basis = Identity()


def test_the_identity_basis_through_the_projected_path():
    """Turned, refreshed and carried like any other basis, it changes nothing."""
    p = nn.Parameter(torch.randn(20, 12, dtype=torch.float64))
    w, m = p.detach().clone(), torch.zeros(20, 12, dtype=torch.float64)
    optimizer = _Identity([p], rank=1)
    for g in gradients((20, 12), 10, torch.float64):
        p.grad = g
        optimizer.step()
        m = 0.7 * m + 0.3 * g
        w = (1 - 0.05 * 0.1) * w - 0.05 * m
    assert (p - w).abs().max() < 1e-12
