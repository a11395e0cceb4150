"""Laws of Subset-Norm, Subspace-Momentum and SNSM, on the paper's loop and on the engine."""

from __future__ import annotations

import pytest
import torch

from tests.reference.galore import exact
from tests.support.laws import ADAM, COMMON, MOMENTUM, RANK, STEPS, M, N, close, moves, problem, torch_path_end

pytestmark = pytest.mark.cpus


def test_subset_norm_of_single_entries_is_adam(run):
    weight, grads = problem()
    close(
        run.subset_norm(weight, grads, {0}, **{**COMMON, "scale": 1.0}, size=1),
        torch_path_end(torch.optim.AdamW, weight, grads, **ADAM),
    )


def test_subset_norm_of_whole_columns_is_the_default(run):
    weight, grads = problem()
    close(
        run.subset_norm(weight, grads, {0}, **COMMON),
        run.subset_norm(weight, grads, {0}, **COMMON, size=M),
        atol=0,
    )


@pytest.mark.parametrize(("size", "counts"), [(None, [6] * 6), (3, [3] * 6), (4, [4] * 4 + [2] * 2)])
def test_subset_norm_sum_and_mean_differ_by_the_root_of_the_count(run, size, counts):
    weight, grads = problem()
    options = {**COMMON, "eps": 0.0, "size": size}
    roots = torch.tensor(counts, dtype=torch.float64)[:, None].sqrt()
    total, mean = (moves(run.subset_norm, weight, grads, reduce=x, **options) for x in ("sum", "mean"))
    close([roots * x for x in total], mean)
    if size == 4:  # the first step, entry by entry
        g, expected = grads[0], torch.empty_like(weight)
        for i in range(M):
            for j in range(N):
                run = g[:4, j] if i < 4 else g[4:, j]
                expected[i, j] = g[i, j] / run.pow(2).sum().sqrt()
        close(total[0], ADAM["lr"] * COMMON["scale"] * expected)


def test_subspace_momentum_with_full_rank_is_momentum(loop):
    weight, grads = problem()
    steps = moves(loop.subspace_momentum, weight, grads, **{**MOMENTUM, "rank": M})
    momentum = torch.zeros_like(weight)
    for t, (grad, step) in enumerate(zip(grads, steps, strict=True), 1):
        momentum = 0.9 * momentum + 0.1 * grad
        close(step, 0.01 * 0.5 * momentum / (1 - 0.9**t))


def test_subspace_momentum_reset_every_step_is_sgd(run):
    weight, grads = problem()
    for grad, step in zip(grads, moves(run.subspace_momentum, weight, grads, range(STEPS), **MOMENTUM), strict=True):
        close(step, 0.01 * 0.5 * grad)


def test_subspace_momentum_passes_the_complement_on_unchanged(run):
    weight, grads = problem()
    p = exact(grads[0], RANK, "left", None)[0]
    for grad, step in zip(grads, moves(run.subspace_momentum, weight, grads, **MOMENTUM), strict=True):
        close(step - p @ (p.T @ step), 0.01 * 0.5 * (grad - p @ (p.T @ grad)))


def test_subspace_momentum_rotate_is_what_the_new_basis_sees_of_the_old_momentum(run):
    weight, grads = problem(steps=2)
    _, step = moves(run.subspace_momentum, weight, grads, {0, 1}, **MOMENTUM, moments="rotate")
    p, q = (exact(g, RANK, "left", None)[0] for g in grads)
    expected = (0.9 * q @ q.T @ (0.1 * p @ p.T @ grads[0]) + 0.1 * q @ q.T @ grads[1]) / (1 - 0.9**2)
    close(step, 0.01 * 0.5 * (expected + grads[1] - q @ q.T @ grads[1]))


@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_snsm_with_full_rank_is_subset_norm(loop, moments):
    """With a square basis a rotation changes nothing; a reset does, so it gets one refresh only."""
    weight, grads = problem()
    refresh_at = {0, 4, 8} if moments == "rotate" else {0}
    options = {**COMMON, "rank": M, "size": 2, "reduce": "mean"}
    close(
        loop.snsm(weight, grads, refresh_at, **options, moments=moments),
        loop.subset_norm(weight, grads, {0}, **options),
    )


def test_snsm_second_moment_survives_a_reset(run):
    weight, grads = problem(steps=5)
    step = moves(run.snsm, weight, grads, {0, 4, 8}, **COMMON)[-1]
    v = sum(0.01 * 0.99 ** (4 - i) * g.pow(2).sum(0) for i, g in enumerate(grads)) / (1 - 0.99**5)
    close(step, ADAM["lr"] * COMMON["scale"] * grads[-1] / (v.sqrt() + ADAM["eps"]))
