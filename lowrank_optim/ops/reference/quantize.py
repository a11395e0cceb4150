"""Blockwise codes: of a map, of a uniform grid and in sixteenths; and two codes packed into a byte.

Tensors are (..., k), with ceil(k / block) blocks per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..signatures import Mutated
from . import pieces

_TINY = torch.finfo(torch.float32).tiny


def quantize_blockwise_(
    codes: Mutated,
    absmax: Mutated,
    x: Tensor,
    code_map: Tensor,
    lower: Tensor,
    midpoint: Tensor,
    block: int,
    signed_peak: bool = False,
    noise: Tensor | None = None,
) -> None:
    """Write the codes of the map's entries nearest to x, and the largest magnitude of each block.

    Args:
        lower, midpoint: the table that `quantize._nearest_table` makes of the map.
        signed_peak: give `absmax` the sign of the largest element.
        noise: round stochastically, see `quantize.quantize_blockwise`.
    """
    for blocks, code, *dither, peak in pieces.block_pieces(
        [x, codes] if noise is None else [x, codes, noise], [absmax], block
    ):
        blocks = blocks.float()
        top, bottom = blocks.amax(-1, True), blocks.amin(-1, True)
        largest = torch.maximum(top, -bottom)
        peak.copy_(torch.where(-bottom > top, bottom, top) if signed_peak else largest)
        unit = (blocks / torch.where(largest < _TINY, _TINY, peak)).flatten()
        # The upper half of a float32 leaves two candidate entries. `bucketize` would be 20 times slower than a look-up.
        upper = (unit.view(torch.int32) >> 16).add_(1 << 15)
        higher = (unit > midpoint.index_select(0, upper)).view(torch.uint8)
        nearest = lower.index_select(0, upper).add_(higher)
        code.copy_((_dithered(unit, nearest, code_map, dither[0]) if dither else nearest).view(code.shape))


def _dithered(unit: Tensor, nearest: Tensor, code_map: Tensor, noise: Tensor) -> Tensor:
    """Return the entry below each number or the next one, with probabilities by distance.

    Noise is never 0 or 1, so a number that is one rounding error away from an entry gets that entry.
    """
    nearest = nearest.int()
    below = (nearest - (code_map.index_select(0, nearest) > unit).int()).clamp_(min=0)
    gaps = torch.cat([code_map.diff(), torch.ones_like(code_map[:1])])  # the last entry has no next one
    rest = (unit - code_map.index_select(0, below)).div_(gaps.index_select(0, below))
    return below.add_(rest > noise.flatten())


def quantize_affine_(
    codes: Mutated, scale: Mutated, low: Mutated, x: Tensor, bits: int, block: int, noise: Tensor | None = None
) -> None:
    """Write codes that count equal steps from the least to the largest element of each block, and step and least."""
    most = 2**bits - 1
    tensors, steps = [x, codes] if noise is None else [x, codes, noise], torch.full((), most, device=x.device)
    for blocks, code, *dither, step, least in pieces.block_pieces(tensors, [scale, low], block):
        blocks = blocks.float()
        least.copy_(blocks.amin(-1, True))
        # Divided by a tensor, because accelerators multiply by the inverse of a number. The least step of `_TINY` makes
        # all codes of a constant block 0, so that the block keeps its value.
        step.copy_((blocks.amax(-1, True) - least).div_(steps).clamp_(min=_TINY))
        places = (blocks - least).div_(step)
        if not dither:
            places.add_(0.5).floor_()
        else:  # noise is compared and not added, because the rounding of a sum would move numbers that are on the grid
            rest = places.frac()
            places.floor_().add_(rest > dither[0])
        code.copy_(places.clamp_(max=most))


def quantize_sixteenths_(codes: Mutated, largest: Mutated, x: Tensor, block: int, noise: Tensor | None = None) -> None:
    """Write codes 0 to 15, which count sixteenths of the largest element of each block from 1 to 16."""
    for blocks, code, *dither, peak in pieces.block_pieces(
        [x, codes] if noise is None else [x, codes, noise], [largest], block
    ):
        blocks = blocks.float()
        peak.copy_(blocks.amax(-1, True))
        places = (blocks / peak.clamp(min=_TINY)).mul_(16)
        rest = places.frac()
        places.floor_().add_(rest > dither[0] if dither else rest >= 0.5)
        code.copy_(places.clamp_(1, 16).sub_(1))


def dequantize_blockwise_(x: Mutated, codes: Tensor, absmax: Tensor, code_map: Tensor, block: int) -> None:
    """Write the entries of the map times the number of their block into x."""
    for code, target, peak in pieces.block_pieces([codes, x], [absmax], block):
        target.copy_(code_map.index_select(0, code.flatten().int()).view(code.shape).mul_(peak))


def dequantize_affine_(x: Mutated, codes: Tensor, scale: Tensor, low: Tensor, block: int) -> None:
    """Write the least element of each block plus its steps into x."""
    for code, target, step, least in pieces.block_pieces([codes, x], [scale, low], block):
        target.copy_(code.float().mul_(step).add_(least))


def pack4_(packed: Mutated, codes: Tensor) -> None:
    """Write two codes below 16 into each byte, the first one into the lower half."""
    pairs = codes.shape[-1] // 2
    torch.bitwise_left_shift(codes[..., 1::2], 4, out=packed[..., :pairs])
    packed[..., :pairs].bitwise_or_(codes[..., : 2 * pairs : 2])
    packed[..., pairs:] = codes[..., 2 * pairs :]


def unpack4_(codes: Mutated, packed: Tensor) -> None:
    """Write the codes that `pack4_` has packed."""
    codes[..., ::2] = packed & 15
    codes[..., 1::2] = packed[..., : codes.shape[-1] // 2] >> 4
