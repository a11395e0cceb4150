"""Laws of the parts: orthonormality, cadence, rotation, and where a reset starts its clock."""

from __future__ import annotations

import pytest
import torch

from lowrank_optim import ops
from lowrank_optim.ops.blocks import Columns
from lowrank_optim.parts import EMA, RMS, SVD, Every, Factored, Identity, Rows, SubspaceIteration, TwoSided
from lowrank_optim.recipe.algebra import WHOLE
from lowrank_optim.recipe.turn import Turn

BASES = [SVD(), SubspaceIteration(), TwoSided(SVD()), TwoSided(SubspaceIteration())]


def draw(shape, some=None):
    return ops.normal(shape, 7, (0, 0), some=some)


@pytest.mark.parametrize("basis", BASES, ids=repr)
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16), (5, 9)])
def test_a_basis_is_orthonormal_and_round_trips(basis, shape):
    g, rank = torch.randn(shape), 4
    st = basis.fit(WHOLE, g, None, rank, draw, 0.0)
    st = basis.fit(WHOLE, g + 0.3 * torch.randn(shape), st, rank, draw, 1.0)
    assert {key: tuple(tensor.shape) for key, tensor in st.items()} == {
        key: spec.shape for key, spec in basis.spec(shape, rank).items()
    }
    for tensor in st.values():
        assert (tensor.mT @ tensor - torch.eye(rank)).abs().max() < 1e-5
    r = basis.down(WHOLE, g, st)
    assert r.shape == basis.coordinates(shape, rank)
    w = torch.zeros(shape)
    basis.add_up_(w, r, st, alpha=1.0, beta=0.0)
    again = basis.down(WHOLE, w, st)
    assert torch.allclose(again, r, atol=1e-4), "down(up(R)) = R"
    assert w.norm() <= g.norm()


@pytest.mark.parametrize("basis", [*BASES, Identity()], ids=repr)
def test_add_up_scales_both_terms_and_reads_g_only(basis):
    g, w = torch.randn(8, 11), torch.randn(8, 11)
    st = basis.fit(WHOLE, g, None, 3, draw, 0.0)
    d, up, before = basis.down(WHOLE, g, st), torch.zeros(8, 11), g.clone()
    basis.add_up_(up, d, st, alpha=1.0, beta=0.0)
    want = 0.9 * w - 0.25 * up
    basis.add_up_(w, d, st, alpha=-0.25, beta=0.9)
    assert torch.allclose(w, want, atol=1e-6)
    assert torch.equal(g, before)


@pytest.mark.parametrize("basis", [*BASES, Identity(), Rows("norm")], ids=repr)
@pytest.mark.parametrize("batch", [False, True])
def test_add_up_into_selected_columns(basis, batch):
    """Of memory that holds anything, where its content is not asked for."""
    g = torch.randn(8, 40)
    st = basis.fit(WHOLE, g, None, 3, draw, 0.0)
    if batch:
        g, st = torch.stack([g, torch.randn(8, 40)]), {key: torch.stack([x, x]) for key, x in st.items()}
    d, some = basis.down(WHOLE, g, st), Columns(5, 31, 40)
    whole = torch.full_like(g, float("nan"))
    basis.add_up_(whole, d, st, alpha=-0.25, beta=0.0)
    w = torch.full((*g.shape[:-1], 26), float("nan"))
    basis.add_up_(w, d, st, alpha=-0.25, beta=0.0, columns=some)
    torch.testing.assert_close(w, some.of(whole), rtol=1e-5, atol=1e-6)
    assert whole.isfinite().all()
    assert whole.any()
    basis.add_up_(w, d, st, alpha=0.5, beta=2.0, columns=some)
    torch.testing.assert_close(w, torch.zeros_like(w), rtol=0, atol=1e-5)


@pytest.mark.parametrize("gap", [1, 2, 7, 200])
def test_every_is_due_at_multiples(gap):
    schedule, last, due = Every(gap), -1, []
    for step in range(3 * gap + 1):
        if schedule.due(step, last, 12345, {}):
            due.append(step)
            last = step
    assert due == [0, gap, 2 * gap, 3 * gap]


@pytest.mark.parametrize("schedule", [Every(10), Every(10, stagger=True)], ids=repr)
def test_a_refresh_that_could_not_happen_stays_due(schedule):
    assert schedule.due(0, -1, 3, {})
    assert schedule.due(5, -1, 3, {})
    first = next(step for step in range(1, 30) if schedule.due(step, 0, 3, {}))
    assert all(schedule.due(step, 0, 3, {}) for step in range(first, first + 15))
    assert not schedule.due(first + 1, first, 3, {})


