"""Blockwise quantization to 8 and 4 bits: to a map of values (states, NF4 weights) or a uniform grid (weights).

The last dimension of every tensor here is a flattened matrix of k elements, cut into blocks of `block` elements; the
last block may be short. Leading dimensions are a batch. A block never reaches into another matrix, so a batch gives the
same codes as its matrices would give separately.

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
_TABLE: Any = {
    "dtype": torch.float32,
    "device": "cpu",
}  # explicit, because tables are cached and torch's defaults may change
_NF4 = (
    *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.091050036, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)


@lru_cache(maxsize=32)
def dynamic_map(signed: bool, device: torch.device = _CPU) -> Tensor:
    """Return 256 values in ascending order, dense near 0: seven decades, the top decade resolved to 1 %.

    Args:
        signed: for first moments, with zero at index 127, 1 and no -1. The unsigned map, for second moments, has zero
            at index 0.
    """
    return _dynamic(signed, decades=7).to(device)


@lru_cache(maxsize=32)
def dynamic_levels(signed: bool, device: torch.device = _CPU) -> tuple[Tensor, Tensor]:
    """Return `dynamic_map` and a table for kernels (65536,): the lowest code of numbers with given upper 16 bits."""
    code_map = dynamic_map(signed, device)
    return code_map, _nearest_table(code_map)[0]


@lru_cache(maxsize=32)
def four_bit_map(signed: bool, device: torch.device = _CPU) -> Tensor:
    """Return 16 values in ascending order.

    The signed map is the dynamic map of three decades. The unsigned map is k / 16 for k = 1 ... 16. It has no zero,
    because a second moment that is rounded to 0 would make its update explode.
    """
    return (_dynamic(signed, decades=3) if signed else torch.arange(1.0, 17.0, **_TABLE) / 16).to(device)


def nf4_map(device: torch.device = _CPU) -> Tensor:
    """Return NormalFloat: 16 quantiles of the normal distribution divided by the largest, ascending; zero at index 7.

    These are the numbers that the QLoRA paper prints. They include 1 and -1, so the peak of a block is exact.
    """
    # A traced graph must neither read a cached tensor from outside nor leave a tensor of its own in the cache.
    return _made_nf4(device) if torch.compiler.is_compiling() else _nf4_map(device)


def _made_nf4(device: torch.device) -> Tensor:
    return torch.tensor(_NF4, dtype=torch.float32, device=device)


_nf4_map = lru_cache(maxsize=32)(_made_nf4)


def quantize_blockwise(
    x: Tensor, code_map: Tensor, block: int, signed_peak: bool = False, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the code of the map entry nearest to each element, divided by the largest magnitude of its block.

    Args:
        x: (..., k), any floating-point dtype, finite.
        code_map: at most 256 ascending values in [-1, 1].
        block: elements that share one `absmax`.
        signed_peak: give `absmax` the sign of the largest element, whose quotient then is 1. Signed maps have 1 and no
            -1, so a block with a negative peak would otherwise lose a part of the peak at each write.
        noise: uniform in (0, 1), like x, for stochastic rounding: an element gets the entry above if the noise is less
            than its distance from the entry below, divided by their gap. Then `E[result] = x` inside the range of the
            map. None rounds to nearest.

    Returns:
        Codes (..., k), uint8, and `absmax` (..., ceil(k / block)), float32. An element half-way between two entries
        gets the lower one.
    """
    codes, absmax = _outputs(x, block)
    if not x.is_meta:
        lower, midpoint = _nearest_table(code_map)
        quantize = kernel("quantize_blockwise_")
        quantize(codes, absmax, _input(x), code_map, lower, midpoint, block, signed_peak, _noise(noise))
    return codes, absmax


