"""Adafactor without matrices of its own: one kernel moves a plain matrix, and Flora's update takes one place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim import estimate_memory
from lowrank_optim.engine import fused_factored
from lowrank_optim.memory.peak import Peak
from lowrank_optim.recipe.recipe import Update

SHAPES = [(40, 24), (24, 40), (33, 33), (1, 50), (50, 1), (7, 129), (3, 5, 7), (2, 9, 20)]
METHODS = [
    ("flora", lowrank_optim.Flora, {"betas": (0.8, 0.99)}),
    ("flora, reset", lowrank_optim.Flora, {"betas": (0.8, 0.99), "moments": "reset"}),
    ("adafactor", lowrank_optim.GaLoreAdafactor, {}),
    ("adafactor, beta1", lowrank_optim.GaLoreAdafactor, {"beta1": 0.7, "relative_step": False, "d": 0.3}),
    ("adafactor, floor", lowrank_optim.GaLoreAdafactor, {"eps": (0.7, 0.3), "d": 10.0}),
    ("adafactor, no floor", lowrank_optim.GaLoreAdafactor, {"eps": (0.0, 0.3)}),
]
COMMON = {"lr": 0.02, "weight_decay": 0.1, "scale_parameter": True}
every_method = pytest.mark.parametrize(("make", "options"), [case[1:] for case in METHODS], ids=[x[0] for x in METHODS])


def gradients(shape, dtype, steps=4):
    """Of several sizes, with lines of zeros."""
    torch.manual_seed(5)
    grads = [torch.randn(shape, dtype=dtype) * 10.0 ** (1 - step) for step in range(steps)]
    for g in grads:
        g[..., 0] *= shape[-1] == 1
        g[0] *= len(g) == 1
    return grads


def trained(make, options, grads, start, rank=None):
    """The weight and its state after one step per gradient."""
    p = nn.Parameter(start.clone())
    other = nn.Parameter(torch.ones(8, 8, dtype=start.dtype))  # without which nothing would be projected
    optimizer = make([{"params": [p], "rank": rank}, {"params": [other], "rank": 2}], **{**COMMON, **options})
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        assert torch.equal(p.grad, g)
    return p.detach(), {key: x for key, x in optimizer.state[p].items() if x.dim() and x.is_floating_point()}


def counted(monkeypatch):
    """How often the kernel was taken."""
    taken, step_ = [], fused_factored.step_
    monkeypatch.setattr(fused_factored, "step_", lambda *arguments: taken.append(step_(*arguments)))
    return taken


def start_of(shape, dtype):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_kernel_is_the_parts(make, options, dtype, shape, monkeypatch):
    start, grads, taken = start_of(shape, dtype), gradients(shape, dtype), counted(monkeypatch)
    ours, state = trained(make, options, grads, start)
    assert len(taken) == (0 if shape == (2, 9, 20) else 4), "a stack has no kernel, a kernel that is flattened has"
    monkeypatch.setattr(fused_factored, "suits", lambda *arguments: False)
    parts, parts_state = trained(make, options, grads, start)
    close = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 2e-6}
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, parts, **close)
    for key, x in state.items():
        torch.testing.assert_close(x, parts_state[key], rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)


@every_method
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (2, 30, 20)], ids=str)
def test_an_update_in_place_is_the_update(make, options, shape, monkeypatch):
    """Of projected matrices, with a refresh among the steps."""
    start, grads = start_of(shape, torch.float64), gradients(shape, torch.float64, 5)
    options = {**options, "update_proj_gap": 3, "scale": 0.4}
    ours, _ = trained(
        make, {**options, "orthonormal": True} if make is lowrank_optim.Flora else options, grads, start, 4
    )
    whole = Update.whole
    monkeypatch.setattr(Update, "whole", lambda self, recipe, st, like, over_rest=False: whole(self, recipe, st, like))
    theirs, _ = trained(
        make, {**options, "orthonormal": True} if make is lowrank_optim.Flora else options, grads, start, 4
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@every_method
def test_numbers_do_not_depend_on_threads(make, options):
    shape, found = (700, 300), []
    start, grads = start_of(shape, torch.float32), gradients(shape, torch.float32, 2)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(trained(make, options, grads, start)[0])
    finally:
        torch.set_num_threads(1)
    assert torch.equal(*found)


@every_method
def test_matrices_that_the_kernel_does_not_take_go_through_the_parts(make, options, monkeypatch):
    taken, grads = counted(monkeypatch), gradients((20, 30), torch.float32, 2)
    start = start_of((30, 20), torch.float32).mT
    turned, _ = trained(make, options, grads, start)
    plain, _ = trained(make, options, grads, start.contiguous())
    torch.testing.assert_close(turned, plain, rtol=0, atol=2e-6)
    down, _ = trained(make, options, grads, start.contiguous())
    up, _ = trained(make, {**options, "maximize": True}, [-g for g in grads], start.contiguous())
    torch.testing.assert_close(up, down, rtol=0, atol=2e-6)
    trained(make, options, [g.bfloat16() for g in grads], start.bfloat16())
    assert 2 <= len(taken) <= 6


@every_method
@pytest.mark.parametrize("kind", ["native", "plain"])
def test_a_plain_matrix_is_moved_without_another(make, options, kind, monkeypatch):
    shape = (2000, 300)
    if kind == "plain":
        for module in (lowrank_optim.ops.factored, fused_factored):
            monkeypatch.setattr(module, "kernel", lambda name: getattr(lowrank_optim.ops.reference, name))
    p = nn.Parameter(torch.randn(shape))
    optimizer = make(
        [{"params": [p], "rank": None}, {"params": [nn.Parameter(torch.ones(8, 8))], "rank": 2}], **options
    )
    p.grad = torch.randn(shape)
    optimizer.step()
    with Peak() as peak:
        optimizer.step()
    groups = [{"params": [("p", p)], "rank": None}, {"params": [("q", nn.Parameter(torch.ones(8, 8)))], "rank": 2}]
    planned = estimate_memory(groups, make, **options).step_workspace
    assert peak.most < p.nbytes / 2
    assert peak.most <= planned + 4096, "which is of accelerators as well, where the parts do it"
