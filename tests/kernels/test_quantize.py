"""Blockwise quantization: against bitsandbytes, against brute force, and the bounds that each scheme promises."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch

from lowrank_optim import ops
from lowrank_optim.ops import quantize as q

KEY, STREAM = ops.key_of(3, "layer.weight"), ops.stream_of("test", 1)


@pytest.fixture(scope="module")
def bnb():
    package = pytest.importorskip("bitsandbytes")
    if not hasattr(package, "functional"):
        pytest.skip("bitsandbytes is not installed: another test has put an empty stand-in in its place")
    return package.functional


def sample(shape, scale: float, signed: bool) -> torch.Tensor:
    """Magnitudes over several decades, as moments have them, and some exact zeros."""
    x = scale * torch.randn(shape) * torch.rand(shape).pow(4)
    x.view(-1)[::7] = 0
    return x if signed else x.abs()


def over_peak(x: torch.Tensor, block: int) -> torch.Tensor:
    """x over the largest magnitude of its block, by a plain loop over one matrix."""
    pieces = [piece / piece.abs().max().clamp(min=torch.finfo(torch.float32).tiny) for piece in x.split(block)]
    return torch.cat(pieces)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_maps_are_those_of_bitsandbytes(bnb, signed, bits):
    if bits == 8:
        assert torch.equal(q.dynamic_map(signed), bnb.create_dynamic_map(signed))
    elif signed:  # its 4 bits are padded to 256 entries with zeros
        theirs = bnb.create_dynamic_map(True, max_exponent_bits=3, total_bits=4)
        assert torch.equal(q.four_bit_map(True), theirs.unique())


def test_maps():
    signed, unsigned = q.dynamic_map(True), q.dynamic_map(False)
    assert (len(signed), len(unsigned)) == (256, 256)
    assert (signed[127], unsigned[0]) == (0, 0)
    assert float(signed[0]) == pytest.approx(-0.99297, abs=1e-5)
    assert float(signed[128]) == pytest.approx(5.5e-7)
    assert float(unsigned[1]) == pytest.approx(3.25e-7)
    positive = torch.tensor([0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875])
    torch.testing.assert_close(
        q.four_bit_map(True), torch.cat([-positive.flip(0), torch.zeros(1), positive, torch.ones(1)])
    )
    assert torch.equal(q.four_bit_map(False) * 16, torch.arange(1.0, 17.0))
    for make, size in ((q.dynamic_map, 256), (q.four_bit_map, 16)):
        for sign in (True, False):
            assert len(make(sign)) == size
            assert (make(sign).diff() > 0).all()
            assert make(sign) is make(sign), "made once"


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e6, 1e-30])
@pytest.mark.parametrize("k", [1, 17, 256, 1000, 100_000])
def test_codes_of_bitsandbytes(bnb, k, scale, signed):
    """Its CPU code searches a table with cells of 2^-15, so it may miss the nearest entry by half a cell, and does:
    a zero becomes the value 1e-5 or so. Wherever that cannot matter the codes are equal; elsewhere ours is nearer."""
    x, code_map = sample((k,), scale, signed), q.dynamic_map(signed)
    theirs, state = bnb.quantize_blockwise(x, code=code_map, blocksize=256)
    theirs = theirs.flatten()
    codes, absmax = q.quantize_blockwise(x, code_map, 256)
    assert torch.equal(absmax, state.absmax)
    unit, half_cell = over_peak(x, 256), 2.0**-16 + 2.0**-22
    midpoints = (code_map[1:] + code_map[:-1]) / 2
    decided = torch.bucketize(unit - half_cell, midpoints) == torch.bucketize(unit + half_cell, midpoints)
    assert torch.equal(codes[decided], theirs[decided])
    distance, their_distance = ((code_map[c.long()] - unit).abs().double() for c in (codes, theirs))
    assert (distance <= their_distance + 1e-7 * unit.abs()).all()
    if k == 100_000:
        assert decided.float().mean() > 0.5


@pytest.mark.parametrize("block", [1, 5, 64, 256])
@pytest.mark.parametrize("make", [q.dynamic_map, q.four_bit_map])
@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_the_nearest(signed, make, block):
    x, code_map = sample((3001,), 3.0, signed), make(signed)
    codes, absmax = q.quantize_blockwise(x, code_map, block)
    assert codes.dtype == torch.uint8
    assert absmax.dtype == torch.float32
    assert (codes.shape, absmax.shape) == ((3001,), (-(-3001 // block),))
    unit = over_peak(x, block).double()
    distances = (unit[:, None] - code_map.double()).abs()
    chosen = distances.gather(1, codes.long()[:, None]).squeeze(1)
    assert (chosen <= distances.min(1).values + 1e-7 * unit.abs()).all()  # float32 midpoints: a tie may go either way
    back = q.dequantize_blockwise(codes, absmax, code_map, block)
    assert torch.equal(back, code_map[codes.long()] * absmax.repeat_interleave(block)[:3001])


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_is_the_search(signed):
    """Every midpoint, its neighbours and numbers of every size: the look-up must decide as `bucketize` does."""
    for make in (q.dynamic_map, q.four_bit_map):
        code_map = make(signed)
        midpoints = (code_map[1:] + code_map[:-1]) / 2
        up, down = (torch.nextafter(midpoints, torch.tensor(to)) for to in (2.0, -2.0))
        tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, -1.0, 1.0])
        x = torch.cat([midpoints, up, down, tiny, torch.rand(100_000) * 2 - 1])
        codes, absmax = q.quantize_blockwise(x, code_map, len(x))
        assert absmax == 1, "so that the division changes nothing"
        assert torch.equal(codes.long(), torch.bucketize(x, midpoints))


def test_a_map_too_dense_for_the_table_is_refused():
    with pytest.raises(ValueError, match="closer to each other"):
        q.quantize_blockwise(torch.randn(10), torch.tensor([0.5, 0.501, 0.502, 0.503]), 256)


def test_round_trip_of_8_bits():
    x = torch.randn(100_000)
    back = q.dequantize_blockwise(*q.quantize_blockwise(x, q.dynamic_map(True), 256), q.dynamic_map(True), 256)
    assert (back - x).norm() / x.norm() < 0.02


def test_round_trip_of_4_bits():
    x = torch.randn(100_000)
    back = q.dequantize_blockwise(*q.quantize_blockwise(x, q.four_bit_map(True), 128), q.four_bit_map(True), 128)
    assert torch.corrcoef(torch.stack([x, back]))[0, 1] > 0.98
    v = x.square()
    back = q.dequantize_blockwise(*q.quantize_blockwise(v, q.four_bit_map(False), 128), q.four_bit_map(False), 128)
    assert (back > 0).all(), "a second moment never becomes 0"
    assert torch.corrcoef(torch.stack([v, back]))[0, 1] > 0.98


@pytest.mark.parametrize("signed", [True, False])
def test_zero_blocks_and_tiny_blocks(signed):
    x = torch.cat([torch.zeros(256), torch.full((256,), 1e-42), torch.zeros(7)])
    codes, absmax = q.quantize_blockwise(x, q.dynamic_map(signed), 256)
    back = q.dequantize_blockwise(codes, absmax, q.dynamic_map(signed), 256)
    assert back.isfinite().all()
    assert torch.equal(back[x == 0], x[x == 0])
    assert (back - x).abs().max() <= 1e-42


def schemes():
    noise = torch.rand(4, 3, 700)
    yield lambda x, i: q.quantize_blockwise(x, q.dynamic_map(True), 256)
    yield lambda x, i: q.quantize_affine(x, 8, 256)
    yield lambda x, i: q.quantize_affine(x, 4, 100, noise[i])


def test_batches_equal_one_by_one(monkeypatch):
    x = torch.randn(4, 3, 700)
    for scheme in schemes():
        whole = scheme(x, ...)
        for i in range(4):
            for j in range(3):
                for part, alone in zip(whole, scheme(x[i, j], (i, j)), strict=True):
                    assert torch.equal(part[i, j], alone)
        for size in (1, 300, 1500):  # however the work is cut
            monkeypatch.setattr(ops.reference.pieces, "PIECE", size)
            assert all(torch.equal(a, b) for a, b in zip(whole, scheme(x, ...), strict=True))
            monkeypatch.undo()


def test_strided_and_half_precision_inputs():
    x = torch.randn(700, 6)
    for scheme in (lambda y: q.quantize_blockwise(y, q.dynamic_map(True), 256), lambda y: q.quantize_affine(y, 8, 256)):
        assert all(torch.equal(a, b) for a, b in zip(scheme(x.mT), scheme(x.mT.contiguous()), strict=True))
        half = x.bfloat16().mT
        assert all(torch.equal(a, b) for a, b in zip(scheme(half), scheme(half.float()), strict=True))
    for shape in ((0,), (0, 5), (3, 0)):
        codes, scale, low = q.quantize_affine(torch.zeros(shape), 8, 256)
        assert q.dequantize_affine(codes, scale, low, 256).shape == shape


def test_dtypes_of_dequantized():
    x = torch.randn(2, 300)
    codes, absmax = q.quantize_blockwise(x, q.dynamic_map(True), 256)
    wide = q.dequantize_blockwise(codes, absmax, q.dynamic_map(True), 256)
    narrow = q.dequantize_blockwise(codes, absmax, q.dynamic_map(True), 256, torch.bfloat16)
    assert torch.equal(narrow, wide.bfloat16())
    affine = q.quantize_affine(x, 8, 256)
    assert torch.equal(q.dequantize_affine(*affine, 256, torch.bfloat16), q.dequantize_affine(*affine, 256).bfloat16())


@pytest.mark.parametrize("k", [0, 1, 2, 7, 256, 1001])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_pack4(batch, k):
    codes = torch.randint(0, 16, (*batch, k), dtype=torch.uint8)
    packed = q.pack4(codes)
    assert packed.shape == (*batch, -(-k // 2))
    assert packed.dtype == torch.uint8
    assert torch.equal(q.unpack4(packed, k), codes)


def test_pack4_puts_the_first_code_into_the_lower_half():
    assert q.pack4(torch.tensor([1, 2, 3], dtype=torch.uint8)).tolist() == [0x21, 0x03]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("offset", [0.0, 5.0, -300.0])
@pytest.mark.parametrize("k", [1, 255, 256, 10_001])
def test_affine_error_is_half_a_step(k, offset, bits):
    x = torch.randn(k) + offset
    codes, scale, low = q.quantize_affine(x, bits, 256)
    assert codes.max() <= 2**bits - 1
    error = (q.dequantize_affine(codes, scale, low, 256) - x).abs()
    steps = scale.repeat_interleave(256)[:k]
    assert (error <= steps * 0.5 + 2e-7 * x.abs()).all()


def test_affine_keeps_a_block_away_from_zero():
    """An integer zero point clamped to the range of its bits, as Q-GaLore's code has it, makes this block constant."""
    x = torch.linspace(0.5, 0.6, 256)
    codes, scale, low = q.quantize_affine(x, 4, 256)
    assert float(scale) == pytest.approx(0.1 / 15, rel=1e-5)
    assert codes.unique().numel() == 16
    assert (q.dequantize_affine(codes, scale, low, 256) - x).abs().max() <= scale * 0.5 * 1.0001


