"""Laws of Flora, on the paper's loop and on the engine."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lowrank_optim
from tests.reference.common import orthonormal
from tests.support.laws import ADAM, COMMON, RANK, M, close, moves, normal, problem, steps_of, torch_path_end

pytestmark = pytest.mark.cpus


def test_adamw_with_a_square_orthonormal_sketch_is_adamw(run):
    weight, grads = problem()
    options = {**COMMON, "rank": M, "scale": 1.0, "base": "adamw", "orthonormal": True}
    close(
        run.flora(weight, grads, {0, 3, 6}, **options),
        torch_path_end(torch.optim.AdamW, weight, grads, **ADAM),
    )


def test_adafactor_without_momentum_is_adafactor(run):
    weight, grads = problem()
    options = {**COMMON, "scale": 1.0, "betas": (0.0, 0.0)}
    adafactor = torch_path_end(
        torch.optim.Adafactor, weight, grads, lr=ADAM["lr"], eps=(1e-30, 1e-3), weight_decay=ADAM["weight_decay"]
    )
    close(run.flora(weight, grads, {0, 3, 6}, **options), adafactor)


def test_forgets_nothing_but_what_a_wide_sketch_loses(loop):
    """E[P P^T] = I: the wider the sketch, the closer the step to that of the uncompressed momentum."""
    weight, grads = problem()
    whole = loop.flora(weight, grads, {0}, **{**COMMON, "rank": M}, orthonormal=True)
    gaps = [(loop.flora(weight, grads, {0}, **{**COMMON, "rank": rank}) - whole).norm() for rank in (4, 400, 40_000)]
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]
    assert gaps[2] < 1e-3


@pytest.mark.parametrize("orthonormal_basis", [False, True])
def test_transfer_equals_explicit_matrices(run, orthonormal_basis):
    if run.kind == "engine" and not orthonormal_basis:
        pytest.skip("the engine refuses sketches that change so often: the momentum would grow without bound")
    weight, grads = problem(steps=3)
    options = {**COMMON, "base": "adamw", "orthonormal": orthonormal_basis}
    step = moves(run.flora, weight, grads, {0, 1, 2}, **options)[-1]
    p = [normal((M, RANK), count) for count in range(3)]
    p = [orthonormal(x) if orthonormal_basis else x / RANK**0.5 for x in p]
    past = 0.9 * 0.1 * p[1] @ p[1].T @ p[0] @ p[0].T @ grads[0] + 0.1 * p[1] @ p[1].T @ grads[1]
    numerator = (0.9 * p[2] @ p[2].T @ past + 0.1 * grads[2]) / (1 - 0.9**3)
    v = sum(0.01 * 0.99 ** (2 - i) * g**2 for i, g in enumerate(grads)) / (1 - 0.99**3)
    close(step, ADAM["lr"] * COMMON["scale"] * numerator / (v.sqrt() + ADAM["eps"]))


def test_clips_the_applied_update_and_scales_by_the_weight(run):
    weight, grads = problem(steps=1)
    options = {**COMMON, "betas": (0.0, 0.0), "clip": 0.25}
    (step,) = moves(run.flora, weight, grads, **options)
    assert step.pow(2).mean().sqrt().item() == pytest.approx(0.01 * 0.5 * 0.25 * weight.pow(2).mean().sqrt().item())
    (step,) = moves(run.flora, 0 * weight, grads, **options, floor=1e-3)
    assert step.pow(2).mean().sqrt().item() == pytest.approx(0.01 * 0.5 * 0.25 * 1e-3)
    (step,) = moves(run.flora, weight, grads, **options, scale_parameter=False)
    assert step.pow(2).mean().sqrt().item() == pytest.approx(0.01 * 0.5 * 0.25)


def test_adafactor_keeps_momentum_of_the_normalised_update(loop):
    """Two steps written out, with the sketch changed in between."""
    weight, grads = problem(steps=2)
    options = {**COMMON, "clip": float("inf"), "scale_parameter": False}
    first, second = moves(loop.flora, weight, grads, {0, 1}, **options)
    u, unit = moves(loop.flora, weight, grads, {0, 1}, **{**options, "betas": (0.0, 0.0)}), ADAM["lr"] * COMMON["scale"]
    p, q = (normal((M, RANK), count) / RANK**0.5 for count in range(2))
    close(first, 0.1 * u[0])
    close(second, 0.9 * q @ q.T @ p @ (0.1 * p.T @ u[0]) + 0.1 * u[1])
    g = grads[0] ** 2
    close(u[0], unit * grads[0] / (g.mean(1, keepdim=True) * g.mean(0, keepdim=True) / g.mean()).sqrt())


# -- the engine --------------------------------------------------------------------------------------------------------


def test_floras_momentum_must_fade():
    shape = (256, 512)
    with pytest.raises(ValueError, match=r"momentum would grow without bound.*update_proj_gap >= \d+") as caught:
        lowrank_optim.Flora([nn.Parameter(torch.zeros(shape))], rank=4, update_proj_gap=5)
    least = int(str(caught.value).split("update_proj_gap >= ")[1].split()[0])
    sizes = []
    for options in ({"update_proj_gap": least}, {"update_proj_gap": 1, "orthonormal": True}):
        p = nn.Parameter(0.1 * torch.randn(64, 80))
        optimizer = lowrank_optim.Flora([p], rank=2, **options)
        for _ in range(150):
            p.grad = torch.randn(64, 80)
            optimizer.step()
        sizes.append(float(optimizer.state[p]["exp_avg"].norm()))
    assert all(math.isfinite(size) and size < 1e3 for size in sizes)
    with pytest.raises(ValueError, match="without bound"):
        lowrank_optim.Flora([nn.Parameter(torch.zeros(shape))], rank=4, update_proj_gap=least - 1)


def test_emptied_momentum_of_flora_has_its_own_clock():
    p = nn.Parameter(torch.randn(40, 60))
    options = dict(rank=38, orthonormal=True, moments="reset", update_proj_gap=20, stagger=False, scale_parameter=False)
    optimizer = lowrank_optim.Flora([p], lr=1e-2, **options)
    sizes, g = [], torch.randn(40, 60)
    for _ in range(45):
        before = p.detach().clone()
        steps_of(optimizer, p, [g])
        sizes.append(float((p - before).norm()))
    assert min(sizes) > 0.7 * max(sizes)
