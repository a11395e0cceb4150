"""Native kernels are the reference, only faster; CUDA sources run on the CPU; and loading says what it did."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank_optim import GaLoreAdamW, backend_info, ops
from lowrank_optim.ops import compile as build
from lowrank_optim.ops import native, quantize, reference, schema

needs_native = pytest.mark.skipif(backend_info()["cpu"].kernels != "native", reason="no native kernels on this machine")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
NUMBERS = ops.philox.numbers_of(ops.key_of(3, "layer.weight"), ops.stream_of("test", 1))


# -- one call per operator: name -> arguments for n elements, block, whatever else varies ------------------------------


def _magnitudes(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Several decades, some zeros, some equal neighbours."""
    x = torch.randn(shape) * torch.rand(shape).pow(4)
    x.view(-1)[::7] = 0
    return x.to(dtype)


def adam(shape, variant):
    dtype = torch.float64 if variant % 2 else torch.float32
    step = None if variant < 2 else torch.tensor(7.0, dtype=[torch.float32, torch.float64][variant % 2])
    m, v, r = torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    return [m, v, r, 0.83, 0.97, 3e-7, 5.0, step]


RULE = (0.83, 0.97, 3e-7, 5.0)


def _on_device(variant):
    """The count of steps as a tensor, or not."""
    return None if variant < 2 else torch.tensor(7.0, dtype=[torch.float32, torch.float64][variant % 2])


def _list_shapes(shape, variant):
    """Another length for each, and some that are empty."""
    return [shape, (3,), (0, 2), (*shape, 2), (257,)][: 1 + variant * 2]


def adam_list(shape, variant):
    dtype = torch.float64 if variant % 2 else torch.float32
    draws = [[draw(one, dtype=dtype) for one in _list_shapes(shape, variant)] for draw in (torch.randn, torch.rand)]
    return [*draws, [torch.randn_like(x) for x in draws[0]], *RULE, _on_device(variant)]


def adam_bfloat16(shape, variant):
    m, v, r, *_ = adam_list(shape, variant)
    moments = [[x.bfloat16() for x in tensors] for tensors in (m, v)]
    at = torch.tensor(9 + (variant << 33)) if variant % 2 else None
    keys = [NUMBERS[0] + i for i in range(len(r))]
    starts = [(0, 5, -9, 123_456_789_012)[(variant + i) % 4] for i in range(len(r))]
    wide = [x.float() for x in r]
    return [*moments, wide, *RULE, _on_device(variant), keys, NUMBERS[1], 77, NUMBERS[2], at, starts]