@pytest.mark.parametrize("value", [0.0, 0.3, -7e5, 1e-40])
def test_affine_constant_blocks_are_exact(value):
    x = torch.full((300,), value)
    for noise in (None, torch.rand(300)):
        assert torch.equal(q.dequantize_affine(*q.quantize_affine(x, 8, 256, noise), 256), x)


def test_stochastic_rounding_is_unbiased():
    x, draws = torch.randn(40), 10_000
    codes, scale, low = q.quantize_affine(x.expand(draws, 40), 4, 40, torch.rand(draws, 40))
    back = q.dequantize_affine(codes, scale, low, 40, torch.float64)
    step = float(scale[0])
    assert ((back - x).abs() < step * 1.0001).all(), "to one of two neighbours"
    error = (back.mean(0) - x) / (step / draws**0.5)
    assert error.abs().max() < 0.5 * 5, "5 standard deviations of the noisiest"
    assert back.std(0).max() > 0.4 * step


def test_stochastic_rounding_leaves_the_grid_alone():
    """What is on the grid stays whatever the noise: weights that no update touches must not drift."""
    codes = torch.randint(0, 256, (256,), dtype=torch.uint8)
    codes[:2] = torch.tensor([0, 255])
    x = q.dequantize_affine(codes, torch.ones(1) / 64, torch.full((1,), -2.0), 256)  # exact in binary
    for value in (0.0, 2.0**-17, 1 - 2.0**-17):
        again, scale, low = q.quantize_affine(x, 8, 256, torch.full((256,), value))
        assert torch.equal(again, codes)
        assert (float(scale), float(low)) == (1 / 64, -2.0)


