"""Laws of APOLLO, on the paper's loop and on the engine."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import lowrank_optim
from lowrank_optim import ops
from lowrank_optim.parts import Random
from lowrank_optim.recipe.algebra import WHOLE
from tests.cases import Net
from tests.support.laws import ADAM, COMMON, RANK, M, close, moves, normal, problem

pytestmark = pytest.mark.cpus


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_moves_along_the_raw_gradient(run, granularity):
    weight, grads = problem()
    options = {**COMMON, "granularity": granularity}
    for grad, step in zip(grads, moves(run.apollo, weight, grads, {0, 4, 8}, **options), strict=True):
        ratio = step / grad
        if granularity == "channel":
            close(ratio, ratio[:1].expand_as(ratio))
            assert ratio[0].std() > 1e-6
        else:
            close(ratio, ratio[0, 0].expand_as(ratio))


@pytest.mark.parametrize("gamma", [1.01, None])
@pytest.mark.parametrize("scale_front", [False, True])
def test_steps_grow_with_the_root_of_scale(run, scale_front, gamma):
    """Before or after the limiter: it compares sizes with each other, so a constant factor passes through it."""
    weight, grads = problem()
    options = {**COMMON, "scale_front": scale_front, "gamma": gamma}
    one = moves(run.apollo, weight, grads, {0, 4, 8}, **{**options, "scale": 1.0})
    nine = moves(run.apollo, weight, grads, {0, 4, 8}, **{**options, "scale": 9.0})
    close(nine, [3 * x for x in one])


def test_scale_front_lifts_small_steps_over_the_floor(loop):
    """What the order changes: sizes that the floor would forget are remembered, and the next step limited."""
    weight, grads = problem(steps=2)
    grads = [grads[0], 50 * grads[1]]
    sketch = torch.randn(M, RANK, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {**COMMON, "scale": 1e8, "floor": 1e3, "normal": lambda shape, count: sketch}
    front, after = (moves(loop.apollo, weight, grads, scale_front=x, **options) for x in (True, False))
    close(front[0], after[0], 1e-9)
    assert front[1].norm() <= 1.0101 * front[0].norm() < after[1].norm()


def test_limiter_recovers_right_after_a_zero_gradient(run):
    """Published code holds it at 1 % of growth for each step from zero, for two thousand steps."""
    weight, grads = problem()
    grads[4] = torch.zeros_like(grads[4])
    sizes = [float(step.norm()) for step in moves(run.apollo, weight, grads, **COMMON)]
    assert sizes[4] < 1e-9
    assert sizes[5] > 0.5 * sizes[3]
    assert all(after <= 1.01 * before * (1 + 1e-9) for before, after in pairwise(sizes[5:]))


def test_factors_come_from_the_sketch_of_the_last_refresh(run):
    weight, grads = problem(steps=4)
    options = {**COMMON, "betas": (0.0, 0.0), "gamma": None}  # N is a matrix of signs
    steps = moves(run.apollo, weight, grads, {0, 2}, **options)
    for grad, step, count in zip(grads, steps, [0, 0, 1, 1], strict=True):
        r = (normal((M, RANK), count) / RANK**0.5).T @ grad
        close(step, ADAM["lr"] * COMMON["scale"] ** 0.5 * grad * RANK**0.5 / r.norm(dim=0), 1e-7)


# -- the engine --------------------------------------------------------------------------------------------------------


def test_apollo_mini_has_rank_one_by_default():
    optimizer = lowrank_optim.APOLLOMini(Net().named_parameters())
    assert {row.rank for row in optimizer.report() if row.rank is not None} == {1}
    assert optimizer.param_groups[0]["scale"] == 128


def test_gaussian_subspaces_are_unbiased():
    total, m, rank = torch.zeros(8, 8), 8, 4
    for seed in range(4000):
        p = Random().derive(
            WHOLE, torch.zeros(m, 5), {}, rank, lambda shape, purpose="", seed=seed: ops.normal(shape, seed, (0, 0))
        )
        total += p["basis"] @ p["basis"].mT
    assert (total / 4000 - torch.eye(8)).abs().max() < 0.06