@pytest.mark.parametrize("count", [4, 56, 168])
def test_staggered_spreads_the_work(count):
    """No step may pay for more than a few matrices, each is refitted once a gap, and none keeps a basis too long."""
    gap = 50
    schedule, last = Every(gap, stagger=True), [0] * count
    per_step = []
    for step in range(1, 6 * gap):
        due = [i for i in range(count) if schedule.due(step, last[i], i, {})]
        assert all(step - last[i] <= gap for i in due)
        for i in due:
            last[i] = step
        per_step.append(len(due))
    assert sum(per_step[gap:]) == pytest.approx(count * (len(per_step) - gap) / gap, abs=count)
    assert max(per_step) <= -(-count // gap) + 1


@pytest.mark.parametrize("right", [False, True])
def test_turning_within_a_span_changes_nothing(right):
    """If the new basis spans the old one, P_new m' = P_old m, and a full turn carries all of the variance."""
    old = torch.linalg.qr(torch.randn(20, 5))[0]
    spin = torch.linalg.qr(torch.randn(5, 5))[0]
    turn = Turn((old @ spin).mT @ old, (old @ spin).mT @ old if right else None)
    m = torch.randn(5, 5)
    back = old @ spin @ turn(m) @ ((old @ spin).mT if right else torch.eye(5))
    assert torch.allclose(back, old @ m @ (old.mT if right else torch.eye(5)), atol=1e-5)
    assert torch.allclose(turn.variances(torch.ones(5, 5)), torch.ones(5, 5), atol=1e-5)


def test_second_moments_turn_by_variance_around_the_mean():
    """Against the true second moments of rotated samples: a plain (C*C) v would forget the mean."""
    mean, samples = 3 * torch.randn(4, 1), torch.randn(4, 20_000) * torch.tensor([[0.1], [1.0], [2.0], [0.5]])
    x, spin = mean + samples, torch.linalg.qr(torch.randn(4, 4))[0]
    rms, turn = RMS(0.99, 1e-8), Turn(spin)
    st = {"exp_avg_sq": x.square().mean(1, keepdim=True) * (1 - 0.99**50)}
    rms.turn_(WHOLE, st, turn, mean, 50.0)
    truth = (spin @ x).square().mean(1, keepdim=True) * (1 - 0.99**50)
    naive = turn.variances(x.square().mean(1, keepdim=True)) * (1 - 0.99**50)
    error = (st["exp_avg_sq"] - truth).abs().max()
    assert error < 0.05 * truth.max()
    assert (naive - truth).abs().max() > 5 * error


def test_turned_second_moments_stay_positive():
    rms = RMS(0.9, 1e-8)
    st = {"exp_avg_sq": torch.rand(6, 7) * 1e-3}
    rms.turn_(WHOLE, st, Turn(torch.linalg.qr(torch.randn(6, 6))[0]), torch.randn(6, 7), 3.0)
    assert (st["exp_avg_sq"] >= 0).all()


def test_factored_moments_turn_like_their_product():
    factored, spin = Factored(-0.8, 1e-12, 1.0), torch.linalg.qr(torch.randn(6, 6))[0]
    st = {"row_var": torch.rand(6, 1), "col_var": torch.rand(1, 9)}
    st["col_var"] *= st["row_var"].mean() / st["col_var"].mean()
    v = st["row_var"] @ st["col_var"] / st["row_var"].mean()
    factored.turn_(WHOLE, st, Turn(spin), None, 5.0)
    turned = spin.square() @ v
    assert torch.allclose(st["row_var"], turned.mean(1, keepdim=True), atol=1e-6)
    assert torch.allclose(st["col_var"], turned.mean(0, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("t", [4.0, torch.tensor([[[4.0]], [[1.0]]])], ids=["one clock", "one per matrix"])
def test_a_restarted_average_has_its_own_clock(t):
    """At its own first step an Adam direction has size 1, whatever the step number: not (1 - b1) / sqrt(1 - b2)."""
    ema, rms, x = EMA(0.9), RMS(0.999, 1e-12), torch.randn(2, 3, 5)
    st = {"exp_avg": torch.zeros(2, 3, 5), "exp_avg_sq": torch.zeros(2, 3, 5)}
    for _ in range(3):
        st["exp_avg"][0] = 0.9 * st["exp_avg"][0] + 0.1 * x[0]
        st["exp_avg_sq"][0] = 0.999 * st["exp_avg_sq"][0] + 0.001 * x[0] ** 2
    numerator, gain = ema(st, x, t)
    size = (rms(WHOLE, st, numerator, x.clone(), t) * gain).abs()
    assert torch.allclose(size[0], torch.ones(3, 5), atol=1e-4)
    assert torch.allclose(size[1], torch.ones(3, 5), atol=1e-4) == isinstance(t, torch.Tensor)