def test_uniform_noise():
    noise = q.uniform_noise((100, 1000), KEY, STREAM)
    assert noise.min() > 0
    assert noise.max() < 1
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(noise.var()) == pytest.approx(1 / 12, abs=0.001)
    assert torch.equal(noise.flatten()[:50], q.uniform_noise((50,), KEY, STREAM))


def test_the_largest_never_wraps_around():
    """In float32 its place may come out a little above the last code, and noise may want to round that up."""
    x = torch.randn(2000, 16)
    codes, scale, low = q.quantize_affine(x, 8, 16, torch.zeros(2000, 16))
    places = (x - low) / scale
    assert (places.amax(-1) > 255).any(), "or nothing is tested"
    assert (codes.gather(1, x.argmax(1, keepdim=True)) == 255).all()


def test_nf4_map(bnb):
    """The quantiles of the paper, computed as their authors did: evenly spaced probabilities in float32."""
    quantile, most = NormalDist().inv_cdf, 0.9677083
    above = [quantile(p) for p in torch.linspace(most, 0.5, 9)[:-1].tolist()]
    below = [-quantile(p) for p in torch.linspace(most, 0.5, 8)[:-1].tolist()]
    values = torch.tensor(sorted([*below, 0.0, *above]))
    assert torch.equal(q.nf4_map(), values / values.max())
    assert torch.equal(q.nf4_map(), bnb.get_4bit_type("nf4", device="cpu"))
    assert q.nf4_map()[7] == 0
    assert q.nf4_map() is q.nf4_map(), "made once"


