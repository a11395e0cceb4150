"""How are tensors kept between steps?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..ops import quantize, round_to_bfloat16
from ..recipe.store import Kept, Noise, Shape, Spec, Store


@dataclass(frozen=True)
class Float32(Store):
    """As they are: float32, or float64 for float64 parameters."""

    narrow: ClassVar[bool] = False

    def layout(self, shape: Shape, working: torch.dtype) -> tuple[Kept, ...]:
        return (Kept(shape, working),)

    def read(self, kept: Mapping[str, Tensor], shape: Shape, working: torch.dtype) -> Tensor:
        x = kept[""]
        return x if x.dtype == working else x.to(working)

    def write_(self, kept: Mapping[str, Tensor], x: Tensor, noise: Noise | None) -> None:
        kept[""].copy_(x)


@dataclass(frozen=True)
class BFloat16(Store):
    """Half the bytes, rounded stochastically.

    Rounded to nearest, a second moment with beta2 = 0.999 never decays: 0.1 % is less than half of bfloat16's last bit.
    Unbiased rounding keeps the average right.

    Args:
        widen_small: keep vectors and small matrices in float32, as the stores in fewer bits do.
    """

    widen_small: bool = False

    def small(self) -> Store:
        return Float32() if self.widen_small else self

    def layout(self, shape: Shape, working: torch.dtype) -> tuple[Kept, ...]:
        return (Kept(shape, torch.bfloat16),)

    def read(self, kept: Mapping[str, Tensor], shape: Shape, working: torch.dtype) -> Tensor:
        return kept[""].to(working)

    def write_(self, kept: Mapping[str, Tensor], x: Tensor, noise: Noise | None) -> None:
        kept[""].copy_(x if noise is None else round_to_bfloat16(x.float(), *noise))


@dataclass(frozen=True)
class _Quantized(Store):
    """Codes, and some numbers per block. Blocks run along the row-major order of one matrix and never cross it."""

    def small(self) -> Store:
        return Float32()

    def _layout(self, shape: Shape, codes_per_byte: int, numbers: int) -> tuple[Kept, ...]:
        size = math.prod(shape)
        packed = shape if codes_per_byte == 1 else (-(-size // codes_per_byte),)
        per_block = Kept((-(-size // self.block),), torch.float32, self.block)
        return (Kept(packed, torch.uint8, codes_per_byte), *[per_block] * numbers)


@dataclass(frozen=True)
class Int8(_Quantized):
    """One byte per element and a float32 per 256: the nearest entry of the dynamic map (Dettmers et al. 2022).

    The number of a block is its largest element with its sign, so that the peak comes back exactly, and a block of
    moments grows and decays as one. A second moment is never rounded to zero: its first moment spans only the square
    root of its range, would not vanish with it, and be divided by eps alone. It becomes the smallest positive entry
    instead, and the update is small.
    """

    unsigned: bool = False
    suffixes: ClassVar[tuple[str, ...]] = ("", "_peak")
    block: ClassVar[int] = 256

    def of(self, spec: Spec) -> Store:
        return replace(self, unsigned=spec.unsigned)

    def layout(self, shape: Shape, working: torch.dtype) -> tuple[Kept, ...]:
        return self._layout(shape, 1, 1)

    def read(self, kept: Mapping[str, Tensor], shape: Shape, working: torch.dtype) -> Tensor:
        codes, levels = _flat(kept[""], shape), quantize.dynamic_map(not self.unsigned, kept[""].device)
        x = quantize.dequantize_blockwise(codes, kept["_peak"], levels, self.block, working)
        return x.view(kept[""].shape)

    def write_(self, kept: Mapping[str, Tensor], x: Tensor, noise: Noise | None) -> None:
        flat = x.reshape(*kept["_peak"].shape[:-1], -1)
        levels = quantize.dynamic_map(not self.unsigned, x.device)
        codes, peak = quantize.quantize_blockwise(flat, levels, self.block, signed_peak=True)
        if self.unsigned:
            codes.clamp_(min=1)
        kept[""].copy_(codes.view(kept[""].shape))
        kept["_peak"].copy_(peak)


@dataclass(frozen=True)
class Int4(_Quantized):
    """Half a byte per element and a float32 per 128, the block's largest element with its sign.

    First moments go to the nearest entry of a map of three decades. Second moments go to k / 16, stochastically: what a
    step adds to them is far below a sixteenth, and would be lost. There is no zero among their levels: a block keeps
    at least 1/16 of its largest entry in each, so that no entry is divided by nothing.
    """

    unsigned: bool = False
    suffixes: ClassVar[tuple[str, ...]] = ("", "_peak")
    block: ClassVar[int] = 128

    def of(self, spec: Spec) -> Store:
        return replace(self, unsigned=spec.unsigned)

    def layout(self, shape: Shape, working: torch.dtype) -> tuple[Kept, ...]:
        return self._layout(shape, 2, 1)

    def read(self, kept: Mapping[str, Tensor], shape: Shape, working: torch.dtype) -> Tensor:
        codes = quantize.unpack4(kept[""], math.prod(shape))
        levels = quantize.four_bit_map(not self.unsigned, kept[""].device)
        x = quantize.dequantize_blockwise(codes, kept["_peak"], levels, self.block, working)
        return x.view(*kept[""].shape[:-1], *shape)

    def write_(self, kept: Mapping[str, Tensor], x: Tensor, noise: Noise | None) -> None:
        flat = x.reshape(*kept["_peak"].shape[:-1], -1)
        if self.unsigned:
            dither = None if noise is None else quantize.uniform_noise(tuple(flat.shape), *noise, device=x.device)
            codes, peak = quantize.quantize_sixteenths(flat, self.block, dither)
        else:
            levels = quantize.four_bit_map(True, x.device)
            codes, peak = quantize.quantize_blockwise(flat, levels, self.block, signed_peak=True)
        kept[""].copy_(quantize.pack4(codes))
        kept["_peak"].copy_(peak)


@dataclass(frozen=True)
class Affine(_Quantized):
    """Equal steps between the least and the largest element of each 256: for numbers whose size varies little.

    Q-GaLore's bases and DCT-AdamW's error feedback. Least and step are floats, so a block that does not straddle zero
    keeps its values, which a clamped integer zero point destroys.
    """

    bits: int
    suffixes: ClassVar[tuple[str, ...]] = ("", "_scale", "_low")
    block: ClassVar[int] = 256

    def layout(self, shape: Shape, working: torch.dtype) -> tuple[Kept, ...]:
        return self._layout(shape, 8 // self.bits, 2)

    def read(self, kept: Mapping[str, Tensor], shape: Shape, working: torch.dtype) -> Tensor:
        codes = quantize.unpack4(kept[""], math.prod(shape)) if self.bits == 4 else _flat(kept[""], shape)
        x = quantize.dequantize_affine(codes, kept["_scale"], kept["_low"], self.block, working)
        return x.view(*kept["_scale"].shape[:-1], *shape)

    def write_(self, kept: Mapping[str, Tensor], x: Tensor, noise: Noise | None) -> None:
        flat = x.reshape(*kept["_scale"].shape[:-1], -1)
        codes, scale, low = quantize.quantize_affine(flat, self.bits, self.block)
        kept[""].copy_(quantize.pack4(codes) if self.bits == 4 else codes.view(kept[""].shape))
        kept["_scale"].copy_(scale)
        kept["_low"].copy_(low)


def _flat(codes: Tensor, shape: Shape) -> Tensor:
    return codes.reshape(*codes.shape[: codes.dim() - len(shape)], -1)


STORES: dict[str, Store] = {"float32": Float32(), "bfloat16": BFloat16(), "int8": Int8(), "int4": Int4()}
