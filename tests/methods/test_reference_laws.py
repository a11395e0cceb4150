"""The loops themselves, held against what the papers promise: identities that a wrong loop could not fulfil.

The engine is compared with these loops, so they are tested without it. Inner quantities (errors, residuals, momenta)
are read off the weight's movement; a huge eps with an equally huge scale takes Adam's normalisation out of the way.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch

from tests.reference.apollo import apollo_adamw
from tests.reference.common import orthonormal
from tests.reference.dct import dct_adamw, matrix, moved
from tests.reference.fira import fira_adamw
from tests.reference.flora import flora
from tests.reference.frugal import frugal
from tests.reference.galore import exact, galore_adamw, rotate
from tests.reference.galore_plus import galore_plus_adamw
from tests.reference.golore import golore_adamw
from tests.reference.ldadam import ldadamw
from tests.reference.q_galore import q_galore_adamw
from tests.reference.subset_norm import snsm_adamw, subset_norm_adamw, subspace_momentum

pytestmark = pytest.mark.cpus

M, N, RANK, STEPS = 6, 8, 3, 9
ADAM = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
COMMON = dict(rank=RANK, side="left", scale=0.5, **ADAM)
LINEAR = dict(eps=1e10, scale=1e10)  # the step is then lr * mhat, to ten digits
PLUS = dict(heads=4, density=0.2, residual_scale=0.7)
MOMENTUM = dict(rank=RANK, side="left", lr=0.01, beta=0.9, weight_decay=0.1, scale=0.5)


def normal(shape, count, purpose="sketch"):
    seed = 1000 * ("sketch", "head").index(purpose) + count
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOOPS = {
    "galore": (galore_adamw, dict(COMMON, fit=exact)),
    "fira": (fira_adamw, COMMON),
    "apollo": (apollo_adamw, dict(COMMON, normal=normal)),
    "apollo-mini": (apollo_adamw, dict(COMMON, normal=normal, granularity="tensor", scale_front=True)),
    "ldadam": (ldadamw, dict(COMMON, rho=0.9)),
    "frugal": (frugal, dict(COMMON, normal=normal, ratio=0.3)),
    "golore": (golore_adamw, dict(COMMON, normal=normal, random_after=4)),
    "subset_norm": (subset_norm_adamw, dict(COMMON, size=4)),
    "subspace_momentum": (subspace_momentum, MOMENTUM),
    "snsm": (snsm_adamw, COMMON),
    "dct": (dct_adamw, dict(COMMON, error_feedback=True)),
    "flora": (flora, dict(COMMON, normal=normal)),
    "flora-adamw": (flora, dict(COMMON, normal=normal, base="adamw")),
    "galore_plus": (galore_plus_adamw, dict(COMMON, normal=normal, **PLUS)),
    "q_galore": (q_galore_adamw, dict(COMMON, gap=2, threshold=0.1)),
}
every_loop = pytest.mark.parametrize("name", list(LOOPS))


def problem(m=M, n=N, steps=STEPS):
    weight = torch.randn(m, n, dtype=torch.float64)
    return weight, list(torch.randn(steps, m, n, dtype=torch.float64))


def path(loop, weight, grads, refresh_at=(0,), **options):
    """The weight before the first step and after every step."""
    return [loop(weight, grads[:count], set(refresh_at), **options) for count in range(len(grads) + 1)]


def moves(loop, weight, grads, refresh_at=(0,), **options):
    """What every step subtracts; without decay."""
    options["weight_decay"] = 0.0
    return [before - after for before, after in pairwise(path(loop, weight, grads, refresh_at, **options))]


def torch_path_end(optimizer_class, weight, grads, **options):
    p = torch.nn.Parameter(weight.clone())
    optimizer = optimizer_class([p], **options)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach()


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# ---- all loops ----


@every_loop
def test_right_is_left_of_the_transpose(name):
    loop, options = LOOPS[name]
    weight, grads = problem()
    left = loop(weight, grads, {0, 3, 5}, **options)
    right = loop(weight.T, [g.T for g in grads], {0, 3, 5}, **{**options, "side": "right"})
    close(right.T, left)


@every_loop
def test_inputs_stay_as_they_were(name):
    loop, options = LOOPS[name]
    weight, grads = problem()
    before = weight.clone(), [g.clone() for g in grads]
    loop(weight, grads, {0, 3}, **options)
    close(weight, before[0], atol=0)
    close(grads, before[1], atol=0)


@every_loop
def test_decay_is_decoupled_and_only_lr_scales_it(name):
    """At the first step, whose size does not depend on the weight unless the method says so."""
    loop, options = LOOPS[name]
    weight, grads = problem(steps=1)
    (step,) = moves(loop, weight, grads, **options)
    decayed = loop(weight, grads, {0}, **{**options, "weight_decay": 0.3})
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


# ---- Fira ----


def fira_residuals(weight, grads, **options):
    """The S of every step in mode "paper", as the part of the movement outside the (single) basis."""
    p = exact(grads[0], RANK, "left", None)[0]
    unit = COMMON["lr"] * COMMON["scale"]
    return [(x - p @ (p.T @ x)) / unit for x in moves(fira_adamw, weight, grads, **{**COMMON, **options})]


def test_fira_with_full_rank_is_galore():
    weight, grads = problem()
    options = {**COMMON, "rank": M}
    close(
        fira_adamw(weight, grads, {0, 4}, **options), galore_adamw(weight, grads, {0, 4}, fit=exact, **options), 1e-11
    )


def test_fira_code_mode_leaks_even_with_full_rank():
    weight, grads = problem(steps=1)
    options = {**COMMON, "rank": M}
    (code,) = moves(fira_adamw, weight, grads, mode="code", **options)
    (galore,) = moves(galore_adamw, weight, grads, fit=exact, **options)
    p = exact(grads[0], M, "left", None)[0]
    r = p.T @ grads[0]
    factor = (r / (r.abs() + ADAM["eps"])).norm(dim=0) / (r.norm(dim=0) + 1e-8)
    close(code - galore, ADAM["lr"] * (1 - COMMON["scale"]) * grads[0] * factor)


@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_fira_modes_agree_at_scale_one(moments):
    weight, grads = problem()
    options = {**COMMON, "scale": 1.0, "moments": moments}
    close(
        fira_adamw(weight, grads, {0, 4}, mode="paper", **options),
        fira_adamw(weight, grads, {0, 4}, mode="code", **options),
    )


def test_fira_residual_has_adams_column_sizes():
    weight, grads = problem(steps=1)
    (residual,) = fira_residuals(weight, grads)
    p = exact(grads[0], RANK, "left", None)[0]
    r = p.T @ grads[0]
    n = r / (r.abs() + ADAM["eps"])
    s = grads[0] - p @ r
    close(residual, s * (n.norm(dim=0) / (r.norm(dim=0) + 1e-8)), 1e-10)


def test_fira_limiter_bounds_growth_and_is_off_without_gamma():
    weight, grads = problem()
    grads = [g * 3.0**k for k, g in enumerate(grads)]
    sizes = [s.norm() for s in fira_residuals(weight, grads, gamma=1.01)]
    assert all(after <= 1.01 * before * (1 + 1e-9) for before, after in pairwise(sizes))
    close(sizes[1], 1.01 * sizes[0])
    free = [s.norm() for s in fira_residuals(weight, grads, gamma=None)]
    assert any(after > 1.02 * before for before, after in pairwise(free))


def test_fira_limiter_recovers_right_after_a_zero_gradient():
    weight, grads = problem()
    grads[4] = torch.zeros_like(grads[4])
    sizes = [float(s.norm()) for s in fira_residuals(weight, grads)]
    stuck = [float(s.norm()) for s in fira_residuals(weight, grads, floor=0.0)]
    assert sizes[4] < 1e-9
    assert sizes[5] > 0.5 * sizes[3]
    assert stuck[5] < 1e-9


# ---- APOLLO ----


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_apollo_moves_along_the_raw_gradient(granularity):
    weight, grads = problem()
    options = {**COMMON, "normal": normal, "granularity": granularity}
    for grad, step in zip(grads, moves(apollo_adamw, weight, grads, {0, 4}, **options), strict=True):
        ratio = step / grad
        if granularity == "channel":
            close(ratio, ratio[:1].expand_as(ratio))
            assert ratio[0].std() > 1e-6
        else:
            close(ratio, ratio[0, 0].expand_as(ratio))


@pytest.mark.parametrize("gamma", [1.01, None])
@pytest.mark.parametrize("scale_front", [False, True])
def test_apollo_steps_grow_with_the_root_of_scale(scale_front, gamma):
    """Before or after the limiter: it compares sizes with each other, so a constant factor passes through it."""
    weight, grads = problem()
    options = {**COMMON, "normal": normal, "scale_front": scale_front, "gamma": gamma, "floor": 0.0}
    one = moves(apollo_adamw, weight, grads, {0, 4}, **{**options, "scale": 1.0})
    nine = moves(apollo_adamw, weight, grads, {0, 4}, **{**options, "scale": 9.0})
    close(nine, [3 * x for x in one])


def test_apollo_scale_front_lifts_small_steps_over_the_floor():
    """What the order changes: sizes that the floor would forget are remembered, and the next step limited."""
    weight, grads = problem(steps=2)
    grads = [grads[0], 50 * grads[1]]
    options = {**COMMON, "normal": normal, "scale": 1e8, "floor": 1e3}
    front, after = (moves(apollo_adamw, weight, grads, scale_front=x, **options) for x in (True, False))
    close(front[0], after[0], 1e-9)
    assert front[1].norm() <= 1.0101 * front[0].norm() < after[1].norm()


def test_apollo_factors_come_from_the_sketch_of_the_last_refresh():
    weight, grads = problem(steps=4)
    options = {**COMMON, "betas": (0.0, 0.0), "gamma": None, "normal": normal}  # N is a matrix of signs
    steps = moves(apollo_adamw, weight, grads, {0, 2}, **options)
    for grad, step, count in zip(grads, steps, [0, 0, 1, 1], strict=True):
        r = (normal((M, RANK), count) / RANK**0.5).T @ grad
        close(step, ADAM["lr"] * COMMON["scale"] ** 0.5 * grad * RANK**0.5 / r.norm(dim=0), 1e-7)


# ---- LDAdam ----


def test_ldadam_loses_nothing_of_the_gradients():
    """b1 = 0: sum of P R + final error == sum of gradients. The error is shown by a last gradient that cancels it."""
    weight, grads = problem()
    options = {**COMMON, **LINEAR, "betas": (0.0, 0.99), "lr": 1.0, "rho": 0.9}
    total = sum(moves(ldadamw, weight, grads, **options))
    error = sum(grads) - total
    assert error.norm() > 1
    steps = moves(ldadamw, weight, [*grads, -error], **options)
    assert all(torch.linalg.matrix_rank(step, rtol=1e-6) == RANK for step in steps[:-1])
    close(steps[-1], torch.zeros_like(weight), 1e-7)


def test_ldadam_momentum_loses_nothing_either():
    """X = P m is the EMA of g_t + e_(t-1) - e_t: the changes of basis telescope too. After a last gradient that cancels
    the error only b1 X is left."""
    weight, grads = problem()
    b1 = 0.8
    options = {**COMMON, **LINEAR, "betas": (b1, 0.99), "lr": 1.0, "rho": 0.9}
    error, last = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, (grad, step) in enumerate(zip(grads, moves(ldadamw, weight, grads, **options), strict=True), 1):
        x = step * (1 - b1**t)
        error, last = error + grad - (x - b1 * last) / (1 - b1), x
    final = moves(ldadamw, weight, [*grads, -error], **options)[-1]
    close(final * (1 - b1 ** (STEPS + 1)), b1 * last, 1e-6)


def test_ldadam_turns_its_basis_by_one_power_iteration():
    """On rho P mhat + (1 - rho) a, seen from the third step: mhat is then more than the last gradient."""
    weight, grads = problem(steps=3)
    steps = moves(ldadamw, weight, grads, **{**COMMON, **LINEAR, "lr": 1.0}, rho=0.6)
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


def test_ldadam_keeps_its_basis_when_the_gradient_stays_in_it():
    weight, _ = problem()
    u, v = orthonormal(normal((M, RANK), 0)), orthonormal(normal((N, RANK), 1))
    grad = u @ torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)) @ v.T
    for step in moves(ldadamw, weight, [grad] * STEPS, **COMMON, rho=0.9):
        close(step, u @ (u.T @ step))


# ---- FRUGAL ----


def test_frugal_idle_rows_move_by_the_sign_alone():
    weight, grads = problem()
    steps = moves(frugal, weight, grads, {0, 4}, **COMMON, normal=normal, ratio=0.3)
    unit = ADAM["lr"] * COMMON["scale"] * 0.3
    for grad, step, count in zip(grads, steps, [0] * 4 + [1] * 5, strict=True):
        active = normal((M,), count).argsort(descending=True)[:RANK]
        idle = [row for row in range(M) if row not in active]
        close(step[idle], unit * grad[idle].sign())
        assert not torch.allclose(step[active].abs(), torch.full_like(step[active], unit))


def test_frugal_with_all_rows_is_adam_started_again():
    weight, grads = problem()
    options = {**COMMON, "rank": M, "scale": 1.0, "normal": normal, "ratio": 0.3}
    half = torch_path_end(torch.optim.AdamW, weight, grads[:4], **ADAM)
    close(frugal(weight, grads, {0, 4}, **options), torch_path_end(torch.optim.AdamW, half, grads[4:], **ADAM))


def test_frugal_norm_takes_the_largest_rows():
    weight, grads = problem(steps=1)
    grads[0][[1, 4, 5]] *= 100
    (step,) = moves(frugal, weight, grads, **COMMON, normal=normal, ratio=0.0, choose="norm")
    assert step.abs().sum(1).nonzero().flatten().tolist() == [1, 4, 5]


# ---- GoLore ----


def test_golore_before_the_switch_is_galore():
    weight, grads = problem()
    close(
        golore_adamw(weight, grads, {0, 3, 6}, **COMMON, normal=normal, random_after=STEPS),
        galore_adamw(weight, grads, {0, 3, 6}, **COMMON, fit=exact, moments="rotate"),
    )


def test_golore_after_the_switch_moves_in_the_random_subspace():
    weight, grads = problem()
    steps = moves(golore_adamw, weight, grads, {0, 3, 6}, **COMMON, normal=normal, random_after=3)
    for first, count in ((3, 1), (6, 2)):
        p = orthonormal(normal((M, RANK), count))
        close(p.T @ p, torch.eye(RANK, dtype=torch.float64))
        close(p @ (p.T @ steps[first]), steps[first])


# ---- Subset-Norm and Subspace-Momentum ----


def test_subset_norm_of_single_entries_is_adam():
    weight, grads = problem()
    close(
        subset_norm_adamw(weight, grads, {0}, **{**COMMON, "scale": 1.0}, size=1),
        torch_path_end(torch.optim.AdamW, weight, grads, **ADAM),
    )


def test_subset_norm_of_whole_columns_is_the_default():
    weight, grads = problem()
    close(
        subset_norm_adamw(weight, grads, {0}, **COMMON),
        subset_norm_adamw(weight, grads, {0}, **COMMON, size=M),
        atol=0,
    )


@pytest.mark.parametrize(("size", "counts"), [(None, [6] * 6), (3, [3] * 6), (4, [4] * 4 + [2] * 2)])
def test_subset_norm_sum_and_mean_differ_by_the_root_of_the_count(size, counts):
    weight, grads = problem()
    options = {**COMMON, "eps": 0.0, "size": size}
    roots = torch.tensor(counts, dtype=torch.float64)[:, None].sqrt()
    total, mean = (moves(subset_norm_adamw, weight, grads, reduce=x, **options) for x in ("sum", "mean"))
    close([roots * x for x in total], mean)
    if size == 4:  # the first step, entry by entry
        g, expected = grads[0], torch.empty_like(weight)
        for i in range(M):
            for j in range(N):
                run = g[:4, j] if i < 4 else g[4:, j]
                expected[i, j] = g[i, j] / run.pow(2).sum().sqrt()
        close(total[0], ADAM["lr"] * COMMON["scale"] * expected)


def test_subspace_momentum_with_full_rank_is_momentum():
    weight, grads = problem()
    steps = moves(subspace_momentum, weight, grads, **{**MOMENTUM, "rank": M})
    momentum = torch.zeros_like(weight)
    for t, (grad, step) in enumerate(zip(grads, steps, strict=True), 1):
        momentum = 0.9 * momentum + 0.1 * grad
        close(step, 0.01 * 0.5 * momentum / (1 - 0.9**t))


def test_subspace_momentum_reset_every_step_is_sgd():
    weight, grads = problem()
    for grad, step in zip(grads, moves(subspace_momentum, weight, grads, range(STEPS), **MOMENTUM), strict=True):
        close(step, 0.01 * 0.5 * grad)


def test_subspace_momentum_passes_the_complement_on_unchanged():
    weight, grads = problem()
    p = exact(grads[0], RANK, "left", None)[0]
    for grad, step in zip(grads, moves(subspace_momentum, weight, grads, **MOMENTUM), strict=True):
        close(step - p @ (p.T @ step), 0.01 * 0.5 * (grad - p @ (p.T @ grad)))


def test_subspace_momentum_rotate_is_what_the_new_basis_sees_of_the_old_momentum():
    weight, grads = problem(steps=2)
    _, step = moves(subspace_momentum, weight, grads, {0, 1}, **MOMENTUM, moments="rotate")
    p, q = (exact(g, RANK, "left", None)[0] for g in grads)
    expected = (0.9 * q @ q.T @ (0.1 * p @ p.T @ grads[0]) + 0.1 * q @ q.T @ grads[1]) / (1 - 0.9**2)
    close(step, 0.01 * 0.5 * (expected + grads[1] - q @ q.T @ grads[1]))


@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_snsm_with_full_rank_is_subset_norm(moments):
    """With a square basis a rotation changes nothing; a reset does, so it gets one refresh only."""
    weight, grads = problem()
    refresh_at = {0, 4} if moments == "rotate" else {0}
    options = {**COMMON, "rank": M, "size": 2, "reduce": "mean"}
    close(
        snsm_adamw(weight, grads, refresh_at, **options, moments=moments),
        subset_norm_adamw(weight, grads, {0}, **options),
    )


def test_snsm_second_moment_survives_a_reset():
    weight, grads = problem(steps=5)
    step = moves(snsm_adamw, weight, grads, {0, 4}, **COMMON)[-1]
    v = sum(0.01 * 0.99 ** (4 - i) * g.pow(2).sum(0) for i, g in enumerate(grads)) / (1 - 0.99**5)
    close(step, ADAM["lr"] * COMMON["scale"] * grads[-1] / (v.sqrt() + ADAM["eps"]))


# ---- DCT ----


@pytest.mark.parametrize("m", [1, 2, 5, 6, 33])
@pytest.mark.parametrize("dictionary", ["dct2", "dct3", "identity"])
def test_dictionaries_are_orthonormal(dictionary, m):
    d = matrix(dictionary, m)
    close(d.T @ d, torch.eye(m, dtype=torch.float64))
    if dictionary == "dct2":
        close(d[:, 0], torch.full((m,), m**-0.5, dtype=torch.float64))


def test_dct3_holds_the_dct2_atoms_in_rows_and_has_no_constant_atom():
    d = matrix("dct3", M)
    close(d, matrix("dct2", M).T, atol=0)
    assert (d.std(0) > 0.1).all()


@pytest.mark.parametrize("dictionary", ["dct2", "dct3"])
def test_dct_l2_picks_the_atoms_that_drop_least(dictionary):
    weight, grads = problem(steps=1)
    d = matrix(dictionary, M)
    bases = [d[:, list(atoms)] for atoms in combinations(range(M), RANK)]
    best = min(bases, key=lambda p: (grads[0] - p @ (p.T @ grads[0])).norm())
    (step,) = moves(dct_adamw, weight, grads, **COMMON, dictionary=dictionary)
    r = best.T @ grads[0]
    close(step, ADAM["lr"] * COMMON["scale"] * best @ (r / (r.abs() + ADAM["eps"])))


def test_dct_l1_and_l2_disagree_where_they_should():
    """Row 0 has one large entry, row 1 many of middling size."""
    weight = torch.zeros(2, 8, dtype=torch.float64)
    grad = torch.zeros_like(weight)
    grad[0, 0], grad[1] = 3.0, 1.0
    for norm, row in (("l2", 0), ("l1", 1)):
        (step,) = moves(dct_adamw, weight, [grad], **{**COMMON, "rank": 1}, dictionary="identity", norm=norm)
        assert step.abs().sum(1).nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("moments", ["keep", "rotate"])
def test_dct_with_every_row_is_adam(moments):
    weight, grads = problem()
    options = {**COMMON, "rank": M, "scale": 1.0}
    close(
        dct_adamw(weight, grads, set(range(STEPS)), **options, dictionary="identity", moments=moments),
        torch_path_end(torch.optim.AdamW, weight, grads, **ADAM),
    )


def test_dct_error_feedback_loses_nothing():
    weight, grads = problem()
    options = {**COMMON, **LINEAR, "betas": (0.0, 0.99), "lr": 1.0, "error_feedback": True}
    error = sum(grads) - sum(moves(dct_adamw, weight, grads, {0, 2, 5}, **options))
    assert error.norm() > 1
    close(moves(dct_adamw, weight, [*grads, -error], {0, 2, 5}, **options)[-1], torch.zeros_like(weight), 1e-7)


def test_dct_rotation_is_the_permutation_that_rotation_matrices_give():
    d, old, new = matrix("dct2", M), [0, 2, 3], [1, 2, 3]
    m, v = torch.randn(RANK, N, dtype=torch.float64), torch.rand(RANK, N, dtype=torch.float64) + 9
    expected = rotate(m, v, (d[:, old], None), (d[:, new], None), 0.5, 0.7)
    close((moved(m, old, new), moved(v, old, new)), expected)


def test_dct_an_atom_that_enters_moves_like_adams_first_step():
    """Rows 0 and 1 first, then 1 and 2: row 2 moves by lr, and row 1 as if nothing had happened."""
    weight = torch.zeros(3, 8, dtype=torch.float64)
    size = torch.tensor([[3.0], [2.0], [1.0]], dtype=torch.float64)
    sign = torch.randn(2, 3, 8, dtype=torch.float64).sign()
    grads = [size * sign[0], size.roll(-2, 0) * sign[1]]
    options = {**COMMON, "rank": 2, "dictionary": "identity", "scale": 1.0}
    first, second = moves(dct_adamw, weight, grads, {0, 1}, **options)
    assert first[2].abs().max() == second[0].abs().max() == 0
    close(second[2], ADAM["lr"] * sign[1][2], 1e-9)
    adam = torch_path_end(torch.optim.AdamW, weight, grads, **{**ADAM, "weight_decay": 0.0})
    close(-first[1] - second[1], adam[1])


# ---- Flora ----


def test_flora_adamw_with_a_square_orthonormal_sketch_is_adamw():
    weight, grads = problem()
    options = {**COMMON, "rank": M, "scale": 1.0, "normal": normal, "base": "adamw", "orthonormal": True}
    close(
        flora(weight, grads, {0, 3, 6}, **options),
        torch_path_end(torch.optim.AdamW, weight, grads, **ADAM),
    )


def test_flora_adafactor_without_momentum_is_adafactor():
    weight, grads = problem()
    options = {**COMMON, "scale": 1.0, "normal": normal, "betas": (0.0, 0.0)}
    adafactor = torch_path_end(
        torch.optim.Adafactor, weight, grads, lr=ADAM["lr"], eps=(1e-30, 1e-3), weight_decay=ADAM["weight_decay"]
    )
    close(flora(weight, grads, {0, 3, 6}, **options), adafactor)


def test_flora_forgets_nothing_but_what_a_wide_sketch_loses():
    """E[P P^T] = I: the wider the sketch, the closer the step to that of the uncompressed momentum."""
    weight, grads = problem()
    options = {**COMMON, "normal": normal}
    whole = flora(weight, grads, {0}, **{**options, "rank": M}, orthonormal=True)
    gaps = [(flora(weight, grads, {0}, **{**options, "rank": rank}) - whole).norm() for rank in (4, 400, 40_000)]
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]
    assert gaps[2] < 1e-3


@pytest.mark.parametrize("orthonormal_basis", [False, True])
def test_flora_transfer_equals_explicit_matrices(orthonormal_basis):
    weight, grads = problem(steps=3)
    options = {**COMMON, "normal": normal, "base": "adamw", "orthonormal": orthonormal_basis}
    step = moves(flora, weight, grads, {0, 1, 2}, **options)[-1]
    p = [normal((M, RANK), count) for count in range(3)]
    p = [orthonormal(x) if orthonormal_basis else x / RANK**0.5 for x in p]
    past = 0.9 * 0.1 * p[1] @ p[1].T @ p[0] @ p[0].T @ grads[0] + 0.1 * p[1] @ p[1].T @ grads[1]
    numerator = (0.9 * p[2] @ p[2].T @ past + 0.1 * grads[2]) / (1 - 0.9**3)
    v = sum(0.01 * 0.99 ** (2 - i) * g**2 for i, g in enumerate(grads)) / (1 - 0.99**3)
    close(step, ADAM["lr"] * COMMON["scale"] * numerator / (v.sqrt() + ADAM["eps"]))


def test_flora_clips_the_applied_update_and_scales_by_the_weight():
    weight, grads = problem(steps=1)
    options = {**COMMON, "normal": normal, "betas": (0.0, 0.0), "clip": 0.25}
    (step,) = moves(flora, weight, grads, **options)
    assert step.pow(2).mean().sqrt().item() == pytest.approx(0.01 * 0.5 * 0.25 * weight.pow(2).mean().sqrt().item())
    (step,) = moves(flora, 0 * weight, grads, **options, floor=1e-3)
    assert step.pow(2).mean().sqrt().item() == pytest.approx(0.01 * 0.5 * 0.25 * 1e-3)
    (step,) = moves(flora, weight, grads, **options, scale_parameter=False)
    assert step.pow(2).mean().sqrt().item() == pytest.approx(0.01 * 0.5 * 0.25)


def test_flora_adafactor_keeps_momentum_of_the_normalised_update():
    """Two steps written out, with the sketch changed in between."""
    weight, grads = problem(steps=2)
    options = {**COMMON, "normal": normal, "clip": float("inf"), "scale_parameter": False}
    first, second = moves(flora, weight, grads, {0, 1}, **options)
    u, unit = moves(flora, weight, grads, {0, 1}, **{**options, "betas": (0.0, 0.0)}), ADAM["lr"] * COMMON["scale"]
    p, q = (normal((M, RANK), count) / RANK**0.5 for count in range(2))
    close(first, 0.1 * u[0])
    close(second, 0.9 * q @ q.T @ p @ (0.1 * p.T @ u[0]) + 0.1 * u[1])
    g = grads[0] ** 2
    close(u[0], unit * grads[0] / (g.mean(1, keepdim=True) * g.mean(0, keepdim=True) / g.mean()).sqrt())


# ---- GaLore+ ----


def test_galore_plus_with_one_head_and_nothing_else_is_galore():
    weight, grads = problem()
    options = dict(heads=1, density=0.0, residual_scale=1.0, normal=normal)
    close(
        galore_plus_adamw(weight, grads, {0, 3, 6}, **COMMON, **options),
        galore_adamw(weight, grads, {0, 3, 6}, **COMMON, fit=exact),
    )


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_galore_plus_with_every_entry_is_adamw(heads):
    weight, grads = problem()
    options = dict(heads=heads, density=1.0, residual_scale=1.0, normal=normal)
    close(
        galore_plus_adamw(weight, grads, {0, 3, 6}, **{**COMMON, "scale": 1.0}, **options),
        torch_path_end(torch.optim.AdamW, weight, grads, **ADAM),
    )


def test_galore_plus_on_the_sparse_set_is_adamw_and_elsewhere_galore():
    """One head, so the low-rank part is GaLore's; the set is that of the largest first residuals and stays."""
    weight, grads = problem()
    options = dict(heads=1, density=0.25, residual_scale=1.0, normal=normal)
    free = {**COMMON, "weight_decay": 0.0, "scale": 1.0}
    actual = galore_plus_adamw(weight, grads, {0, 3, 6}, **free, **options)
    adam = torch_path_end(torch.optim.AdamW, weight, grads, **{**ADAM, "weight_decay": 0.0})
    galore = galore_adamw(weight, grads, {0, 3, 6}, **free, fit=exact)
    p = exact(grads[0], RANK, "left", None)[0]
    lost = (grads[0] - p @ (p.T @ grads[0])).abs()
    sparse = lost >= lost.flatten().sort(descending=True).values[M * N // 4 - 1]
    assert sparse.sum() == M * N // 4
    close(actual, torch.where(sparse, adam, galore))


def test_galore_plus_takes_as_many_heads_as_the_rank_needs():
    weight, grads = problem(steps=1)
    seen = []

    def fit_block(block, rank):
        seen.append(block)
        return exact(block, rank, "left", None)[0]

    options = dict(density=0.0, residual_scale=1.0, normal=normal, fit_block=fit_block)
    galore_plus_adamw(weight, grads, {0}, **COMMON, heads=4, **options)  # heads of width 2, rank 3
    first = sorted(normal((4,), 0, "head").argsort()[:2].tolist())
    close(seen[0], torch.cat([grads[0][:, 2 * head : 2 * head + 2] for head in first], 1), atol=0)


def test_galore_plus_is_linear_in_its_residual_scale():
    weight, grads = problem()
    options = dict(COMMON, heads=2, density=0.25, normal=normal)
    none, half, whole = (galore_plus_adamw(weight, grads, {0, 3}, **options, residual_scale=x) for x in (0.0, 0.5, 1.0))
    assert (whole - none).norm() > 1e-3
    close(half, (none + whole) / 2)


# ---- Q-GaLore ----


def test_q_galore_doubles_its_gap_first_at_the_sixth_refresh():
    """A constant gradient has a constant basis. Refreshes at 0, 3, ..., 15; then the gap is 6, then 12, then 24."""
    weight, grads = problem(steps=1)
    refreshed = []
    options = {**COMMON, "gap": 3, "threshold": 0.4, "refreshed": refreshed}
    q_galore_adamw(weight, grads * 50, None, **options)
    assert refreshed == [0, 3, 6, 9, 12, 15, 18, 24, 48]


def test_q_galore_overlap_of_equal_bases_is_one():
    weight, grads = problem(steps=1)
    for threshold, last in ((0.99, 24), (1.01, 27)):
        refreshed = []
        q_galore_adamw(weight, grads * 30, None, **COMMON, gap=3, threshold=threshold, refreshed=refreshed)
        assert refreshed[-1] == last


def test_q_galore_keeps_its_gap_while_the_basis_turns():
    weight, _ = problem()
    grads = list(torch.randn(30, 40, 8, dtype=torch.float64))
    refreshed = []
    weight = torch.zeros(40, 8, dtype=torch.float64)
    q_galore_adamw(weight, grads, None, **COMMON, gap=3, threshold=0.9, refreshed=refreshed)
    assert refreshed == list(range(0, 30, 3))


def test_q_galore_without_quantization_is_galore_at_its_refreshes():
    weight, grads = problem(steps=20)
    refreshed = []
    actual = q_galore_adamw(weight, grads, None, **COMMON, gap=1, threshold=0.1, refreshed=refreshed)
    assert len(refreshed) < 20
    close(actual, galore_adamw(weight, grads, set(refreshed), **COMMON, fit=exact))


def test_q_galore_uses_the_quantized_basis_for_everything():
    weight, grads = problem(steps=1)
    (step,) = moves(q_galore_adamw, weight, grads, **COMMON, gap=1, threshold=0.4, quantize=lambda p: (8 * p).round())
    p = (8 * exact(grads[0], RANK, "left", None)[0]).round()
    r = p.T @ grads[0]
    close(step, ADAM["lr"] * COMMON["scale"] * p @ (r / (r.abs() + ADAM["eps"])))
