"""The numeric kernels: known answers, statistics, and orthonormal bases of nasty matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lowrank_optim import ops
from lowrank_optim.ops import reference
from lowrank_optim.ops.philox import Places, philox
from lowrank_optim.recipe.algebra import WHOLE, subspace_iteration

KEY, STREAM = ops.key_of(3, "layer.weight"), ops.stream_of("test", 1)
KNOWN = [0.20780998468399048, 1.9231173992156982, -0.5173792839050293, -1.2982730865478516]


@pytest.mark.parametrize(
    ("counter", "key", "stream", "words"),
    [  # known answers of the authors' Random123 library for philox4x32-10
        (0, 0, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (1 << 64) - 1, (0xFFFFFFFF, 0xFFFFFFFF), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_known_answers(counter, key, stream, words):
    assert tuple(int(word) for word in philox(torch.tensor([counter]), key, stream)) == words


def test_any_part_of_a_stream_is_the_same_numbers():
    whole = ops.random_bits16(5_000, KEY, STREAM)
    for start, count in ((0, 1), (7, 9), (8, 16), (4_990, 10), (123, 4_000)):
        assert torch.equal(ops.random_bits16(count, KEY, STREAM, start), whole[start : start + count])
    assert torch.equal(ops.normal((3, 50), KEY, STREAM), ops.normal((600_000,), KEY, STREAM)[:150].view(3, 50))
    assert torch.equal(ops.normal((3, 50), KEY, STREAM, start=150), ops.normal((6, 50), KEY, STREAM)[3:])


@pytest.mark.parametrize(("rows", "columns", "first", "run"), [(7, 13, 3, 4), (40, 16, 8, 8), (3, 2_000, 1_999, 1)])
def test_a_block_of_columns_draws_its_own_elements(rows, columns, first, run):
    """Also from the middle of a row on, as large tensors are worked on in pieces."""
    whole = ops.random_bits16(rows * columns, KEY, STREAM).view(rows, columns)[:, first : first + run].flatten()
    for start, count in ((0, rows * run), (1, rows * run - 2), (rows * run - 1, 1), (run // 2, run)):
        places = Places(start, first, run, columns - run)
        assert torch.equal(ops.random_bits16(count, KEY, STREAM, places), whole[start : start + count])


def test_many_rows_are_drawn_in_blocks():
    rows, columns = 20_000, 5
    whole = ops.random_bits16(rows * columns, KEY, STREAM).view(rows, columns)[:, 1:3].flatten()
    assert torch.equal(ops.random_bits16(2 * rows, KEY, STREAM, Places(0, 1, 2, 3)), whole)


def box_muller(radius, angle):
    """In float64, with numpy's logarithm, cosine and sine."""
    u, v = ((word.numpy() + 0.5) / 2**32 for word in (radius, angle))
    length = np.sqrt(-2 * np.log(u))
    return length * np.cos(2 * np.pi * v), length * np.sin(2 * np.pi * v)


def off(x, exact):
    """In ulps, but for what float64 cannot tell from zero."""
    return ((np.abs(x.numpy() - exact) - 1e-14).clip(0) / np.spacing(np.abs(exact).astype(np.float32))).max()


def test_normal_numbers_are_those_of_box_and_muller():
    words = philox(torch.arange(100_000), KEY, STREAM)
    exact = np.stack([*box_muller(*words[:2]), *box_muller(*words[2:])], axis=-1).ravel()
    assert off(ops.normal((400_000,), KEY, STREAM), exact) < 2


def test_normal_numbers_of_the_first_and_the_last_words():
    """Longest and shortest lengths, where logarithms change their exponent, and around each eighth of a turn."""
    edges = torch.tensor([0, 1, 2, 3 << 30, 1 << 31, 3_037_000_499, 3_037_000_500, 1_518_500_249, 1_518_500_250])
    words = torch.cat([edges + near for near in (-1, 0, 1)] + [(torch.arange(8) << 29) + near for near in (-1, 0, 1)])
    radius, angle = torch.cartesian_prod(words % (1 << 32), words % (1 << 32)).unbind(-1)
    pair = [x.float() for x in reference.random._normal_pair(radius, angle)]
    for x, exact in zip(pair, box_muller(radius, angle), strict=True):
        assert off(x, exact) < 2
    assert float(torch.hypot(*pair).max()) == pytest.approx((2 * 33 * math.log(2)) ** 0.5, abs=1e-6)
    assert float(torch.hypot(*pair).min()) == pytest.approx(2**-16, rel=1e-6)