def nf4_of_bitsandbytes(bnb, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its codes, one to a byte, its absmax and its values. It puts the first code into the upper half."""
    packed, state = bnb.quantize_4bit(x, quant_type="nf4", blocksize=64)
    pairs = packed.flatten()
    codes = torch.stack([pairs >> 4, pairs & 15], 1).flatten()[: x.numel()]
    return codes, state.absmax, bnb.dequantize_4bit(packed, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (64, 64), (3, 5461), (5461, 2), (300, 1000)])
@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-6])
def test_nf4_codes_and_values_are_those_of_bitsandbytes(bnb, shape, dtype, scale):
    x = (scale * torch.randn(shape)).to(dtype)
    x.view(-1)[::17] = 0
    x.view(-1)[64:128] = 0
    theirs, absmax, values = nf4_of_bitsandbytes(bnb, x)
    codes, peaks = q.quantize_blockwise(x.flatten(), q.nf4_map(), 64)
    assert torch.equal(codes, theirs)
    # It raises the peak of a short last block to 1e-38, not of others: to be seen only where that block is all zero.
    assert torch.equal(peaks.clamp(min=1e-38), absmax.clamp(min=1e-38))
    assert torch.equal(q.dequantize_blockwise(codes, peaks, q.nf4_map(), 64, dtype).view(shape), values)


def test_nf4_decides_ties_as_bitsandbytes_does(bnb):
    """All float32 numbers near every midpoint; a one in each block, so that the division changes nothing."""
    midpoints = (q.nf4_map()[1:] + q.nf4_map()[:-1]) / 2
    near = (midpoints.view(torch.int32)[:, None] + torch.arange(-1000, 1001, dtype=torch.int32)).view(torch.float32)
    x = torch.cat([torch.ones(near.numel(), 1), near.view(-1, 1).expand(-1, 63)], 1).flatten()
    codes, _ = q.quantize_blockwise(x, q.nf4_map(), 64)
    assert torch.equal(codes, nf4_of_bitsandbytes(bnb, x)[0])
    assert torch.equal(codes.view(-1, 64)[:, 1].long(), torch.bucketize(near.flatten(), midpoints)), "ties go down"


@pytest.mark.parametrize("peak", [1e-45, 1e-42, 5e-39, 1.17e-38])
def test_nf4_of_blocks_below_the_smallest_normal_number(bnb, peak):
    """The one place where codes differ. Lest 0 / 0 occur both divide such blocks by more than their peak, bitsandbytes
    by 1e-38 (it calls 1e-38 itself a one), ours by the smallest normal number, 1.18e-38. Errors stay below the peak."""
    x = peak * torch.linspace(-1, 1, 64)
    codes, absmax = q.quantize_blockwise(x, q.nf4_map(), 64)
    theirs, their_absmax, values = nf4_of_bitsandbytes(bnb, x)
    assert torch.equal(absmax, their_absmax)
    ours = q.dequantize_blockwise(codes, absmax, q.nf4_map(), 64)
    assert (ours - x).abs().max() <= absmax.max()
    assert (values - x).abs().max() <= absmax.max()
    assert (codes.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("scale", [1.0, 1e-12, 3e30])
def test_nf4_values_are_fixed_points(scale):
    x = scale * torch.randn(20_003)
    codes, absmax = q.quantize_blockwise(x, q.nf4_map(), 64)
    back = q.dequantize_blockwise(codes, absmax, q.nf4_map(), 64)
    for noise in (None, torch.full_like(x, 0.5 / 65536), torch.full_like(x, 1 - 0.5 / 65536)):
        again, peaks = q.quantize_blockwise(back, q.nf4_map(), 64, noise=noise)
        assert torch.equal(again, codes), "also under the smallest and the largest noise that there is"
        assert torch.equal(peaks, absmax)


@pytest.mark.parametrize("make", [q.nf4_map, lambda: q.dynamic_map(True), lambda: q.four_bit_map(False)])
def test_noise_rounds_to_a_map_without_bias(make):
    code_map, x = make(), torch.rand(300)
    x[0] = 1
    noise = (torch.arange(1000) + 0.5)[:, None].expand(-1, 300) / 1000
    codes, absmax = q.quantize_blockwise(x.expand(1000, 300), code_map, 512, noise=noise)
    values = q.dequantize_blockwise(codes, absmax, code_map, 512)
    reached = x >= code_map[0]
    gap = code_map[torch.bucketize(x, code_map)] - code_map[(torch.bucketize(x, code_map) - 1).clamp(min=0)]
    error = values.double().mean(0) - x
    assert (error.abs() <= gap / 1000 + 1e-6)[reached].all(), "noise takes all its values once"
    assert ((values - x).abs() <= gap + 1e-6)[:, reached].all(), "only to the two neighbours"
    assert (codes[:, ~reached] == 0).all()
