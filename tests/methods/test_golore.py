"""Laws of GoLore, on the paper's loop and on the engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_optim
from tests.reference.common import orthonormal
from tests.support.laws import COMMON, RANK, STEPS, M, close, moves, normal, problem

pytestmark = pytest.mark.cpus


def test_before_the_switch_is_galore(run):
    weight, grads = problem()
    close(
        run.golore(weight, grads, {0, 3, 6}, **COMMON, random_after=STEPS),
        run.galore(weight, grads, {0, 3, 6}, **COMMON, moments="rotate"),
    )


def test_after_the_switch_moves_in_the_random_subspace(run):
    weight, grads = problem()
    steps = moves(run.golore, weight, grads, {0, 3, 6}, **COMMON, random_after=3)
    for first, count in ((3, 1), (6, 2)):
        p = orthonormal(normal((M, RANK), count))
        close(p.T @ p, torch.eye(RANK, dtype=torch.float64))
        close(p @ (p.T @ steps[first]), steps[first])


def test_the_switch_must_be_given():
    with pytest.raises(TypeError, match="random_after"):
        lowrank_optim.GoLoreAdamW([nn.Parameter(torch.zeros(20, 30))])