def test_known_normal_numbers():
    """What a run has drawn, its continuation by another version draws, too."""
    assert ops.normal((4,), KEY, STREAM, start=2).tolist() == KNOWN


def test_normal_numbers_are_normal():
    x = ops.normal((1_000_000,), KEY, STREAM)
    assert x.dtype == torch.float32
    for part in (x, x[0::2], x[1::2]):
        moments = [float((part.double() ** k).mean()) for k in (1, 2, 3, 4, 6)]
        assert moments == pytest.approx([0, 1, 0, 3, 15], abs=0.25)
        assert moments[:4] == pytest.approx([0, 1, 0, 3], abs=0.02)
        assert _distance(0.5 * torch.erfc(-part.double() / 2**0.5)) < 1.63, "Kolmogorov and Smirnov, at 1 %"


def test_their_tails_are_those_of_a_normal_distribution():
    sigmas, counts, some, runs = torch.tensor([2, 3, 4, 4.5, 5]), torch.zeros(5), 1 << 20, 16
    for run in range(runs):
        size = ops.normal((some,), KEY, STREAM, start=run * some).abs()
        counts += torch.stack([(size > sigma).sum() for sigma in sigmas])
    expected = torch.erfc(sigmas / 2**0.5) * some * runs
    assert ((counts - expected).abs() < 3.5 * expected.sqrt()).all(), (counts, expected)
    assert expected[-1] > 9, "of the last there are some"


def test_no_number_tells_of_its_neighbours():
    """Both of a pair come from the same two words: neither signs, sizes nor directions may show it."""
    x = ops.normal((1_000_000,), KEY, STREAM).double()
    for made in (x, x.abs(), x.square(), x.sign()):
        made = (made - made.mean()) / made.std()
        for lag in (1, 2, 3, 4, 8):
            for first in (0, 1):
                product = made[first : len(x) - lag : 2] * made[first + lag :: 2]
                assert abs(float(product.mean())) < 4 * float(product.std()) / len(product) ** 0.5
    first, second = x[0::2], x[1::2]
    assert _distance(torch.atan2(second, first) / (2 * math.pi) + 0.5) < 1.63, "directions are uniform"
    assert _distance(torch.exp(-(first.square() + second.square()) / 2)) < 1.63, "lengths are what they were drawn as"


def _distance(uniform):
    """Of Kolmogorov and Smirnov, from the uniform distribution, times the root of the count."""
    ranks, n = torch.arange(len(uniform) + 1) / len(uniform), len(uniform)
    found = uniform.sort().values
    return float(torch.maximum(ranks[1:] - found, found - ranks[:-1]).max()) * n**0.5


def test_streams_differ():
    draws = [
        ops.normal((1000,), ops.key_of(seed, name), ops.stream_of(purpose, time))
        for seed, name, purpose, time in [
            (0, "a", "p", 0), (1, "a", "p", 0), (0, "b", "p", 0), (0, "a", "q", 0), (0, "a", "p", 1),
        ]
    ]  # fmt: skip
    correlation = torch.corrcoef(torch.stack(draws)).fill_diagonal_(0)
    assert correlation.abs().max() < 0.15


def test_rounding_is_unbiased_and_exact_where_it_can_be():
    x = torch.tensor([1.0, 1.001, -3.1415926, 1e-30, 0.0, float("inf"), 65504.0])
    draws = torch.stack([ops.round_to_bfloat16(x, KEY, ops.stream_of("w", i)).double() for i in range(4000)])
    below, above = draws.min(0).values, draws.max(0).values
    assert torch.equal(draws[:, [0, 4, 5]], x[[0, 4, 5]].double().expand(4000, 3)), "bfloat16 numbers stay"
    mean = draws[:, [1, 2, 3, 6]].mean(0)
    step = (above - below)[[1, 2, 3, 6]]
    assert ((mean - x[[1, 2, 3, 6]].double()).abs() < 4 * 0.5 * step / 4000**0.5).all()
    assert (below <= x.double()).all()
    assert (above >= x.double()).all()


def test_rounding_does_not_depend_on_the_slice():
    x = torch.randn(1000)
    whole = ops.round_to_bfloat16(x, KEY, STREAM)
    assert torch.equal(ops.round_to_bfloat16(x[300:700], KEY, STREAM, 300), whole[300:700])


def _spectrum(m, n, values):
    left, right = torch.linalg.qr(torch.randn(m, n))[0], torch.linalg.qr(torch.randn(n, n))[0]
    return left * values @ right


