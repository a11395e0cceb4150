"""The randomized basis: what it captures, of whatever gradient, and stacks as single matrices."""

from __future__ import annotations

import pytest
import torch

from lowrank_optim import GaLoreAdamW, ops
from lowrank_optim.engine import refresh as fitting
from lowrank_optim.ops import linalg, products
from lowrank_optim.parts import SVD, SubspaceIteration
from lowrank_optim.recipe.algebra import WHOLE

RANK = 12


def draw(shape, purpose="sketch", some=None):
    return ops.normal(shape, 7, ops.stream_of(purpose, 3), some=some)


def with_values(m, n, values):
    k = min(m, n)
    left, right = torch.linalg.qr(torch.randn(m, k))[0], torch.linalg.qr(torch.randn(n, k))[0]
    return (left * values[:k]) @ right.mT


BASIS = SubspaceIteration()


def fitted(g, old=None, rank=RANK, drawn=draw, basis=BASIS):
    return basis.fit(WHOLE, g, old, rank, drawn, 0.0)["basis"]


def energy(basis, g):
    return float((basis.mT.double() @ g.double()).square().sum() / g.double().square().sum())


def assert_orthonormal(basis, tolerance=5e-6):
    assert (basis.mT @ basis - torch.eye(basis.shape[-1], dtype=basis.dtype)).abs().max() < tolerance


K = torch.arange(1, 201.0)
SPECTRA = {
    "1/sqrt(k)": K**-0.5,
    "1/k": 1 / K,
    "1/k^2": K**-2,
    "exp": torch.exp(-K / 3),
    "clustered": torch.cat([torch.full((RANK,), 3.0), torch.full((200 - RANK,), 0.1)]),
    "two clusters": torch.cat([torch.full((5,), 100.0), torch.ones(RANK - 5), torch.full((200 - RANK,), 1e-3)]),
    "rank 1": torch.cat([torch.ones(1), torch.zeros(199)]),
    "rank 5": torch.cat([torch.ones(5), torch.zeros(195)]),
    "1e-30": 1e-30 * K**-0.5,
    "1e30": 1e30 * K**-0.5,
    "1e-37": 1e-37 * K**-0.5,
}
every_spectrum = pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA.keys())
every_shape = pytest.mark.parametrize("shape", [(60, 140), (140, 60), (80, 80)], ids=["wide", "tall", "square"])


@every_shape
@every_spectrum
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_gradient_has_its_leading_subspace(shape, values, dtype):
    g = with_values(*shape, values).to(dtype)
    for old in (None, {"basis": torch.linalg.qr(torch.randn(shape[0], RANK, dtype=dtype))[0]}):
        basis = fitted(
            g, old, drawn=lambda *args, **some: draw(*args, **some).to(dtype), basis=SubspaceIteration(warm_rounds=2)
        )
        best = energy(SVD().fit(WHOLE, g, None, RANK, draw, 0.0)["basis"], g)
        assert basis.dtype == dtype
        assert basis.shape == (shape[0], RANK)
        assert_orthonormal(basis)
        assert 0.97 * best < energy(basis, g) <= best + 1e-5
        assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()
        captured = (basis.mT.double() @ g.double()).norm(dim=1)
        noise = 1e-5 * captured.max()
        assert (captured[:-1] >= 0.9 * captured[1:] - noise).all(), "ordered by what they capture"


@every_spectrum
def test_a_warm_basis_is_as_good_as_svd_lowrank(values):
    g = with_values(60, 140, values)
    older = 0.7 * g + 0.3 * torch.randn(60, 140) * (g.double().norm() / (60 * 140) ** 0.5).float()
    basis = fitted(g, {"basis": fitted(older)})
    published = torch.svd_lowrank(g.double(), RANK, niter=2)[0].float()
    assert energy(basis, g) >= 0.99 * energy(published, g)


