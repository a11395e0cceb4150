"""Laws of Fira, on the paper's loop and on the engine."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.reference.galore import exact
from tests.support.laws import ADAM, COMMON, RANK, M, close, moves, problem

pytestmark = pytest.mark.cpus


def fira_residuals(run, weight, grads, **options):
    """The S of every step in mode "paper", as the part of the movement outside the (single) basis."""
    p = exact(grads[0], RANK, "left", None)[0]
    unit = COMMON["lr"] * COMMON["scale"]
    return [(x - p @ (p.T @ x)) / unit for x in moves(run.fira, weight, grads, **{**COMMON, **options})]


def test_with_full_rank_is_galore(run):
    weight, grads = problem()
    options = {**COMMON, "rank": M}
    close(run.fira(weight, grads, {0, 4, 8}, **options), run.galore(weight, grads, {0, 4, 8}, **options), 1e-11)


def test_code_mode_leaks_even_with_full_rank(loop):
    weight, grads = problem(steps=1)
    options = {**COMMON, "rank": M}
    (code,) = moves(loop.fira, weight, grads, mode="code", **options)
    (galore,) = moves(loop.galore, weight, grads, **options)
    p = exact(grads[0], M, "left", None)[0]
    r = p.T @ grads[0]
    factor = (r / (r.abs() + ADAM["eps"])).norm(dim=0) / (r.norm(dim=0) + 1e-8)
    close(code - galore, ADAM["lr"] * (1 - COMMON["scale"]) * grads[0] * factor)


@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_modes_agree_at_scale_one(run, moments):
    weight, grads = problem()
    options = {**COMMON, "scale": 1.0, "moments": moments}
    close(
        run.fira(weight, grads, {0, 4, 8}, mode="paper", **options),
        run.fira(weight, grads, {0, 4, 8}, mode="code", **options),
    )


def test_residual_has_adams_column_sizes(run):
    weight, grads = problem(steps=1)
    (residual,) = fira_residuals(run, weight, grads)
    p = exact(grads[0], RANK, "left", None)[0]
    r = p.T @ grads[0]
    n = r / (r.abs() + ADAM["eps"])
    s = grads[0] - p @ r
    close(residual, s * (n.norm(dim=0) / (r.norm(dim=0) + 1e-8)), 1e-10)


def test_limiter_bounds_growth_and_is_off_without_gamma(run):
    weight, grads = problem()
    grads = [g * 3.0**k for k, g in enumerate(grads)]
    sizes = [s.norm() for s in fira_residuals(run, weight, grads, gamma=1.01)]
    assert all(after <= 1.01 * before * (1 + 1e-9) for before, after in pairwise(sizes))
    close(sizes[1], 1.01 * sizes[0])
    free = [s.norm() for s in fira_residuals(run, weight, grads, gamma=None)]
    assert any(after > 1.02 * before for before, after in pairwise(free))


def test_limiter_recovers_right_after_a_zero_gradient(run):
    weight, grads = problem()
    grads[4] = torch.zeros_like(grads[4])
    sizes = [float(s.norm()) for s in fira_residuals(run, weight, grads)]
    assert sizes[4] < 1e-9
    assert sizes[5] > 0.5 * sizes[3]
    assert all(after <= 1.01 * before * (1 + 1e-9) for before, after in pairwise(sizes[5:]))


def test_limiter_without_a_floor_stays_at_zero(loop):
    weight, grads = problem()
    grads[4] = torch.zeros_like(grads[4])
    assert fira_residuals(loop, weight, grads, floor=0.0)[5].norm() < 1e-9
