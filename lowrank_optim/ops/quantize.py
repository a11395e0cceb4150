"""Blockwise quantization to 8 and 4 bits: to a map of values (states, NF4 weights) or a uniform grid (weights).

The last dimension of every tensor here is one flattened matrix of k elements, cut into blocks of `block`; the last
block may be short. Leading dimensions are a batch, so a block never reaches into another matrix and a batch gives what
its matrices would give one by one.

References: Dettmers et al., "8-bit optimizers via block-wise quantization", ICLR 2022; Li et al., "Memory efficient
optimizers with 4-bit states", NeurIPS 2023; Dettmers et al., "QLoRA: efficient finetuning of quantized LLMs", NeurIPS
2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from .philox import Places, Stream, random_bits16

_CPU = torch.device("cpu")
PIECE = 1 << 16  # elements worked on at once on CPU
_TINY = torch.finfo(torch.float32).tiny
_NF4 = (
    *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.091050036, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)


@lru_cache(maxsize=32)
def dynamic_map(signed: bool, device: torch.device = _CPU) -> Tensor:
    """256 values in ascending order, dense near 0 and near 1: seven decades, the top one resolved to 1 %.

    Signed for first moments: zero at index 127, and 1 but no -1. Unsigned for second moments: zero at index 0.
    """
    return _dynamic(signed, decades=7).to(device)


@lru_cache(maxsize=32)
def four_bit_map(signed: bool, device: torch.device = _CPU) -> Tensor:
    """16 values in ascending order. Signed: the dynamic map of three decades. Unsigned: k / 16 for k = 1 ... 16.

    There is no zero in the unsigned one on purpose: a second moment that rounds to 0 would make its update explode.
    """
    return (_dynamic(signed, decades=3) if signed else torch.arange(1.0, 17.0) / 16).to(device)


def nf4_map(device: torch.device = _CPU) -> Tensor:
    """NormalFloat: 16 quantiles of the normal distribution over their largest, in ascending order; zero at index 7.

    The numbers that the QLoRA paper prints. Both 1 and -1 are there, so the peak of a block is exact.
    """
    # What is traced must not meet a tensor from outside of the graph, nor leave one of its own behind.
    return torch.tensor(_NF4, device=device) if torch.compiler.is_compiling() else _nf4_map(device)


@lru_cache(maxsize=32)
def _nf4_map(device: torch.device) -> Tensor:
    return torch.tensor(_NF4, device=device)


def quantize_blockwise(
    x: Tensor, code_map: Tensor, block: int, signed_peak: bool = False, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The nearest entry of `code_map` to each element over its block's largest magnitude.

    Args:
        x: `(..., k)`, any floating-point dtype, finite.
        code_map: ascending values in [-1, 1]; at most 256.
        block: elements that share one `absmax`.
        signed_peak: `absmax` has the sign of the largest element, which then is 1 to the map. Signed maps have 1 and no
            -1: a block whose peak is negative would otherwise lose a part of it each time it is written.
        noise: uniform in (0, 1), of x's shape: goes to the entry above where it is below the distance to the one below,
            over their gap, so that `E[result] = x` where the map reaches. None rounds to nearest.

    Returns:
        `codes (..., k)` uint8 and `absmax (..., ceil(k / block))` float32. Half-way goes to the lower entry.
    """
    codes, absmax = _outputs(x, block)
    if x.is_meta:
        return codes, absmax
    lower, midpoint = _nearest_table(code_map)
    for blocks, code, *dither, peak in _pieces([x, codes] if noise is None else [x, codes, noise], [absmax], block):
        blocks = blocks.float()
        top, bottom = blocks.amax(-1, True), blocks.amin(-1, True)
        largest = torch.maximum(top, -bottom)
        peak.copy_(torch.where(-bottom > top, bottom, top) if signed_peak else largest)
        unit = (blocks / torch.where(largest < _TINY, _TINY, peak)).flatten()
        # The upper half of a float32 leaves two candidates: a look-up instead of `bucketize`, which is 20 times slower.
        upper = (unit.view(torch.int32) >> 16).add_(1 << 15)
        higher = (unit > midpoint.index_select(0, upper)).view(torch.uint8)
        nearest = lower.index_select(0, upper).add_(higher)
        code.copy_((_dithered(unit, nearest, code_map, dither[0]) if dither else nearest).view(code.shape))
    return codes, absmax