def adam_int8(shape, variant):
    block, wide = (256, 1, 64, 5)[variant], [x.float() for x in adam_list(shape, variant)[2]]
    rows = [x.shape[0] if x.dim() > 1 and variant else 1 for x in wide]  # a batch, in the later variants
    per_row = [-(-(x.numel() // max(1, n)) // block) for x, n in zip(wide, rows, strict=True)]
    batches = [(n,) if x.dim() > 1 and variant else () for x, n in zip(wide, rows, strict=True)]
    peaks = [torch.randn(*batch, count) for batch, count in zip(batches, per_row, strict=True)]
    codes, squares = ([torch.randint(256, x.shape, dtype=torch.uint8) for x in wide] for _ in range(2))
    tables = [one for signed in (True, False) for one in _level_tables(signed)]
    return [codes, peaks, squares, [peak.abs() for peak in peaks], wide, *tables, block, *RULE, _on_device(variant)]


def _level_tables(signed):
    levels = quantize.dynamic_map(signed)
    return levels, quantize._nearest_table(levels)[0]


def squares(shape, variant):
    """Either way, but for matrices that are long: the Gram matrix of their short side."""
    shape = shape if len(shape) > 1 else (*shape, 3)
    long = max(shape) > 500
    across = shape[-1] > shape[-2] if long else variant % 2 == 1
    k = shape[-2 if across else -1]
    return [torch.zeros(*shape[:-2], k, k, dtype=torch.float64), torch.randn(shape), across]


def signs(shape, variant):
    """Equal magnitudes in each column, so that which one is the first matters."""
    x = torch.randn(shape if len(shape) > 1 else (*shape, 3), dtype=[torch.float32, torch.float64][variant % 2])
    return [x if variant < 2 else x.sign() * 0.5]


def _draw(dtype):
    def call(shape, variant):
        at = torch.tensor(9 + (variant << 33)) if variant % 2 else None
        return [torch.zeros(shape, dtype=dtype), *NUMBERS[:3], at, (0, 5, -8, 123_456_789_012)[variant]]

    return call


def rounding(shape, variant):
    out = torch.zeros(shape, dtype=torch.bfloat16)
    return [out, torch.randn(shape) * 10.0 ** (variant - 2), *NUMBERS, (0, 3, 8, 1001)[variant]]


def _added(shape, variant):
    """x and a w that is wider than it, but in variant 0; keep, its factor on the device, the first column."""
    rows, run = (shape[0] if len(shape) > 1 else 1) * (shape[1] if len(shape) > 2 else 1), shape[-1]
    before, after = [(0, 0), (3, 0), (8, 5), (0, 1)][variant]
    w = _magnitudes((rows, before + run + after), torch.bfloat16)
    dtype = [torch.float32, torch.float64][variant % 2]
    factor = torch.tensor([0.875], dtype=dtype).mul(1 - 2**-12) if variant >= 2 else None
    return w, torch.randn(rows, run) * 0.01, factor, before


def nearest(shape, variant):
    w, x, factor, first = _added(shape, variant)
    return [w, x, 0.99, factor, first]


def kahan(shape, variant):
    w, x, factor, first = _added(shape, variant)
    return [w, torch.randn(w.shape).mul(w / 512).bfloat16(), x, 0.99, factor, first]


def stochastic(shape, variant):
    w, x, factor, first = _added(shape, variant)
    at = torch.tensor(9 + (variant << 33)) if variant % 2 else None
    start, pitch = (0, 5, -8, 123_456_789_012)[variant], w.shape[1] + (0, 0, 3, 1000)[variant]
    return [w, x, 0.99, *NUMBERS[:3], at, start + first, pitch, factor, first]


def _coded(shape, block, numbers, dtype=torch.uint8):
    per_block = (*shape[:-1], -(-shape[-1] // block))
    return [torch.zeros(shape, dtype=dtype), *[torch.zeros(per_block) for _ in range(numbers)]]


BLOCKS = (256, 1, 64, 5)


def levels(shape, variant):
    block = BLOCKS[variant]
    code_map = [
        quantize.dynamic_map(True),
        quantize.four_bit_map(False),
        quantize.nf4_map(),
        quantize.dynamic_map(False),
    ]
    x = _magnitudes(shape, [torch.float32, torch.bfloat16][variant % 2])
    x = x.abs() if variant % 2 else x
    noise = torch.rand(shape) if variant >= 2 else None
    table = quantize._nearest_table(code_map[variant])
    return [*_coded(shape, block, 1), x, code_map[variant], *table, block, variant < 2, noise]


def grid(shape, variant):
    x = _magnitudes(shape, [torch.float32, torch.bfloat16][variant % 2]) + variant
    noise = torch.rand(shape) if variant >= 2 else None
    return [*_coded(shape, BLOCKS[variant], 2), x, (8, 4, 2, 8)[variant], BLOCKS[variant], noise]


def sixteenths(shape, variant):
    x = _magnitudes(shape, [torch.float32, torch.bfloat16][variant % 2]).abs()
    return [*_coded(shape, BLOCKS[variant], 1), x, BLOCKS[variant], torch.rand(shape) if variant >= 2 else None]


def from_levels(shape, variant):
    codes, peak = _coded(shape, BLOCKS[variant], 1)
    codes.random_(0, 16)
    out = torch.zeros(shape, dtype=[torch.float32, torch.bfloat16][variant % 2])
    return [out, codes, peak.normal_(), quantize.nf4_map(), BLOCKS[variant]]


def from_grid(shape, variant):
    codes, step, low = _coded(shape, BLOCKS[variant], 2)
    out = torch.zeros(shape, dtype=[torch.float32, torch.bfloat16][variant % 2])
    return [out, codes.random_(0, 256), step.uniform_(), low.normal_(), BLOCKS[variant]]


def packing(shape, variant):
    codes = torch.randint(16, shape, dtype=torch.uint8)
    return [torch.zeros(*shape[:-1], -(-shape[-1] // 2), dtype=torch.uint8), codes]


def unpacking(shape, variant):
    packed, codes = packing(shape, variant)
    return [torch.zeros_like(codes), packed.random_(0, 256)]


def selecting(shape, variant):
    """With ties, infinities and both zeros."""
    scores = torch.randn(shape, dtype=[torch.float32, torch.float64][variant % 2])
    if variant < 2:
        scores = scores.mul_(2).round_().abs_().sub_(1)
    if variant == 3:
        flat = scores.view(-1)
        flat[::5], flat[1::7], flat[2::11], flat[3::13] = 0.0, -0.0, torch.inf, -torch.inf
    rank = (shape[-1] // 3, shape[-1], min(1, shape[-1]), 2 * shape[-1] // 3)[variant]
    return [torch.zeros(*shape[:-1], rank, dtype=torch.int32), scores]


def _positions(count, variant, start=0):
    chosen = torch.arange(count)[torch.rand(count) < (0.1, 0.5, 1.0, 0.01)[variant]] + start
    return chosen.to([torch.int32, torch.int64][variant % 2])


def adding_at(shape, variant):
    dtype, start = (torch.float32, torch.bfloat16, torch.float64, torch.bfloat16)[variant], (0, 7, 0, 1 << 33)[variant]
    dense = torch.randn(shape).to(dtype)
    positions = _positions(dense.numel(), variant, start)
    return [dense, positions, torch.randn(positions.shape).to(dtype), start]


def gathering_at(shape, variant):
    dense, positions, values, start = adding_at(shape, variant)
    return [values, dense, positions, start]


def sampling(shape, variant):
    """Lines shorter than the partial sums, as long, longer, and none."""
    numel = torch.Size(shape).numel()
    m, n, k = numel % 61, shape[-1] % 89, (5, 256, 16, 37)[variant]
    dtype = [torch.float32, torch.float64][variant // 2]
    left, right = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    positions = _positions(m * n, variant)
    return [torch.randn(positions.shape, dtype=dtype), left, right, positions]


def _factored(shape, variant):
    """A matrix or a stack, its factors of several decades and without bound where a mean was 0, and their limit."""
    shape = shape if len(shape) > 1 else (*shape, 3)
    x = _magnitudes(shape, [torch.float32, torch.float64][variant % 2])
    rows, columns = (
        torch.rand(*each, dtype=x.dtype).pow(4).rsqrt_() for each in ((*shape[:-1], 1), (*shape[:-2], 1, shape[-1]))
    )
    rows.view(-1)[2::5], columns.view(-1)[1::7] = torch.inf, torch.inf
    return x, rows, columns, (1e3, 0.7, 1e30, 30.0)[variant]


def scaling_factored(shape, variant):
    x, *rest = _factored(shape, variant)
    return [torch.zeros_like(x), x, *rest]


def energy_of_factored(shape, variant):
    x, *rest = _factored(shape, variant)
    return [torch.ones(x.shape[:-2], dtype=torch.float64), x, *rest]


def stepping_factored(shape, variant):
    x, *rest = _factored(shape, variant)
    mean = torch.randn_like(x) if variant < 3 else None
    return [torch.randn_like(x), mean, x, *rest, 0.83, 0.11, 0.013, 0.995]


def summing(shape, variant):
    """In three dtypes."""
    x = torch.randn(shape if len(shape) > 1 else (*shape, 3)) * 10.0 ** (5 * variant - 5)
    x = x.to((torch.float32, torch.float64, torch.bfloat16, torch.float32)[variant])
    rows, columns = x.new_zeros(x.shape[:-1]).double(), x.new_zeros(*x.shape[:-2], x.shape[-1]).double()
    return [rows, columns, x]


def taking(shape, variant):
    """Factors per matrix, per column, per row; and a w that must not be read."""
    shape = shape if len(shape) > 1 else (*shape, 3)
    dtype, last = [torch.float32, torch.float64][variant % 2], [(1, 1), (1, shape[-1]), (shape[-2], 1)]
    factors = torch.randn(*shape[:-2], *last[variant % 3], dtype=dtype)
    w = torch.full(shape, torch.nan, dtype=dtype) if variant == 3 else torch.randn(shape, dtype=dtype)
    return [w, torch.randn(shape, dtype=dtype), factors, (0.97, 1.0, 0.5, 0.0)[variant]]


def adam_rows(shape, variant):
    """Several rows of one age, and of none alike."""
    m, v, r, *_ = adam(shape, variant)
    ages = torch.randint(1, (3, 900)[variant // 2], shape[:-1]).to(r.dtype)
    return [m, v, r, *RULE[:3], ages]


def moving(shape, variant):
    """Some rows stay, some come from before or behind, some begin at zero."""
    x = torch.randn(shape).to([torch.float32, torch.float64, torch.int32, torch.float32][variant])
    some = torch.rand(len(x)) < (0.8, 0.5, 1.0, 0.0)[variant]
    known = torch.randperm(len(x))[: int(some.sum())].sort().values
    return [x, torch.full((len(x),), -1).masked_scatter_(some, known)]


def _cosines(shape, variant):
    """x, third, across; of lengths that have all factors, and as many columns as there are."""
    m = (2, 42, 64, 240)[variant]
    n = min(torch.Size(shape).numel(), 20_000) if variant % 2 else shape[-1] % 3001
    x = torch.randn(m, n, dtype=[torch.float32, torch.float64][variant // 2])
    across = variant in (1, 2)
    return x.mT.contiguous() if across else x, variant >= 2, across


def _chosen(x, across, variant, more=0):
    m, n = x.mT.shape if across else x.shape
    index = torch.arange(m, dtype=torch.int32)[torch.rand(m) < (1.0, 0.3, 0.0, 0.5)[variant]]
    return torch.randn(len(index), n + more, dtype=x.dtype), index


def cosine_scores(shape, variant):
    x, third, across = _cosines(shape, variant)
    return [torch.zeros(x.shape[1 if across else 0], dtype=torch.float64), x, third, 1 + variant % 2, across]


def cosine_rows(shape, variant):
    x, third, across = _cosines(shape, variant)
    out, index = _chosen(x, across, variant)
    return [out, x, index, third, across]


def adding_cosines(shape, variant):
    w, third, across = _cosines(shape, variant)
    first = (0, 5, 0, 1)[variant]
    d, index = _chosen(w, across, variant, (0, 9, 3, 1)[variant])
    return [w, d, index, -0.3, (1.0, 0.0, 0.9, 0.7)[variant], third, across, first]


CALLS = {
    "projected_adam_": adam,
    "projected_adam_list_": adam_list,
    "projected_adam_bfloat16_list_": adam_bfloat16,
    "projected_adam_int8_list_": adam_int8,
    "gram_": squares,
    "fix_signs_": signs,
    "philox_bits16_": _draw(torch.int32),
    "philox_noise16_": _draw(torch.float32),
    "philox_uniform_": _draw(torch.float32),
    "philox_normal_": _draw(torch.float32),
    "round_to_bfloat16_": rounding,
    "add_nearest_": nearest,
    "add_kahan_": kahan,
    "add_stochastic_": stochastic,
    "quantize_blockwise_": levels,
    "quantize_affine_": grid,
    "quantize_sixteenths_": sixteenths,
    "dequantize_blockwise_": from_levels,
    "dequantize_affine_": from_grid,
    "pack4_": packing,
    "unpack4_": unpacking,
    "select_top_": selecting,
    "add_at_": adding_at,
    "gather_at_": gathering_at,
    "add_sampled_product_": sampling,
    "scale_factored_": scaling_factored,
    "factored_energy_": energy_of_factored,
    "step_factored_": stepping_factored,
    "squares_": summing,
    "take_scaled_": taking,
    "projected_adam_rows_": adam_rows,
    "move_rows_": moving,
    "cosine_scores_": cosine_scores,
    "cosine_rows_": cosine_rows,
    "add_cosines_": adding_cosines,
}
every_operator = pytest.mark.parametrize("name", CALLS)


def test_every_operator_has_a_call():
    assert CALLS.keys() == schema.OPERATORS.keys()


def copied(arguments, misalign: bool = False):
    """Tensors of their own; misaligned ones start one element into their memory, as slices of parameters do."""

    def copy(x):
        if isinstance(x, list):
            return [copy(one) for one in x]
        if not isinstance(x, torch.Tensor):
            return x
        if misalign:
            return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
        return x.clone()

    return [copy(x) for x in arguments]


def ulps(x: torch.Tensor, y: torch.Tensor) -> int:
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}[x.dtype]
    return int((x.view(whole) - y.view(whole)).abs().max()) if x.numel() else 0


DIRECTION = {
    "projected_adam_": 2,
    "projected_adam_list_": 2,
    "projected_adam_bfloat16_list_": 2,
    "projected_adam_int8_list_": 4,
    "projected_adam_rows_": 2,
}
TRANSFORMS = {torch.float32: 3e-6, torch.float64: 1e-14}  # errors beside the largest result


def tensors_of(arguments):
    """(place of the argument, tensor) for each, also of lists."""
    for i, x in enumerate(arguments):
        for one in x if isinstance(x, list) else [x]:
            if isinstance(one, torch.Tensor):
                yield i, one


def assert_same(name, ours, theirs):
    for (i, x), (_, y) in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        if DIRECTION.get(name) == i:
            assert ulps(x, y) <= 8, "torch's square roots are not rounded correctly"
        elif name == "gram_" and i == 0:
            assert x.numel() == 0 or (x - y).abs().max() <= 1e-13 * (1 + y.abs().max()), "sums in another order"
        elif name == "factored_energy_" and i == 0:
            torch.testing.assert_close(x, y, rtol=1e-13, atol=0, msg="sums in another order")
        elif name == "squares_" and i < 2:
            assert torch.allclose(x, y, rtol=1e-14, atol=0), "sums in another order"
        elif "cosine" in name and i == 0 and x.numel():
            least = TRANSFORMS[theirs[1].dtype] * (1 + y.abs().max())
            assert (x - y).abs().max() <= least, "a transform, and products or another transform"
        else:
            assert torch.equal(x, y), f"argument {i} of {name}"


# -- equality ----------------------------------------------------------------------------------------------------------

shapes = st.one_of(
    st.tuples(st.integers(0, 700)),
    st.tuples(st.integers(0, 5), st.integers(0, 300)),
    st.tuples(st.just(1), st.integers(1, 3), st.integers(1, 2000)),
)


@needs_native
@every_operator
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes, variant=st.integers(0, 3), misalign=st.booleans())
def test_native_is_the_reference(name, shape, variant, misalign):
    arguments = CALLS[name](shape, variant)
    ours, theirs = copied(arguments, misalign), copied(arguments)
    getattr(torch.ops.lowrank_optim, name).default(*ours)
    getattr(reference, name)(*theirs)
    assert_same(name, ours, theirs)


@needs_native
@every_operator
def test_native_is_the_reference_at_sizes_that_threads_share(name):
    torch.set_num_threads(2)
    try:
        for variant in range(4):
            arguments = CALLS[name]((3, 100_003), variant)
            ours, theirs = copied(arguments), copied(arguments)
            getattr(torch.ops.lowrank_optim, name).default(*ours)
            getattr(reference, name)(*theirs)
            assert_same(name, ours, theirs)
    finally:
        torch.set_num_threads(1)


@needs_native
def test_no_tensors_at_all():
    for name in ("projected_adam_list_", "projected_adam_bfloat16_list_", "projected_adam_int8_list_"):
        arguments = [[] if isinstance(x, list) else x for x in CALLS[name]((2,), 0)]
        getattr(torch.ops.lowrank_optim, name).default(*arguments)


@needs_native
def test_known_answers_of_the_native_philox():
    """Of the authors' Random123 library; element -8 begins the last counter, all of whose bits are set."""
    for key, purpose, start, words in (
        (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, 0xFFFFFFFF, -8, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        out = torch.zeros(8, dtype=torch.int32)
        torch.ops.lowrank_optim.philox_bits16_.default(out, key, purpose, purpose, None, start)
        halves = out.tolist()
        assert tuple(low | high << 16 for low, high in zip(halves[::2], halves[1::2], strict=True)) == words


@needs_native
@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_all_floats_near_midpoints(signed):
    for code_map in (quantize.dynamic_map(signed), quantize.four_bit_map(signed), quantize.nf4_map()):
        midpoints = (code_map[1:] + code_map[:-1]) / 2
        near = (midpoints.view(torch.int32)[:, None] + torch.arange(-100, 101, dtype=torch.int32)).view(torch.float32)
        x = torch.cat([near.flatten(), torch.tensor([1.0, -0.0, 1e-45, -1e-38])])
        codes, _ = quantize.quantize_blockwise(x, code_map, len(x))
        assert torch.equal(codes.long(), torch.bucketize(x, midpoints))


@needs_native
def test_blocks_of_zeros_and_of_the_least_numbers():
    x = torch.cat([torch.zeros(64), torch.full((64,), 1e-42), torch.full((64,), -1e-45), torch.zeros(3)])
    for name, call in (
        ("quantize_blockwise_", levels),
        ("quantize_affine_", grid),
        ("quantize_sixteenths_", sixteenths),
    ):
        arguments = call((195,), 2)
        place = {"quantize_blockwise_": 2, "quantize_affine_": 3, "quantize_sixteenths_": 2}[name]
        arguments[place] = x.abs() if name == "quantize_sixteenths_" else x
        ours, theirs = copied(arguments), copied(arguments)
        getattr(torch.ops.lowrank_optim, name).default(*ours)
        getattr(reference, name)(*theirs)
        assert_same(name, ours, theirs)


def test_selections_are_the_first_of_equal_scores():
    for dtype in (torch.float32, torch.float64):
        scores = torch.tensor([1.0, torch.nan, 0.0, -torch.inf, -0.0, 2.0, 0.0, torch.inf, 1.0], dtype=dtype)
        scores = torch.stack([scores, scores.flip(0)])
        for rank, first, second in (
            (1, [1], [7]),
            (2, [1, 7], [1, 7]),
            (4, [0, 1, 5, 7], [0, 1, 3, 7]),
            (6, [0, 1, 2, 5, 7, 8], [0, 1, 2, 3, 7, 8]),
            (7, [0, 1, 2, 4, 5, 7, 8], [0, 1, 2, 3, 4, 7, 8]),
            (9, list(range(9)), list(range(9))),
        ):
            for run in (torch.ops.lowrank_optim.select_top_.default, reference.select_top_):
                index = torch.zeros(2, rank, dtype=torch.int32)
                run(index, scores)
                assert index.tolist() == [first, second]


ENTRIES = ("add_at_", "gather_at_", "add_sampled_product_")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("positions", [[5, 6, 6], [7, 6], [4, 12], [9, 17], [-1], [5, 30, 6]], ids=str)
@pytest.mark.parametrize("name", ENTRIES)
def test_positions_that_do_not_ascend_or_are_outside(name, positions, dtype):
    """Of 3 x 4 entries; where they begin at 5, 4 is outside and 12 is not."""
    positions, out, start = torch.tensor(positions, dtype=dtype), torch.ones(len(positions)), 0
    if name == "add_sampled_product_":
        arguments = [out, torch.ones(3, 2), torch.ones(4, 2), positions]
    else:
        out, dense, start = (torch.ones(3, 4), out, 5) if name == "add_at_" else (out, torch.ones(3, 4), 5)
        arguments = [out, positions, dense, start] if name == "add_at_" else [out, dense, positions, start]
    for run in (getattr(torch.ops.lowrank_optim, name).default, getattr(reference, name)):
        message = f"positions must ascend from at least {start} to below {start + 12}, none of them twice"
        with pytest.raises(RuntimeError, match=message):
            run(*arguments)
        assert bool((out == 1).all()), "nothing is written"


def test_a_sampled_product_is_the_product():
    left, right = torch.randn(600, 13, dtype=torch.float64), torch.randn(600, 9, dtype=torch.float64)
    positions = _positions(13 * 9, 1)
    expected = (left.mT @ right).flatten()[positions]
    torch.testing.assert_close(ops.sampled_product(left, right, positions), expected, atol=1e-12, rtol=0)
    assert ops.sampled_product(left[:0], right[:0], positions).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_entries_of_all_dtypes(dtype):
    dense, positions = torch.randn(40, 3).to(dtype), _positions(120, 0, 50)
    values = torch.randn(positions.shape).to(dtype)
    before = dense.flatten()[positions - 50]
    assert torch.equal(ops.gather_at(dense, positions, 50), before)
    ops.add_at_(dense, positions, values, 50)
    assert torch.equal(dense.flatten()[positions - 50], before + values)


# -- the dispatcher ----------------------------------------------------------------------------------------------------


@every_operator
@pytest.mark.parametrize("variant", [0, 3])
def test_opcheck(name, variant):
    torch.library.opcheck(getattr(torch.ops.lowrank_optim, name).default, CALLS[name]((2, 70), variant))


def spoilt(name):
    """Arguments that must be refused: one tensor of another dtype, shape or layout, or a number out of range."""
    good = CALLS[name]((4, 6), 0)

    def with_(place, bad):
        return [*good[:place], bad, *good[place + 1 :]]

    alike = sum(x.shape == (4, 6) for _, x in tensors_of(good))
    for i, x in enumerate(good):
        in_list = isinstance(x, list)
        if in_list:
            yield with_(i, x * 2)
        x = x[0] if in_list else x
        if isinstance(x, torch.Tensor):
            bad = [x.to(torch.int16)]
            if x.shape == (4, 6):
                bad += [x.repeat(1, 2)[:, ::2], *([x[:3].contiguous()] if alike > 1 or "pack" in name else [])]
            yield from (with_(i, [one] if in_list else one) for one in bad)
    if "int8" in name:
        for bad in (0, 257):
            yield with_(9, bad)
        yield with_(1, [torch.zeros(7)])
        yield with_(6, torch.zeros(5, dtype=torch.uint8))
        yield with_(14, torch.zeros(2))
    if name == "gram_":
        yield with_(0, torch.zeros(7, 7, dtype=torch.float64))
        yield with_(1, torch.zeros(6))
    if "factored" in name:
        matrix = 2 if name == "step_factored_" else 1
        yield with_(matrix, torch.zeros(6))
        for place in (matrix + 1, matrix + 2):
            yield with_(place, good[place].mT.contiguous())
            yield with_(place, good[place][0])
    if name == "factored_energy_":
        yield with_(0, torch.zeros(4, dtype=torch.float64))
    if name == "squares_":
        yield with_(0, torch.zeros(6, dtype=torch.float64))
        yield with_(1, torch.zeros(4, dtype=torch.float64))
        yield with_(2, torch.zeros(6))
    if name == "take_scaled_":
        yield with_(2, torch.zeros(4, 6))
        yield with_(2, torch.zeros(6))
        yield [torch.zeros(6), torch.zeros(6), torch.zeros(1), 1.0]
    if name == "fix_signs_":
        yield with_(0, torch.zeros(6))
    if "quantize" in name:
        yield with_([i for i, x in enumerate(good) if type(x) is int][-1], 0)
    if name == "quantize_affine_":
        yield with_(4, 9)


@every_operator
def test_errors_are_the_same_texts(name):
    checked = schema._checked(schema.OPERATORS[name][1], getattr(reference, name))
    for arguments in spoilt(name):
        with pytest.raises(RuntimeError, match=r"must (be|have)") as plain:
            checked(*arguments)
        with pytest.raises(RuntimeError) as ours:
            getattr(torch.ops.lowrank_optim, name).default(*arguments)
        assert str(plain.value) in str(ours.value)


@needs_native
def test_compilers_see_plain_torch():
    """Compilers fuse what is plain; an operator would be a wall."""
    code_map, seen = quantize.nf4_map(), []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    codes, absmax = quantize.quantize_blockwise(torch.randn(128), code_map, 64)
    run = torch.compile(lambda: quantize.dequantize_blockwise(codes, absmax, code_map, 64), backend=backend)
    assert torch.equal(run(), quantize.dequantize_blockwise(codes, absmax, code_map, 64))
    assert not any("lowrank_optim" in name for name in seen)


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "coordinates", "ascent"])
def test_a_step_never_writes_to_gradients(kind):
    w = torch.nn.Parameter(torch.randn(24, 40))
    b = torch.nn.Parameter(torch.randn(24))
    optimizer = GaLoreAdamW([w, b], lr=0.01, rank=4, maximize=kind == "ascent")
    for _ in range(3):
        w.grad, b.grad = torch.randn(24, 40), torch.randn(24)
        before = w.grad.clone(), b.grad.clone()
        optimizer.step()
        assert torch.equal(w.grad, before[0])
        assert torch.equal(b.grad, before[1])


# -- CUDA sources, on the CPU and compiled -----------------------------------------------------------------------------

EMULATED = build.Target("emulated", extra=build.asked_flags())


@pytest.fixture(scope="session")
def emulated():
    """torch.ops.lowrank_optim_emulated: the CUDA kernels, run by threads of the host."""
    schema.define("lowrank_optim_emulated")
    folder, _ = build.build_cached(EMULATED, retry=True)
    torch.ops.load_library(str(build.library_in(folder, EMULATED)))
    return torch.ops.lowrank_optim_emulated


@needs_native
@needs_compiler
@pytest.mark.parametrize("name", sorted(CALLS.keys() - schema.CPU_ONLY))
@pytest.mark.parametrize("shape", [(1,), (0, 5), (3, 167), (1, 2, 1000)])
def test_emulated_cuda_is_the_cpu(emulated, name, shape):
    for variant in range(4):
        arguments = CALLS[name](shape, variant)
        ours, theirs = copied(arguments, misalign=variant == 1), copied(arguments)
        getattr(emulated, name).default(*ours)
        getattr(torch.ops.lowrank_optim, name).default(*theirs)
        for (_, x), (_, y) in zip(tensors_of(ours), tensors_of(theirs), strict=True):
            assert torch.equal(x, y), "to the last bit"


def symbols(library: Path) -> set[str]:
    lines = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in lines.splitlines()}


ALLOWED = {  # all in the headers of torch 2.10, whose stable ABI later versions keep
    "aoti_torch_abi_version", "aoti_torch_create_device_guard", "aoti_torch_delete_device_guard",
    "aoti_torch_delete_library_object", "aoti_torch_delete_tensor_object", "aoti_torch_device_type_cpu",
    "aoti_torch_get_current_cuda_stream", "aoti_torch_get_device_index", "aoti_torch_get_device_type",
    "aoti_torch_get_dim", "aoti_torch_get_dtype", "aoti_torch_get_numel", "aoti_torch_get_size",
    "aoti_torch_is_contiguous", "aoti_torch_library_init_impl", "torch_delete_list", "torch_get_const_data_ptr",
    "torch_get_mutable_data_ptr", "torch_library_impl", "torch_list_get_item", "torch_list_size", "torch_parallel_for",
}  # fmt: skip


def assert_stable(library: Path) -> None:
    ours = {name for name in symbols(library) if "torch" in name or "c10" in name or "at::" in name}
    extra = {name for name in ours - ALLOWED if not name.startswith("aoti_torch_dtype_")}
    assert not extra, "symbols that other versions of torch may not have"
    assert not {name for name in symbols(library) if name.startswith(("Py", "_Py"))}, "bound to one CPython"


@needs_native
def test_the_cpu_library_is_bound_to_the_stable_abi_only():
    assert_stable(backend_info()["cpu"].path)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_the_cuda_library_compiles_links_and_registers(tmp_path, monkeypatch):
    """Without a GPU and with a torch that has no CUDA; all architectures, no registers spilled."""
    monkeypatch.setenv("LOWRANK_OPTIM_STRICT", "1")
    target = build.Target("cuda", ("8.0", "9.0", "10.0+PTX"))
    library = build.build(target, tmp_path)
    assert_stable(library)
    code = (
        "import sys, torch; from lowrank_optim.ops import schema; torch.ops.load_library(sys.argv[1]);"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "assert all(has(f'lowrank_optim::{name}', 'CUDA') for name in schema.OPERATORS.keys() - schema.CPU_ONLY)"
    )
    run(code, str(library))


def test_the_nvcc_that_the_environment_names_comes_first(tmp_path, monkeypatch):
    for folder in ("path", "home/bin"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / folder / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert build._nvcc() == "nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build._nvcc() == str(tmp_path / "home/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "gone"))
    assert build._nvcc() == "nvcc"


# -- loading -----------------------------------------------------------------------------------------------------------

SHOW = (
    "import torch, lowrank_optim as l; l.GaLoreAdamW([torch.nn.Parameter(torch.zeros(8, 8))]); print(l.backend_info())"
)


def environment(**changes: str) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    plain = {key: value for key, value in os.environ.items() if not key.startswith("LOWRANK_OPTIM_")}
    return {**plain, "PYTHONPATH": root, **changes}


def run(code: str, *arguments: str, fails: bool = False, **changes: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**changes))
    assert bool(done.returncode) == fails, done.stderr
    return done.stdout + done.stderr


def without_compiler(tmp_path: Path) -> dict[str, str]:
    return {"CXX": str(tmp_path / "none"), "LOWRANK_OPTIM_CACHE": str(tmp_path / "cache")}


def test_importing_loads_nothing():
    said = run("import lowrank_optim; print(lowrank_optim.backend_info())")
    assert said.count("nothing was looked for yet") == 2


def test_off():
    assert "LOWRANK_OPTIM_NATIVE=off" in run(SHOW, LOWRANK_OPTIM_NATIVE="off")


def test_a_mode_that_there_is_not(monkeypatch):
    said = run(SHOW, fails=True, LOWRANK_OPTIM_NATIVE="on")
    assert "LOWRANK_OPTIM_NATIVE must be one of auto, prebuilt, require, off, got 'on'" in said


def test_without_a_compiler_plain_torch_runs_and_says_why(tmp_path):
    said = run(SHOW, **without_compiler(tmp_path))
    assert "cpu  reference" in said
    assert "is not a program" in said


def test_require_without_a_compiler(tmp_path):
    said = run(SHOW, fails=True, LOWRANK_OPTIM_NATIVE="require", **without_compiler(tmp_path))
    assert "RuntimeError: LOWRANK_OPTIM_NATIVE=require, and there are no native kernels for cpu" in said


def test_prebuilt_never_compiles(tmp_path):
    said = run(SHOW, LOWRANK_OPTIM_NATIVE="prebuilt", LOWRANK_OPTIM_CACHE=str(tmp_path))
    assert "nothing that fits was built before" in said
    assert not list(tmp_path.glob("cpu-*"))


@needs_compiler
@pytest.mark.slow
def test_four_processes_build_once(tmp_path):
    command = [sys.executable, "-c", SHOW]
    kwargs = dict(env=environment(LOWRANK_OPTIM_CACHE=str(tmp_path)), stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, stderr=subprocess.STDOUT, **kwargs) for _ in range(4)]
    said = [process.communicate()[0] for process in processes]
    assert all("cpu  native" in text for text in said), said
    assert sum("built in" in text for text in said) == 1
    assert len(list(tmp_path.glob("cpu-*"))) == 1
    assert "built before" in run(SHOW, LOWRANK_OPTIM_CACHE=str(tmp_path))


@needs_compiler
def test_a_build_that_fails_is_told_and_not_tried_at_each_start(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_OPTIM_CACHE", str(tmp_path))
    target = build.Target("cpu", extra=("-no-such-flag",))
    with pytest.raises(build.BuildError, match="no-such-flag"):
        build.build_cached(target)
    with pytest.raises(build.BuildError, match="an earlier build failed; `python -m"):
        build.build_cached(target)


def test_a_stale_library_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    target = build.Target("cpu")
    build.library_in(tmp_path, target).write_bytes(b"")
    (tmp_path / "cpu.json").write_text('{"fingerprint": "older", "compiler": "g++", "archs": []}')
    with pytest.raises(build.BuildError, match="the prebuilt library is stale"):
        native._prebuilt(target)


def test_sources_and_flags_decide_what_is_stale(tmp_path, monkeypatch):
    shutil.copytree(build.sources(), tmp_path / "csrc")
    monkeypatch.setattr(build, "sources", lambda: tmp_path / "csrc")
    before = build.Target("cpu").fingerprint()
    assert before == build.Target("cpu").fingerprint() != build.Target("cpu", extra=("-g",)).fingerprint()
    with (tmp_path / "csrc" / "elements.h").open("a") as file:
        file.write("// changed\n")
    assert build.Target("cpu").fingerprint() != before


@pytest.mark.parametrize(
    ("built", "asked", "fits"),
    [
        (("9.0",), "9.0", True),
        (("8.0",), "8.6", True),
        (("8.6",), "8.0", False),
        (("9.0",), "10.0", False),
        (("9.0+PTX",), "10.0", True),
        (("9.0+PTX",), "8.0", False),
    ],
)
def test_which_gpus_code_runs_on(built, asked, fits):
    assert (asked in native._covered(built)) == fits


def test_architectures_that_mean_nothing(monkeypatch):
    monkeypatch.setenv("LOWRANK_OPTIM_CUDA_ARCHS", "hopper")
    with pytest.raises(build.BuildError, match="got 'hopper'"):
        build.asked_archs()
