"""Laws of LDAdam, on the paper's loop and on the engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim.parts import PowerIteration
from tests.cases import gradients
from tests.reference.common import orthonormal
from tests.reference.galore import exact
from tests.support.laws import COMMON, LINEAR, RANK, STEPS, M, N, close, moves, normal, problem, steps_of

pytestmark = pytest.mark.cpus


def test_loses_nothing_of_the_gradients(run):
    """b1 = 0: sum of P R + final error == sum of gradients. The error is shown by a last gradient that cancels it."""
    weight, grads = problem()
    options = {**COMMON, **LINEAR, "betas": (0.0, 0.99), "lr": 1.0, "rho": 0.9}
    total = sum(moves(run.ldadam, weight, grads, **options))
    error = sum(grads) - total
    assert error.norm() > 1
    steps = moves(run.ldadam, weight, [*grads, -error], **options)
    assert all(torch.linalg.matrix_rank(step, rtol=1e-6) == RANK for step in steps[:-1])
    close(steps[-1], torch.zeros_like(weight), 1e-7)


def test_momentum_loses_nothing_either(run):
    """X = P m is the EMA of g_t + e_(t-1) - e_t: the changes of basis telescope too. After a last gradient that cancels
    the error only b1 X is left."""
    weight, grads = problem()
    b1 = 0.8
    options = {**COMMON, **LINEAR, "betas": (b1, 0.99), "lr": 1.0, "rho": 0.9}
    error, last = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, (grad, step) in enumerate(zip(grads, moves(run.ldadam, weight, grads, **options), strict=True), 1):
        x = step * (1 - b1**t)
        error, last = error + grad - (x - b1 * last) / (1 - b1), x
    final = moves(run.ldadam, weight, [*grads, -error], **options)[-1]
    close(final * (1 - b1 ** (STEPS + 1)), b1 * last, 1e-6)


def test_turns_its_basis_by_one_power_iteration(run):
    """On rho P mhat + (1 - rho) a, seen from the third step: mhat is then more than the last gradient."""
    weight, grads = problem(steps=3)
    steps = moves(run.ldadam, weight, grads, **{**COMMON, **LINEAR, "lr": 1.0}, rho=0.6)
    p, e, x = exact(grads[0], RANK, "left", None)[0], torch.zeros_like(weight), torch.zeros_like(weight)
    for t, (grad, step) in enumerate(zip(grads, steps, strict=True), 1):  # x is P m before the step
        a, lost = grad + e, 0.0
        if t > 1:
            b = 0.6 * x / (1 - 0.9 ** (t - 1)) + 0.4 * a
            p = orthonormal(b @ (b.T @ p))
            lost = x - p @ (p.T @ x)
        e = a - p @ (p.T @ a) + 9 * lost
        x = p @ (p.T @ (0.9 * x + 0.1 * a))
        close(step, x / (1 - 0.9**t), 1e-8)


def test_keeps_its_basis_when_the_gradient_stays_in_it(run):
    weight, _ = problem()
    u, v = orthonormal(normal((M, RANK), 0)), orthonormal(normal((N, RANK), 1))
    grad = u @ torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)) @ v.T
    for step in moves(run.ldadam, weight, [grad] * STEPS, **COMMON, rho=0.9):
        close(step, u @ (u.T @ step))


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("moments", "seen"), [("rotate", [0, 1, 2, 3]), ("reset", [0, 1, 1, 1])])
def test_a_basis_knows_the_clock_of_the_moments(moments, seen, monkeypatch):
    """Read with the global step, a mean that was emptied a step ago would seem ten times shorter."""
    fit, times = PowerIteration.fit, []
    monkeypatch.setattr(PowerIteration, "fit", lambda *args: (times.append(args[-1]), fit(*args))[1])
    p = nn.Parameter(torch.zeros(20, 30))
    steps_of(lowrank_optim.LDAdamW([p], rank=4, moments=moments), p, gradients((20, 30), 4))
    assert [(at.step, at.seen) for at in times] == list(enumerate(seen))