@pytest.mark.parametrize(
    "values",
    [
        torch.arange(1, 65) ** -0.5,
        torch.arange(1, 65) ** -1.0,
        torch.arange(1, 65) ** -2.0,
        torch.exp(-torch.arange(64) / 3),
        torch.cat([torch.ones(1), torch.zeros(63)]),
        torch.cat([torch.ones(20), torch.zeros(44)]),
        torch.full((64,), 1e-18),
        torch.full((64,), 1e18),
    ],
    ids=["k^-0.5", "k^-1", "k^-2", "exp", "rank 1", "rank 20", "tiny", "huge"],
)
def test_orthonormalize(values):
    y = _spectrum(200, 64, values)
    q = ops.orthonormalize(y)
    assert (q.mT @ q - torch.eye(64)).abs().max() < 3e-6
    residual = torch.linalg.matrix_norm(y - q @ (q.mT @ y)) / torch.linalg.matrix_norm(y)
    assert residual < 3e-6, "the columns must span y"


@pytest.mark.parametrize("columns", [[0, 0, 1, 2], [3, 3, 3, 3]], ids=["repeated", "all equal"])
def test_orthonormalize_completes_what_is_missing(columns):
    y = torch.randn(9, 4)[:, columns].contiguous()
    y[:, -1] = 0
    q = ops.orthonormalize(y)
    assert (q.mT @ q - torch.eye(4)).abs().max() < 1e-5
    assert q.is_contiguous()


def test_signs_do_not_depend_on_the_sign_of_the_gradient():
    g = torch.randn(12, 30)
    assert torch.allclose(ops.leading_left_vectors(g, 5), ops.leading_left_vectors(-g, 5), atol=1e-5)
    basis = ops.leading_left_vectors(g, 5)
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


def test_svd_that_does_not_converge_falls_back(monkeypatch):
    g = torch.randn(12, 30, dtype=torch.float64)
    want = ops.leading_left_vectors(g, 4)

    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    assert torch.allclose(ops.leading_left_vectors(g, 4), want, atol=1e-8)


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (64, 64)])
@pytest.mark.parametrize(("rounds", "least"), [(1, 0.93), (2, 0.985), (4, 0.998)])
def test_subspace_iteration_captures_the_energy(shape, rounds, least):
    m, n = shape
    k = min(m, n)
    g = (
        _spectrum(m, k, torch.arange(1, k + 1) ** -0.5)
        if m >= n
        else _spectrum(n, k, torch.arange(1, k + 1) ** -0.5).mT
    )
    exact = ops.leading_left_vectors(g, 16)
    start = g @ ops.normal((n, 24), KEY, STREAM)
    basis = subspace_iteration(WHOLE, g, start, 16, rounds)
    energy = (basis.mT @ g).square().sum() / (exact.mT @ g).square().sum()
    assert least < energy <= 1 + 1e-5
    assert (basis.mT @ basis - torch.eye(16)).abs().max() < 1e-5
    captured = (basis.mT @ g).norm(dim=1)
    assert (captured[:-1] >= 0.97 * captured[1:]).all(), "columns are ordered by what they capture"


@pytest.mark.parametrize("shape", [(7, 5), (300, 400), (3, 90, 1200), (1, 9), (9, 1)])
@pytest.mark.parametrize("turned", [False, True])
def test_norms_of_columns_are_torchs(shape, turned):
    """For all strides of the matrix, and also where it is summed in several pieces."""
    x = torch.randn(*shape[:-2], shape[-1], shape[-2]).mT if turned else torch.randn(shape)
    for dim in (-2, -1, (-2, -1)):
        expected = torch.linalg.vector_norm(x.double(), dim=dim, keepdim=True)
        torch.testing.assert_close(ops.norm(x, dim).double(), expected, rtol=1e-6, atol=0)


def test_the_largest_entry_may_be_negative_or_nan():
    x = torch.tensor([[[1.0, -3.0], [2.0, 0.5]], [[1.0, 4.0], [-2.0, 0.0]]])
    assert ops.largest(x).tolist() == [3, 4]
    x[1, 0, 1] = float("nan")
    assert ops.largest(x)[0] == 3
    assert ops.largest(x)[1].isnan()


@pytest.mark.parametrize("shape", [(6, 11), (300, 400), (2, 7, 5)])
def test_a_size_with_factors_is_that_of_the_product(shape):
    x, factors = torch.randn(shape), torch.rand(*shape[:-2], 1, shape[-1]) + 0.5
    for some in (factors, factors[..., :1]):
        torch.testing.assert_close(WHOLE.size(x, some), WHOLE.size(x * some), rtol=1e-6, atol=0)
