"""Laws of FRUGAL, on the paper's loop and on the engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_optim
from tests.support.laws import ADAM, COMMON, RANK, M, close, moves, normal, problem, steps_of, torch_path_end

pytestmark = pytest.mark.cpus


def test_idle_rows_move_by_the_sign_alone(run):
    weight, grads = problem()
    steps = moves(run.frugal, weight, grads, {0, 4, 8}, **COMMON, ratio=0.3)
    unit = ADAM["lr"] * COMMON["scale"] * 0.3
    for grad, step, count in zip(grads, steps, [0] * 4 + [1] * 4 + [2], strict=True):
        active = normal((M,), count).argsort(descending=True)[:RANK]
        idle = [row for row in range(M) if row not in active]
        close(step[idle], unit * grad[idle].sign())
        assert not torch.allclose(step[active].abs(), torch.full_like(step[active], unit))


def test_with_all_rows_is_adam_started_again(loop):
    weight, grads = problem(steps=8)
    options = {**COMMON, "rank": M, "scale": 1.0, "ratio": 0.3}
    half = torch_path_end(torch.optim.AdamW, weight, grads[:4], **ADAM)
    close(loop.frugal(weight, grads, {0, 4}, **options), torch_path_end(torch.optim.AdamW, half, grads[4:], **ADAM))


def test_norm_takes_the_largest_rows(run):
    weight, grads = problem(steps=1)
    grads[0][[1, 4, 5]] *= 100
    (step,) = moves(run.frugal, weight, grads, **COMMON, ratio=0.0, choose="norm")
    assert step.abs().sum(1).nonzero().flatten().tolist() == [1, 4, 5]


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["svd", "rsvd"])
def test_rounding_noise_has_no_sign(basis):
    p = nn.Parameter(torch.zeros(40, 60))
    optimizer = lowrank_optim.FRUGAL([p], lr=1.0, rank=8, basis=basis, weight_decay=0.0, sign_scale=100.0)
    moved = steps_of(optimizer, p, [torch.randn(40, 4) @ torch.randn(4, 60)])
    assert (moved.abs() > 50).float().mean() < 0.05