def quantize_sixteenths(x: Tensor, block: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return codes of non-negative numbers in sixteenths of the largest number of their block, from 1 to 16.

    They are codes of `four_bit_map(signed=False)`.

    Args:
        x: (..., k).
        block: elements that share a largest number.
        noise: uniform in [0, 1), like x. Then `E[result] = x` from one sixteenth on. None rounds to nearest.

    Returns:
        Codes (..., k), uint8, and the largest number of each block (..., ceil(k / block)), float32.
    """
    codes, largest = _outputs(x, block)
    kernel("quantize_sixteenths_")(codes, largest, _input(x), block, _noise(noise))
    return codes, largest


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code_map: Tensor, block: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the numbers (..., k) that `quantize_blockwise` has rounded."""
    x = _output(codes, dtype)
    kernel("dequantize_blockwise_")(x, codes.contiguous(), absmax.contiguous(), code_map, block)
    return x.to(dtype)


def pack4(codes: Tensor) -> Tensor:
    """Pack two codes below 16 into each byte, the first in the lower half: (..., k) to (..., ceil(k / 2))."""
    packed = codes.new_empty(*codes.shape[:-1], -(-codes.shape[-1] // 2))
    kernel("pack4_")(packed, codes.contiguous())
    return packed


def unpack4(packed: Tensor, k: int) -> Tensor:
    """Return the k codes (..., k) that `pack4` has packed."""
    codes = packed.new_empty(*packed.shape[:-1], k)
    kernel("unpack4_")(codes, packed.contiguous())
    return codes


def uniform_noise(
    shape: tuple[int, ...], key: int, stream: Stream, start: int | Places = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Return uniform numbers in (0, 1) for stochastic rounding: the midpoints of 65536 equal cells.

    They are elements of the stream from `start` on, or at `Places`.
    """
    if isinstance(start, Places):
        bits = random_bits16(torch.Size(shape).numel(), key, stream, start, device)
        return bits.float().add_(0.5).mul_(2.0**-16).view(shape)
    out = torch.empty(shape, dtype=torch.float32, device=device)
    kernel("philox_noise16_")(out, *numbers_of(key, stream), start)
    return out


def quantize_affine(x: Tensor, bits: int, block: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Round each element to a uniform grid from the minimum to the maximum of its block.

    The grid starts at a number and not at a whole multiple of its step. In 8 bits such a multiple would have to be
    clamped for blocks that do not contain 0, which would destroy them.

    Args:
        x: (..., k), any floating-point dtype, finite.
        bits: the bits of a code, at most 8.
        block: elements that share a grid.
        noise: uniform in [0, 1), like x. An element is rounded up if the noise is less than its distance from the lower
            grid point, in steps. Then `E[result] = x`. None rounds to nearest.

    Returns:
        Codes (..., k), uint8; the step of each block and its minimum, (..., ceil(k / block)), float32. An error is at
        most half a step.
    """
    codes, scale = _outputs(x, block)
    low = torch.empty_like(scale)
    kernel("quantize_affine_")(codes, scale, low, _input(x), bits, block, _noise(noise))
    return codes, scale, low


def dequantize_affine(
    codes: Tensor, scale: Tensor, low: Tensor, block: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the numbers (..., k) that `quantize_affine` has rounded."""
    x = _output(codes, dtype)
    kernel("dequantize_affine_")(x, codes.contiguous(), scale.contiguous(), low.contiguous(), block)
    return x.to(dtype)


def _dynamic(signed: bool, decades: int) -> Tensor:
    """Return 0, 1 and the midpoints of equal parts of each decade. A decade has twice the parts of the decade below."""
    values = [torch.tensor([0.0, 1.0], **_TABLE)]
    for i in range(decades):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, **_TABLE)
        middle = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i + 1 - decades)
        values += [middle, -middle] if signed else [middle]
    return torch.cat(values).sort().values


@lru_cache(maxsize=32)
def _nearest_table(code_map: Tensor) -> tuple[Tensor, Tensor]:
    """Return the table by which kernels find the entry nearest to a float32: two tensors (65536,).

    The position is given by the upper 16 bits of the number as a signed integer, plus 2**15. The table has the lowest
    code that numbers with these bits may get, and the midpoint between its entry and the next one.
    """
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
    """Return uninitialized tensors for a code per element and a float32 per block."""
    numbers = torch.empty(*x.shape[:-1], -(-x.shape[-1] // block), dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device), numbers


_KERNELS = (
    torch.float32,
    torch.bfloat16,
)  # dtypes that operators read and write; other dtypes are converted to float32


def _input(x: Tensor) -> Tensor:
    return (x if x.dtype in _KERNELS else x.float()).contiguous()


def _noise(noise: Tensor | None) -> Tensor | None:
    return None if noise is None else noise.float().contiguous()


def _output(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(codes.shape, dtype=dtype if dtype in _KERNELS else torch.float32, device=codes.device)
