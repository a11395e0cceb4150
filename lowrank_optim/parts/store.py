"""Fill the slot "how are tensors kept between steps?" with stores of 32 to 4 bits per element."""

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
    """Tensors in the dtype of the arithmetic: float32, or float64 for float64 parameters."""

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
    """Tensors in bfloat16, rounded stochastically.

    Rounded to nearest, a second moment with beta2 = 0.999 would never decay, because 0.1 % is less than half of
    bfloat16's last bit. Unbiased rounding keeps the average right.

    Args:
        widen_small: whether vectors and small matrices stay in float32, as in the stores of fewer bits.
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
    """The stores that keep codes and a few float32 numbers per block of elements.

    Blocks follow the row-major order of one matrix, and no block spans two matrices.
    """

    def small(self) -> Store:
        return Float32()

    def _layout(self, shape: Shape, codes_per_byte: int, numbers: int) -> tuple[Kept, ...]:
        """Return the layout for bytes of codes and so many float32 numbers per block."""
        size = math.prod(shape)
        packed = shape if codes_per_byte == 1 else (-(-size // codes_per_byte),)
        per_block = Kept((-(-size // self.block),), torch.float32, self.block)
        return (Kept(packed, torch.uint8, codes_per_byte), *[per_block] * numbers)


@dataclass(frozen=True)
class Int8(_Quantized):
    """Tensors in int8: a code per element, the nearest entry of the dynamic map (Dettmers et al. 2022).

    Each block of 256 elements also keeps a float32, its peak: the largest element with its sign. The peak therefore
    comes back exactly, and a block of moments grows and decays as a whole.

    A second moment is never rounded to zero. Its first moment spans only the square root of its range, so it would not
    vanish at the same time, and would be divided by eps alone. The second moment becomes the smallest positive entry
    instead, which makes the update small.

    Args:
        unsigned: whether the tensor is never negative, as second moments are.
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
    """Tensors in int4: half a byte per element, and a float32 per block of 128, its largest element with its sign.

    First moments are rounded to the nearest entry of a map of three decades. Second moments are rounded to k / 16 of
    the peak stochastically, because a step adds far less than a sixteenth, which rounding to nearest would lose. Their
    levels contain no zero: each entry keeps at least 1/16 of the peak of its block, so no update is divided by zero.

    Args:
        unsigned: whether the tensor is never negative, as second moments are.
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
    """Tensors in equal steps between the least and the largest element of each block of 256.

    This suits numbers of similar size: Q-GaLore's bases and DCT-AdamW's error feedback. The least element and the step
    are floats, so a block whose elements all have one sign keeps its values. An integer zero point that is clamped, as
    in the published code, destroys such a block.

    Args:
        bits: 8 or 4 per element.
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
    """Return codes `(..., *shape)` as `(..., elements)`."""
    return codes.reshape(*codes.shape[: codes.dim() - len(shape)], -1)


STORES: dict[str, Store] = {"float32": Float32(), "bfloat16": BFloat16(), "int8": Int8(), "int4": Int4()}
