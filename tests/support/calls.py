"""One call per operator: name -> arguments for n elements, and what compares their results."""

from __future__ import annotations

import torch

from lowrank_optim import ops
from lowrank_optim.ops import quantize

NUMBERS = ops.philox.numbers_of(ops.key_of(3, "layer.weight"), ops.stream_of("test", 1))


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


def distinct_positions(count, variant, start=0):
    chosen = torch.arange(count)[torch.rand(count) < (0.1, 0.5, 1.0, 0.01)[variant]] + start
    return chosen.to([torch.int32, torch.int64][variant % 2])


def adding_at(shape, variant):
    dtype, start = (torch.float32, torch.bfloat16, torch.float64, torch.bfloat16)[variant], (0, 7, 0, 1 << 33)[variant]
    dense = torch.randn(shape).to(dtype)
    positions = distinct_positions(dense.numel(), variant, start)
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
    positions = distinct_positions(m * n, variant)
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


def tensors_of(arguments):
    """(place of the argument, tensor) for each, also of lists."""
    for i, x in enumerate(arguments):
        for one in x if isinstance(x, list) else [x]:
            if isinstance(one, torch.Tensor):
                yield i, one