def quantize_sixteenths(x: Tensor, block: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Non-negative numbers in sixteenths of their block's largest: `four_bit_map(signed=False)`, from 1 to 16.

    Args:
        noise: uniform in [0, 1), of x's shape: then `E[result] = x` from one sixteenth on. None rounds to nearest.

    Returns:
        `codes (..., k)` uint8 and the largest of each block `(..., ceil(k / block))`, float32.
    """
    codes, largest = _outputs(x, block)
    for blocks, code, *dither, peak in _pieces([x, codes] if noise is None else [x, codes, noise], [largest], block):
        blocks = blocks.float()
        peak.copy_(blocks.amax(-1, True))
        places = (blocks / peak.clamp(min=_TINY)).mul_(16)
        rest = places.frac()
        places.floor_().add_(rest > dither[0] if dither else rest >= 0.5)
        code.copy_(places.clamp_(1, 16).sub_(1))
    return codes, largest


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code_map: Tensor, block: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The inverse of `quantize_blockwise` up to rounding, `(..., k)`."""
    x = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for code, target, peak in _pieces([codes, x], [absmax], block):
        target.copy_(code_map.index_select(0, code.flatten().int()).view(code.shape).mul_(peak))
    return x


def pack4(codes: Tensor) -> Tensor:
    """Two codes below 16 to a byte, the first in the lower half: `(..., k)` to `(..., ceil(k / 2))`."""
    odd = codes[..., 1::2]
    if codes.shape[-1] % 2:
        odd = pad(odd, (0, 1))
    return (odd << 4).bitwise_or_(codes[..., ::2])


def unpack4(packed: Tensor, k: int) -> Tensor:
    """The `k` codes of `pack4`."""
    codes = packed.new_empty(*packed.shape[:-1], k)
    codes[..., ::2] = packed & 15
    codes[..., 1::2] = packed[..., : k // 2] >> 4
    return codes


def uniform_noise(
    shape: tuple[int, ...], key: int, stream: Stream, start: int | Places = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform numbers in (0, 1) for stochastic rounding: the midpoints of 65536 equal cells, numbered from `start`."""
    bits = random_bits16(torch.Size(shape).numel(), key, stream, start, device)
    return bits.float().add_(0.5).mul_(2.0**-16).view(shape)


def quantize_affine(x: Tensor, bits: int, block: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds each element to a uniform grid from its block's minimum to its maximum.

    The grid starts at a number and not at a whole multiple of its step, which in 8 bits would have to be clamped for
    blocks that do not straddle 0, and would destroy them.

    Args:
        x: `(..., k)`, any floating-point dtype, finite.
        bits: of a code, at most 8.
        block: elements that share a grid.
        noise: uniform in [0, 1), of x's shape. Rounds up where it is below the distance to the lower grid point, so
            that `E[result] = x`. None rounds to nearest.

    Returns:
        `codes (..., k)` uint8; `scale` (the step, an error is at most half of it) and `low`, float32, one per block.
    """
    codes, scale = _outputs(x, block)
    low, top = torch.empty_like(scale), 2**bits - 1
    tensors = [x, codes] if noise is None else [x, codes, noise]
    for blocks, code, *dither, step, least in _pieces(tensors, [scale, low], block):
        blocks = blocks.float()
        least.copy_(blocks.amin(-1, True))
        step.copy_((blocks.amax(-1, True) - least).div_(top).clamp_(min=_TINY))  # a constant block keeps its value
        places = (blocks - least).div_(step)
        if not dither:
            places.add_(0.5).floor_()
        else:  # compared and not added up: a sum would be rounded, and move what is on the grid
            rest = places.frac()
            places.floor_().add_(rest > dither[0])
        code.copy_(places.clamp_(max=top))
    return codes, scale, low


def dequantize_affine(
    codes: Tensor, scale: Tensor, low: Tensor, block: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The inverse of `quantize_affine` up to rounding, `(..., k)`."""
    x = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for code, target, step, least in _pieces([codes, x], [scale, low], block):
        target.copy_(code.float().mul_(step).add_(least))
    return x


def _dynamic(signed: bool, decades: int) -> Tensor:
    """Each decade is cut into equal parts, twice as many as the decade below it; its values are their midpoints."""
    values = [torch.tensor([0.0, 1.0])]
    for i in range(decades):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        middle = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i + 1 - decades)
        values += [middle, -middle] if signed else [middle]
    return torch.cat(values).sort().values


def _dithered(unit: Tensor, nearest: Tensor, code_map: Tensor, noise: Tensor) -> Tensor:
    """The entry below each number or the one above. Noise is never 0 or 1: an ulp away from an entry goes to it."""
    nearest = nearest.int()
    below = (nearest - (code_map.index_select(0, nearest) > unit).int()).clamp_(min=0)
    gaps = torch.cat([code_map.diff(), torch.ones_like(code_map[:1])])  # nothing is above the last entry
    rest = (unit - code_map.index_select(0, below)).div_(gaps.index_select(0, below))
    return below.add_(rest > noise.flatten())


@lru_cache(maxsize=32)
def _nearest_table(code_map: Tensor) -> tuple[Tensor, Tensor]:
    """For the upper 16 bits of a float32, plus 2**15: the lowest code it may get, and the midpoint to the next one."""
    entries = code_map.cpu()
    midpoints = (entries[1:] + entries[:-1]) / 2
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    ends = torch.stack([upper << 16, (upper << 16) + 0xFFFF]).view(torch.float32)
    first, last = torch.bucketize(ends, midpoints).sort(0).values
    if bool((last - first > 1)[ends[0].abs() <= 1].any()):
        raise ValueError("code_map has entries closer to each other than 1/128 of their size; leave some out")
    beyond = torch.cat([midpoints, torch.full((1,), torch.inf)])
    return first.to(code_map.device, torch.uint8), beyond[first].to(code_map.device)


def _outputs(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Memory for one code per element and one float32 per block."""
    numbers = torch.empty(*x.shape[:-1], -(-x.shape[-1] // block), dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device), numbers


def _pieces(elements: list[Tensor], numbers: list[Tensor], block: int) -> Iterator[list[Tensor]]:
    """Views `(rows, blocks, width)` of `elements (..., k)`, `(rows, blocks, 1)` of `numbers`, which has one per block.

    On CPU a piece and its temporaries stay in cache. The short block at the end is a piece of its own, so that nothing
    has to be padded.
    """
    elements, numbers = (
        [x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0) for x in xs] for xs in (elements, numbers)
    )
    b, k = elements[0].shape
    limit = PIECE if elements[0].device.type == "cpu" else max(1, b * k)
    for start, stop, width in ((0, k - k % block, block), (k - k % block, k, k % block)):
        if start == stop:
            continue
        views = [x[:, start:stop].view(b, (stop - start) // width, width) for x in elements]
        views += [x[:, start // block : -(-stop // block)].unsqueeze(-1) for x in numbers]
        rows, columns = max(1, limit // (stop - start)), max(1, limit // width)
        for row in range(0, b, rows):
            for column in range(0, views[0].shape[1], columns):
                yield [x[row : row + rows, column : column + columns] for x in views]
