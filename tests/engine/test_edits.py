"""Changes of groups, of names and of combinations: which take effect, and which are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank_optim
from tests.support.laws import steps_of

EDITS = [
    (lowrank_optim.GaLoreAdamW, {"state_dtype": "int8"}),
    (lowrank_optim.GaLoreAdamW, {"seed": 5}),
    (lowrank_optim.APOLLO, {"limit": None}),
    (lowrank_optim.APOLLO, {"store_projection": True}),
    (lowrank_optim.FRUGAL, {"basis": "topk"}),
    (lowrank_optim.DCTAdamW, {"moments": "keep"}),
    (lowrank_optim.DCTAdamW, {"dictionary": "dct3"}),
    (lowrank_optim.LDAdamW, {"error_feedback": "int8"}),
    (lowrank_optim.GaLoreAdafactor, {"beta1": 0.9}),
    (lowrank_optim.QGaLoreAdamW, {"update_proj_gap": 2}),
    (lowrank_optim.GaLorePlusAdamW, {"density": 0.5}),
    (lowrank_optim.Composed, {"residual": "fira"}),
    (lowrank_optim.GaLoreAdamW, {"wieght_decay": 0.5}),
    (lowrank_optim.GaLoreAdamW, {"weight_decay": -0.5}),
    (lowrank_optim.Flora, {"update_proj_gap": 2}),
]


@pytest.mark.parametrize(("make", "edit"), EDITS, ids=lambda x: x.__name__ if isinstance(x, type) else str(x))
def test_edits_of_a_group_are_refused_before_anything_moves(make, edit):
    p, q = nn.Parameter(torch.randn(70, 80)), nn.Parameter(torch.randn(70, 80))
    optimizer = make([{"params": [p]}, {"params": [q]}], rank=4)
    p.grad, q.grad = torch.randn(70, 80), torch.randn(70, 80)
    optimizer.step()
    before = p.detach().clone(), q.detach().clone()
    optimizer.param_groups[1].update(edit)
    with pytest.raises(ValueError, match=next(iter(edit)).replace("update_proj_gap", "gap|update_proj_gap")):
        optimizer.step()
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


def test_edits_that_take_effect_are_fine():
    p = nn.Parameter(torch.zeros(20, 30))
    optimizer = lowrank_optim.GaLoreAdamW([p], lr=1.0, rank=4, weight_decay=0.0)
    optimizer.param_groups[0].update(scale=0.5, betas=(0.5, 0.9), eps=1e-6, update_proj_gap=3)
    moved = steps_of(optimizer, p, [torch.randn(20, 30)])
    assert float((moved / 0.5).norm()) == pytest.approx((4 * 30) ** 0.5, rel=1e-2)


@pytest.mark.parametrize("make", [lowrank_optim.APOLLO, lowrank_optim.Flora])
def test_subspaces_that_follow_from_names_are_not_resumed_under_others(make):
    nets = [nn.Sequential(nn.Linear(20, 30, bias=False)) for _ in range(2)]
    saved = make(nets[0].parameters(), rank=4)
    steps_of(saved, nets[0][0].weight, [torch.randn(30, 20)])
    other = make(nets[1].named_parameters(), rank=4)
    with pytest.raises(ValueError, match="draws its subspaces by the names of the parameters"):
        other.load_state_dict(saved.state_dict())
    wrapped = make([(f"module.{name}", p) for name, p in nets[1].named_parameters()], rank=4)
    other = make(nets[0].named_parameters(), rank=4)
    wrapped.load_state_dict(other.state_dict())
    keeps = make(nets[1].named_parameters(), rank=4, store_projection=True)
    keeps.load_state_dict(make(nets[0].parameters(), rank=4, store_projection=True).state_dict())


@pytest.mark.parametrize("make", [lowrank_optim.SubsetNormAdamW, lowrank_optim.GaLoreAdamW, lowrank_optim.DCTAdamW])
def test_empty_matrices_are_left_alone(make):
    empty, p = nn.Parameter(torch.zeros(0, 5)), nn.Parameter(torch.randn(12, 12))
    optimizer = make([empty, p])
    assert optimizer.report()[0].reason == "empty"
    empty.grad, p.grad = torch.zeros(0, 5), torch.randn(12, 12)
    optimizer.step()


def test_options_that_contradict_each_other_are_refused():
    p = nn.Parameter(torch.randn(12, 12))
    with pytest.raises(ValueError, match="moments must be one of 'keep', 'reset', got 'rotate'"):
        lowrank_optim.APOLLO([p], moments="rotate")
    with pytest.raises(ValueError, match="overflow"):
        lowrank_optim.compose([p], rank=2, basis="gaussian", moments="rotate")
    with pytest.raises(ValueError, match="its own age"):
        lowrank_optim.compose([p], rank=2, basis="dct2", moments="rotate", scaling="factored")
    with pytest.raises(ValueError, match="fft=True needs"):
        lowrank_optim.DCTAdamW([p], rank=2, fft=True, dictionary="hadamard")
    with pytest.raises(ValueError, match="SubsetNormAdamW found nothing to serve"):
        lowrank_optim.SubsetNormAdamW([nn.Parameter(torch.randn(5))])
    with pytest.raises(ValueError, match="proj_type must be one of 'std'"):
        lowrank_optim.SubsetNormAdamW([{"params": [p], "proj_type": "full"}])
    with pytest.raises(TypeError, match="load_state_dict"):
        copy.deepcopy(lowrank_optim.CompressedAccumulation([p]))
