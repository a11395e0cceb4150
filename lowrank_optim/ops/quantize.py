"""Blockwise quantization to 8 and 4 bits: to a map of values (states, NF4 weights) or a uniform grid (weights).

The last dimension of every tensor here is one flattened matrix of k elements, cut into blocks of `block`; the last
block may be short. Leading dimensions are a batch, so a block never reaches into another matrix and a batch gives what
its matrices would give one by one.

References: Dettmers et al., "8-bit optimizers via block-wise quantization", ICLR 2022; Li et al., "Memory efficient
optimizers with 4-bit states", NeurIPS 2023; Dettmers et al., "QLoRA: efficient finetuning of quantized LLMs", NeurIPS
2023.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .philox import Places, Stream, numbers_of, random_bits16
from .reference.pieces import PIECE
from .schema import kernel

__all__ = [
    "PIECE",
    "dequantize_affine",
    "dequantize_blockwise",
    "dynamic_levels",
    "dynamic_map",
    "four_bit_map",
    "nf4_map",
    "pack4",
    "quantize_affine",
    "quantize_blockwise",
    "quantize_sixteenths",
    "uniform_noise",
    "unpack4",
]

_CPU = torch.device("cpu")
_TABLE: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are: tables are cached
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
def dynamic_levels(signed: bool, device: torch.device = _CPU) -> tuple[Tensor, Tensor]:
    """`dynamic_map` and, for the upper 16 bits of a float32 plus 2**15, the lowest code it may get: for kernels."""
    code_map = dynamic_map(signed, device)
    return code_map, _nearest_table(code_map)[0]


@lru_cache(maxsize=32)
def four_bit_map(signed: bool, device: torch.device = _CPU) -> Tensor:
    """16 values in ascending order. Signed: the dynamic map of three decades. Unsigned: k / 16 for k = 1 ... 16.

    There is no zero in the unsigned one on purpose: a second moment that rounds to 0 would make its update explode.
    """
    return (_dynamic(signed, decades=3) if signed else torch.arange(1.0, 17.0, **_TABLE) / 16).to(device)


def nf4_map(device: torch.device = _CPU) -> Tensor:
    """NormalFloat: 16 quantiles of the normal distribution over their largest, in ascending order; zero at index 7.

    The numbers that the QLoRA paper prints. Both 1 and -1 are there, so the peak of a block is exact.
    """
    # What is traced must not meet a tensor from outside of the graph, nor leave one of its own behind.
    return _made_nf4(device) if torch.compiler.is_compiling() else _nf4_map(device)


def _made_nf4(device: torch.device) -> Tensor:
    return torch.tensor(_NF4, dtype=torch.float32, device=device)


_nf4_map = lru_cache(maxsize=32)(_made_nf4)


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
    if not x.is_meta:
        lower, midpoint = _nearest_table(code_map)
        quantize = kernel("quantize_blockwise_")
        quantize(codes, absmax, _input(x), code_map, lower, midpoint, block, signed_peak, _noise(noise))
    return codes, absmax


def quantize_sixteenths(x: Tensor, block: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Non-negative numbers in sixteenths of their block's largest: `four_bit_map(signed=False)`, from 1 to 16.

    Args:
        noise: uniform in [0, 1), of x's shape: then `E[result] = x` from one sixteenth on. None rounds to nearest.

    Returns:
        `codes (..., k)` uint8 and the largest of each block `(..., ceil(k / block))`, float32.
    """
    codes, largest = _outputs(x, block)
    kernel("quantize_sixteenths_")(codes, largest, _input(x), block, _noise(noise))
    return codes, largest


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code_map: Tensor, block: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The inverse of `quantize_blockwise` up to rounding, `(..., k)`."""
    x = _output(codes, dtype)
    kernel("dequantize_blockwise_")(x, codes.contiguous(), absmax.contiguous(), code_map, block)
    return x.to(dtype)


def pack4(codes: Tensor) -> Tensor:
    """Two codes below 16 to a byte, the first in the lower half: `(..., k)` to `(..., ceil(k / 2))`."""
    packed = codes.new_empty(*codes.shape[:-1], -(-codes.shape[-1] // 2))
    kernel("pack4_")(packed, codes.contiguous())
    return packed


def unpack4(packed: Tensor, k: int) -> Tensor:
    """The `k` codes of `pack4`."""
    codes = packed.new_empty(*packed.shape[:-1], k)
    kernel("unpack4_")(codes, packed.contiguous())
    return codes


def uniform_noise(
    shape: tuple[int, ...], key: int, stream: Stream, start: int | Places = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform numbers in (0, 1) for stochastic rounding: the midpoints of 65536 equal cells, numbered from `start`."""
    if isinstance(start, Places):
        bits = random_bits16(torch.Size(shape).numel(), key, stream, start, device)
        return bits.float().add_(0.5).mul_(2.0**-16).view(shape)
    out = torch.empty(shape, dtype=torch.float32, device=device)
    kernel("philox_noise16_")(out, *numbers_of(key, stream), start)
    return out


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
    low = torch.empty_like(scale)
    kernel("quantize_affine_")(codes, scale, low, _input(x), bits, block, _noise(noise))
    return codes, scale, low


def dequantize_affine(
    codes: Tensor, scale: Tensor, low: Tensor, block: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The inverse of `quantize_affine` up to rounding, `(..., k)`."""
    x = _output(codes, dtype)
    kernel("dequantize_affine_")(x, codes.contiguous(), scale.contiguous(), low.contiguous(), block)
    return x.to(dtype)


def _dynamic(signed: bool, decades: int) -> Tensor:
    """Each decade is cut into equal parts, twice as many as the decade below it; its values are their midpoints."""
    values = [torch.tensor([0.0, 1.0], **_TABLE)]
    for i in range(decades):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, **_TABLE)
        middle = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i + 1 - decades)
        values += [middle, -middle] if signed else [middle]
    return torch.cat(values).sort().values


@lru_cache(maxsize=32)
def _nearest_table(code_map: Tensor) -> tuple[Tensor, Tensor]:
    """For the upper 16 bits of a float32, plus 2**15: the lowest code it may get, and the midpoint to the next one."""
    entries = code_map.cpu()
    midpoints = (entries[1:] + entries[:-1]) / 2
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device="cpu")
    ends = torch.stack([upper << 16, (upper << 16) + 0xFFFF]).view(torch.float32)
    first, last = torch.bucketize(ends, midpoints).sort(0).values
    if bool((last - first > 1)[ends[0].abs() <= 1].any()):
        raise ValueError("code_map has entries closer to each other than 1/128 of their size; leave some out")
    beyond = torch.cat([midpoints, torch.full((1,), torch.inf, **_TABLE)])
    return first.to(code_map.device, torch.uint8), beyond[first].to(code_map.device)


def _outputs(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Memory for one code per element and one float32 per block."""
    numbers = torch.empty(*x.shape[:-1], -(-x.shape[-1] // block), dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device), numbers


_KERNELS = (torch.float32, torch.bfloat16)  # what operators read and write; others go through float32


def _input(x: Tensor) -> Tensor:
    return (x if x.dtype in _KERNELS else x.float()).contiguous()


def _noise(noise: Tensor | None) -> Tensor | None:
    return None if noise is None else noise.float().contiguous()


def _output(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(codes.shape, dtype=dtype if dtype in _KERNELS else torch.float32, device=codes.device)