@pytest.mark.parametrize(("shape", "power"), [((256, 256), 0.5), ((256, 688), 0.5), ((688, 256), 1.0)])
def test_energy_of_warm_refreshes_on_larger_matrices(shape, power):
    k = min(shape)
    g = with_values(*shape, torch.arange(1, k + 1.0) ** -power)
    noise = torch.randn(shape)
    older = 0.7 * g + 0.3 * noise * g.norm() / noise.norm()
    basis = fitted(g, {"basis": fitted(older, rank=k // 4)}, rank=k // 4)
    assert energy(basis, g) >= 0.99 * energy(torch.svd_lowrank(g, k // 4, niter=2)[0], g)


@pytest.mark.parametrize("rank", [1, 8, 9])
def test_ranks_at_both_ends(rank):
    g = torch.randn(9, 14)
    basis = fitted(g, rank=rank)
    assert_orthonormal(basis)
    assert_orthonormal(fitted(g, {"basis": basis}, rank=rank))
    exact = SVD().fit(WHOLE, g, None, rank, draw, 0.0)["basis"]
    assert energy(basis, g) > 0.98 * energy(exact, g)


def test_few_rows_with_a_gradient():
    """Exactly zero elsewhere, as in embeddings: products have no rounding errors that would complete the basis."""
    g = torch.zeros(50, 70)
    g[[3, 17, 40]] = torch.randn(3, 70)
    basis = fitted(g)
    assert_orthonormal(basis)
    assert energy(basis, g) > 1 - 1e-5
    assert_orthonormal(fitted(g, {"basis": fitted(torch.randn(50, 70))}))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), 3e38])
def test_a_gradient_without_a_subspace_keeps_the_old_basis(bad):
    old = fitted(torch.randn(20, 30), rank=6)
    g = torch.zeros(20, 30) if bad == 0 else torch.full((20, 30), bad)
    assert torch.equal(fitted(g, {"basis": old}, rank=6), old)
    assert_orthonormal(fitted(g, rank=6))


def test_the_same_bits_every_time():
    g = torch.randn(130, 170)
    assert torch.equal(fitted(g), fitted(g.clone()))
    old = {"basis": fitted(g)}
    assert torch.equal(fitted(g + 1, old), fitted(g + 1, old))


@every_shape
def test_a_stack_is_its_matrices(shape):
    kinds = [SPECTRA[name] for name in ("1/sqrt(k)", "1/k", "rank 1", "1e30")]
    g = torch.stack([with_values(*shape, values) for values in kinds] + [torch.zeros(shape)])
    first = [fitted(x) for x in g]

    def stacked(sides, purpose="sketch", some=None):
        return torch.stack([draw(sides, purpose, some)] * len(g))

    both = fitted(g, drawn=stacked)
    for one, x, together in zip(first, g, both, strict=True):
        assert abs(energy(one, x) - energy(together, x)) < 1e-5 if x.any() else torch.equal(one, together)
    assert torch.allclose(both[0], first[0], atol=1e-3)
    warm = fitted(g, {"basis": both}, drawn=stacked)
    assert torch.allclose(warm[0], fitted(g[0], {"basis": both[0]}), atol=1e-3)
    assert torch.equal(warm[-1], both[-1])


@pytest.mark.parametrize("y", [torch.zeros(9, 4), torch.ones(9, 4), torch.eye(9)[:, :4] * 1e-38, torch.zeros(6, 6)])
def test_orthonormalize_never_fails(y):
    q = ops.orthonormalize(y)
    assert_orthonormal(q, 1e-5)
    assert (y - q @ (q.mT @ y)).norm() <= 1e-5 * y.norm()


def test_whitened_columns_span_the_same():
    y = torch.randn(300, 20) @ torch.diag(10.0 ** -torch.linspace(0, 2, 20)) @ torch.randn(20, 20)
    z = ops.whiten_(y.clone())
    assert_orthonormal(z, 1e-2)
    rest = y - z @ torch.linalg.lstsq(z, y).solution
    assert rest.norm() < 1e-5 * y.norm()
    assert ops.whiten_(torch.zeros(8, 3)).abs().max() == 0
    turned = y.mT.contiguous().mT
    assert ops.whiten_(turned).data_ptr() == turned.data_ptr()
    assert torch.allclose(turned, z, atol=1e-3), "memory layout"


def test_random_sketches_draw_rows_in_blocks(monkeypatch):
    g, drawn = torch.randn(2, 60, 300), []

    def rows(some):
        drawn.append(some.stop - some.start)
        return draw((300, 20), some=some)

    whole = g @ draw((300, 20))
    assert torch.allclose(WHOLE.random_sketch(g[0], 20, rows), whole[0], atol=1e-4)
    assert drawn == [300]
    monkeypatch.setattr("lowrank_optim.ops.blocks.BLOCK", 64 * 20)
    assert torch.allclose(WHOLE.random_sketch(g[0], 20, rows), whole[0], atol=1e-4)
    assert drawn[1:] == [64, 64, 64, 64, 44]
    stacked = WHOLE.random_sketch(g, 20, lambda some: rows(some).expand(2, -1, -1))
    assert torch.allclose(stacked, whole, atol=1e-4)
    assert WHOLE.random_sketch(g[0, :, :0], 20, lambda some: draw((0, 20), some=some)).equal(torch.zeros(60, 20))


def test_blocks_make_no_difference(monkeypatch):
    y = torch.randn(300, 20) @ torch.diag(10.0 ** -torch.linspace(0, 5, 20)) @ torch.randn(20, 20)
    layouts = y, y.mT.contiguous().mT
    whole = [(ops.whiten_(x.clone()), ops.orthonormalize(x)) for x in layouts]
    monkeypatch.setattr("lowrank_optim.ops.blocks.BLOCK", 64 * 20)
    for x, expected in zip(layouts, whole, strict=True):
        before = x.clone()
        assert torch.allclose(ops.orthonormalize(x), expected[1], atol=1e-5)
        assert x.equal(before), "only whiten_ is in place"
        assert torch.allclose(ops.whiten_(x.clone()), expected[0], atol=1e-5)


def test_products_are_products(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    a, b = torch.randn(130, 120), torch.randn(120, 140)
    for x, y in ((a, b), (a.mT.contiguous().mT, b), (a, b.mT.contiguous().mT), (b.mT, a.mT), (a[:, ::2], b[::2])):
        want = x.double() @ y.double()
        assert (ops.product(x, y) - want).abs().max() < 2e-5
        assert (ops.product(x.repeat(1, 1), y.repeat(1, 1)) - want).abs().max() < 2e-5
    assert torch.equal(ops.product(a.double(), b.double()), a.double() @ b.double())
    assert ops.product(a.expand(3, -1, -1), b).shape == (3, 130, 140)
    assert ops.product(a[:0], b).shape == (0, 140)


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_stacks_are_refitted_together(monkeypatch, stagger, masked):
    """As on accelerators, where equal matrices are in one chunk; masked: one has no gradient at first."""

    def run():
        torch.manual_seed(3)
        params = [torch.nn.Parameter(torch.randn(24, 40)) for _ in range(5)]
        optimizer = GaLoreAdamW(
            params, lr=0.1, rank=6, update_proj_gap=3, stagger=stagger, foreach=True, weight_decay=0.1
        )
        for step in range(8):
            for i, p in enumerate(params):
                p.grad = torch.randn(24, 40) @ torch.diag(torch.arange(1, 41.0) ** -1)
                p.grad *= not (masked and i == 1 and step < 2)
            optimizer.step()
        return params

    alone, calls, fit = run(), [], SubspaceIteration.fit

    def counted(self, algebra, g, *arguments):
        calls.append(len(g) if g.dim() > 2 else 1)
        return fit(self, algebra, g, *arguments)

    monkeypatch.setattr(SubspaceIteration, "fit", counted)
    monkeypatch.setattr(fitting, "stacking", lambda g: g.dim() > 2)
    together = run()
    assert max(calls) >= (1 if stagger else 3)
    assert stagger or calls[0] == (1 if masked else 5)
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one, other, atol=2e-3)


def test_gram_of_any_layout():
    y = torch.randn(2, 33, 17)
    want = y.double().mT @ y.double()
    for x in (y, y.mT.contiguous().mT, y.repeat(1, 1, 2)[..., :17], y.double()):
        assert torch.allclose(linalg.gram(x), want, rtol=1e-13, atol=1e-12)
