"""Laws of all methods, on the papers' loops and on the engine, and of what the loops share.

The engine is compared with the loops as well, but a law finds an error that both have in common. Each test file of a
method has the laws of its paper.
"""

from __future__ import annotations

import pytest
import torch

from tests.reference.common import orthonormal
from tests.reference.galore import rotate
from tests.support.laws import COMMON, MOMENTUM, RANK, M, N, close, moves, normal, problem

pytestmark = pytest.mark.cpus

OPTIONS = {
    "galore": COMMON,
    "fira": COMMON,
    "apollo": COMMON,
    "apollo-mini": dict(COMMON, granularity="tensor", scale_front=True),
    "ldadam": dict(COMMON, rho=0.9),
    "frugal": dict(COMMON, ratio=0.3),
    "golore": dict(COMMON, random_after=4),
    "subset_norm": dict(COMMON, size=4),
    "subspace_momentum": MOMENTUM,
    "snsm": COMMON,
    "dct": dict(COMMON, error_feedback=True),
    "flora": dict(COMMON, orthonormal=True),
    "flora-adamw": dict(COMMON, base="adamw", orthonormal=True),
    "galore_plus": dict(COMMON, heads=1, density=0.2, residual_scale=0.7),
    "q_galore": dict(COMMON, gap=3, threshold=0.1),
}
every_method = pytest.mark.parametrize("name", list(OPTIONS))


def method(run, name):
    return getattr(run, name.partition("-")[0]), OPTIONS[name]


@every_method
def test_right_is_left_of_the_transpose(run, name):
    train, options = method(run, name)
    weight, grads = problem()
    left = train(weight, grads, {0, 4, 8}, **options)
    right = train(weight.T, [g.T for g in grads], {0, 4, 8}, **{**options, "side": "right"})
    close(right.T, left)


@every_method
def test_inputs_stay_as_they_were(run, name):
    train, options = method(run, name)
    weight, grads = problem()
    before = weight.clone(), [g.clone() for g in grads]
    train(weight, grads, {0, 4, 8}, **options)
    close(weight, before[0], atol=0)
    close(grads, before[1], atol=0)


@every_method
def test_decay_is_decoupled_and_only_lr_scales_it(run, name):
    """At the first step, whose size does not depend on the weight unless the method says so."""
    train, options = method(run, name)
    weight, grads = problem(steps=1)
    (step,) = moves(train, weight, grads, **options)
    decayed = train(weight, grads, {0}, **{**options, "weight_decay": 0.3})
    close(decayed, (1 - options["lr"] * 0.3) * weight - step)


def test_rotation_keeps_the_mean_and_the_variance_of_independent_coordinates():
    """The formula against explicit moments of independent coordinates turned by C."""
    c = orthonormal(normal((RANK, RANK), 5))
    mean, variance = torch.randn(RANK, N, dtype=torch.float64), torch.rand(RANK, N, dtype=torch.float64)
    eye = torch.eye(RANK, dtype=torch.float64)
    m, v = rotate(mean, variance + mean**2, (eye, None), (c.T, None), 1.0, 1.0)
    close(m, c @ mean)
    for j in range(N):
        covariance = c @ torch.diag(variance[:, j]) @ c.T
        close(v[:, j], covariance.diagonal() + m[:, j] ** 2)


def test_orthonormal_is_the_q_of_a_positive_diagonal():
    x = normal((M, RANK), 0)
    q = orthonormal(x)
    close(q.T @ q, torch.eye(RANK, dtype=torch.float64))
    r = q.T @ x
    close(r, r.triu())
    assert (r.diagonal() > 0).all()
