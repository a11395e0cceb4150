"""What a matrix leaves open is decided by rules, and not by rounding errors: singular vectors, signs, selections."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim import ops
from lowrank_optim.layers.quantized_linear import compensate
from lowrank_optim.ops.factor import balance, singular, split
from lowrank_optim.parts.random import strongest
from lowrank_optim.recipe.algebra import WHOLE, subspace_iteration

pytestmark = pytest.mark.cpus

K = 18
APART = torch.linspace(1, 0.3, K, dtype=torch.float64)
SPECTRA = {
    "apart": APART,
    "one zero": APART * (torch.arange(K) < K - 1),
    "a third zero": APART * (torch.arange(K) < 12),
    "rank 1": APART * (torch.arange(K) < 1),
    "equal": torch.ones(K, dtype=torch.float64),
    "in threes": APART[torch.arange(K) // 3],
    "in threes and zero": APART[torch.arange(K) // 3] * (torch.arange(K) < 9),
}
SHAPES = [(K, K), (31, K), (K, 29)]

every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


def matrix(shape, spectrum, dtype=torch.float64):
    u, v = (torch.linalg.qr(torch.randn(size, K, dtype=torch.float64))[0] for size in shape)
    return ((u * SPECTRA[spectrum]) @ v.mT).to(dtype)


def disturbed(w):
    """The same but for a unit of rounding in each entry, as another order of summation gives it."""
    for _ in range(4):
        yield w + w.abs().max() * torch.finfo(w.dtype).eps * (torch.rand_like(w) - 0.5)
    yield w.mT.contiguous().mT


def limit(dtype):
    return 2e-12 if dtype == torch.float64 else 1e-3


def identity(x):
    return (x.mT @ x - torch.eye(x.shape[1], dtype=x.dtype)).abs().max()


@every_spectrum
@every_shape
@every_dtype
def test_decompositions_are_functions_of_the_matrix(spectrum, shape, dtype):
    w, eps = matrix(shape, spectrum, dtype), torch.finfo(dtype).eps
    u, s, v = singular(w)
    assert (u.mT * s @ v - w).abs().max() < 100 * eps
    assert max(identity(u.mT), identity(v.mT)) < 100 * eps
    assert torch.equal(s == 0, SPECTRA[spectrum] == 0)
    for x in disturbed(w):
        for found, expected in zip(singular(x), (u, s, v), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=limit(dtype))


@every_spectrum
@every_shape
@every_dtype
@pytest.mark.parametrize("rank", [5, 10, 14])
def test_factors_are_functions_of_the_matrix(spectrum, shape, dtype, rank):
    """Also where the rank cuts a run of equal values, or is more than the matrix has."""
    w = matrix(shape, spectrum, dtype)
    b, a = split(w, rank)
    assert bool((b.norm(dim=0) > 0).all()), "a direction that is zero in both factors would never train"
    error = torch.linalg.svdvals(w - b @ a)[0]
    assert float(error) <= float(SPECTRA[spectrum][rank]) + 100 * torch.finfo(dtype).eps
    for x in disturbed(w):
        torch.testing.assert_close(split(x, rank), (b, a), rtol=0, atol=limit(dtype))
    b, a = balance(b, a)
    for x, y in zip(disturbed(b), disturbed(a), strict=True):
        again = balance(x, y)
        torch.testing.assert_close(again, (b, a), rtol=0, atol=limit(dtype))
        assert (again[0] @ again[1] - b @ a).abs().max() < 100 * torch.finfo(dtype).eps


@every_spectrum
@every_shape
@every_dtype
@pytest.mark.parametrize("rank", [5, 10, 14])
def test_exact_bases_are_functions_of_the_gradient(spectrum, shape, dtype, rank):
    g = matrix(shape, spectrum, dtype)
    basis = ops.leading_left_vectors(g, rank)
    assert identity(basis) < 100 * torch.finfo(dtype).eps
    captured, best = (basis.mT @ g).square().sum(), SPECTRA[spectrum][:rank].square().sum()
    assert float(captured) == pytest.approx(float(best), rel=1e-4)
    for x in disturbed(g):
        torch.testing.assert_close(ops.leading_left_vectors(x, rank), basis, rtol=0, atol=limit(dtype))


@pytest.mark.parametrize("spectrum", [name for name in SPECTRA if name != "equal"])
@every_shape
@pytest.mark.parametrize("rank", [5, 10, 14])
def test_iterated_bases_are_functions_of_the_gradient(spectrum, shape, rank):
    """In float64; from one start, as a stream of random numbers gives it."""
    g = matrix(shape, spectrum)
    start = ops.normal((g.shape[1], min(rank + 4, K)), 0, ops.stream_of("sketch", 0)).to(g)
    basis = subspace_iteration(WHOLE, g, g @ start, rank, 2)
    assert identity(basis) < 1e-12
    for x in disturbed(g):
        again = subspace_iteration(WHOLE, x, x @ start, rank, 2)
        torch.testing.assert_close(again, basis, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spectrum", ["one zero", "a third zero", "rank 1"])
def test_iterated_bases_of_a_gradient_that_lacks_rank_in_float32(spectrum):
    g = matrix((31, K), spectrum, torch.float32)
    start = ops.normal((K, 16), 0, ops.stream_of("sketch", 0))
    basis = subspace_iteration(WHOLE, g, g @ start, 14, 2)
    for x in disturbed(g):
        torch.testing.assert_close(subspace_iteration(WHOLE, x, x @ start, 14, 2), basis, rtol=0, atol=1e-3)


@pytest.mark.parametrize("columns", [[0, 1, 0], [0, 0, 0], [0, 1, 2]])
def test_completions_are_functions_of_the_columns(columns):
    y = torch.randn(20, 3, dtype=torch.float64)[:, columns]
    y[:, 2] += y[:, 1] if columns == [0, 1, 2] else 0
    q = ops.orthonormalize(y)
    for x in disturbed(y):
        torch.testing.assert_close(ops.orthonormalize(x), q, rtol=0, atol=1e-8)


@every_dtype
def test_the_first_of_tied_entries_decides_the_sign(dtype):
    basis = torch.tensor([[0.1, -0.5], [-0.7, 0.5], [0.7, 0.5], [-0.2, -0.5]], dtype=dtype)
    expected = torch.stack([-basis[:, 0], -basis[:, 1]], 1)
    for x in (basis, basis * (1 + torch.finfo(dtype).eps * torch.randn(50, 4, 2, dtype=dtype))):
        torch.testing.assert_close(ops.fix_signs(x), expected.expand_as(x), rtol=1e-5, atol=0)
        plain = x.clone()
        ops.reference.fix_signs_(plain)
        assert torch.equal(plain, ops.fix_signs(x))


@every_dtype
def test_of_tied_scores_the_first_are_selected(dtype):
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0, 2.0], dtype=dtype)
    for x in (scores, scores + 2 * torch.finfo(dtype).eps * torch.randn(50, 7, dtype=dtype)):
        chosen = strongest(x.clone(), 3)
        assert torch.equal(chosen, torch.tensor([1, 2, 3], dtype=torch.int32).expand_as(chosen))
    noise = torch.cat([torch.tensor([1.0], dtype=dtype), torch.finfo(dtype).eps * torch.rand(30, dtype=dtype)])
    assert strongest(noise, 4).tolist() == [0, 1, 2, 3], "what is rounding errors ties with zero"


@every_dtype
def test_selections_without_ties_are_those_of_a_sort(dtype):
    scores = torch.randperm(1000).to(dtype)
    assert strongest(scores.clone(), 30).tolist() == scores.topk(30).indices.sort().values.tolist()


@every_dtype
def test_compensation_keeps_the_first_of_equal_errors(dtype):
    """Here no iteration improves on the first: what rounding loses is orthogonal to P."""
    w = torch.randn(12, 9, dtype=dtype)
    w[:, :3] = w[:, :3].round()
    p = torch.eye(9, dtype=dtype)[:3]
    for x in (w, *disturbed(w)):
        x[:, :3] = x[:, :3].round()
        _, b = compensate(x, p, torch.round, 4)
        assert not b.any()


METHODS = {
    "sst": lambda model: lowrank_optim.SST(model, rank=5, iteration_steps=2, iterations=2, lr=0.01, eps=1e-3),
    "low_rank": lambda model: lowrank_optim.LowRankAdamW(
        model, rank=5, refactor_every=2, reset_every=4, lr=0.01, eps=1e-3
    ),
    "sltrain": lambda model: lowrank_optim.SLTrain(
        model, rank=5, density=0.1, refactor_every=2, reset_every=4, lr=0.01, eps=1e-3
    ),
    "loqt": lambda model: lowrank_optim.LoQT(
        model, rank=5, update_proj_gap=2, base="dense", basis="svd", lr=0.01, eps=1e-3
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", ["equal", "a third zero", "rank 1"])
def test_training_is_a_function_of_the_weight(method, shape, spectrum):
    """The gradient lacks rank too: three samples."""
    w, batches = matrix(shape, spectrum), torch.randn(8, 3, shape[1], dtype=torch.float64)

    def trained(start):
        model = nn.Sequential(nn.Linear(*reversed(shape), bias=False, dtype=torch.float64))
        model[0].weight.data.copy_(start)
        optimizer = METHODS[method](model)
        for x in batches:
            optimizer.zero_grad()
            model(x).sin().square().sum().backward()
            optimizer.step()
        return model[0].weight.detach()

    expected = trained(w)
    for x in list(disturbed(w))[:2]:
        torch.testing.assert_close(trained(x), expected, rtol=0, atol=1e-8)
