"""Adam's direction from stored moments, for one tensor and for lists of tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..signatures import Mutated
from . import pieces
from .quantize import quantize_blockwise_
from .random import round_to_bfloat16_


def projected_adam_(
    exp_avg: Mutated,
    exp_avg_sq: Mutated,
    r: Mutated,
    beta1: float,
    beta2: float,
    eps: float,
    t: float,
    step: Tensor | None = None,
) -> None:
    """Update both moments by r, and overwrite r with Adam's direction.

    Args:
        t: the count of steps, this one included.
        step: a tensor of one number, which replaces t and is read on the device.
    """
    count: Any = t if step is None else step.view(()).double()
    gain, correction = 1 / (1 - beta1**count), 1 - beta2**count
    inverse = 1 / (correction.sqrt() if isinstance(correction, Tensor) else math.sqrt(correction))
    size = pieces.PIECE if r.device.type == "cpu" else max(1, r.numel())
    for m, v, x in zip(*(torch.split(tensor.view(-1), size) for tensor in (exp_avg, exp_avg_sq, r)), strict=True):
        _adam_(m, v, x, beta1, beta2, eps, gain, inverse)


def projected_adam_rows_(
    exp_avg: Mutated, exp_avg_sq: Mutated, r: Mutated, beta1: float, beta2: float, eps: float, ages: Tensor
) -> None:
    """Compute `projected_adam_` for rows with separate counts of steps: `ages`, one per row of r (..., n)."""
    count = ages.double().view(*r.shape[:-1], 1)
    gain, inverse = (x.to(r.dtype) for x in (1 / (1 - beta1**count), 1 / (1 - beta2**count).sqrt()))
    _adam_(exp_avg, exp_avg_sq, r, beta1, beta2, eps, gain, inverse)


def _adam_(m: Tensor, v: Tensor, x: Tensor, beta1: float, beta2: float, eps: float, gain: Any, inverse: Any) -> None:
    """Update moments m, v and overwrite x with `gain m / (inverse sqrt(v) + eps)`.

    Args:
        gain, inverse: the bias corrections `1 / (1 - beta1^t)` and `1 / sqrt(1 - beta2^t)`, as numbers or as tensors
            that broadcast.
    """
    scratch = x * (1 - beta1)
    m.mul_(beta1).add_(scratch)
    torch.mul(x, 1 - beta2, out=scratch)
    v.mul_(beta2).add_(scratch.mul_(x))
    torch.sqrt(v, out=scratch).mul_(inverse).add_(eps)
    torch.mul(m, gain, out=x).div_(scratch)


def projected_adam_list_(
    exp_avg: list[Mutated],
    exp_avg_sq: list[Mutated],
    r: list[Mutated],
    beta1: float,
    beta2: float,
    eps: float,
    t: float,
    step: Tensor | None = None,
) -> None:
    """Compute `projected_adam_` for each entry of the lists."""
    for m, v, x in zip(exp_avg, exp_avg_sq, r, strict=True):
        projected_adam_(m, v, x, beta1, beta2, eps, t, step)


def projected_adam_bfloat16_list_(
    exp_avg: list[Mutated],
    exp_avg_sq: list[Mutated],
    r: list[Mutated],
    beta1: float,
    beta2: float,
    eps: float,
    t: float,
    step: Tensor | None,
    key: list[int],
    purpose: int,
    purpose_sq: int,
    time: int,
    at: Tensor | None,
    start: list[int],
) -> None:
    """Compute `projected_adam_` for lists with moments in bfloat16, which are rounded stochastically.

    Args:
        key, start: tensor i is rounded by the elements from `start[i]` on of the streams of `key[i]`.
        purpose, purpose_sq, time: the streams of both moments, see `philox.stream_of`.
        at: a tensor of one integer, which replaces `time` and is read on the device.
    """
    for m, v, x, own, first in zip(exp_avg, exp_avg_sq, r, key, start, strict=True):
        size = pieces.PIECE if x.device.type == "cpu" else max(1, x.numel())
        cut = zip(*(torch.split(tensor.view(-1), size) for tensor in (m, v, x)), strict=True)
        for i, (small, small_sq, piece) in enumerate(cut):
            wide, wide_sq = small.float(), small_sq.float()
            projected_adam_(wide, wide_sq, piece, beta1, beta2, eps, t, step)
            round_to_bfloat16_(small, wide, own, purpose, time, at, first + i * size)
            round_to_bfloat16_(small_sq, wide_sq, own, purpose_sq, time, at, first + i * size)


def projected_adam_int8_list_(
    exp_avg: list[Mutated],
    peak: list[Mutated],
    exp_avg_sq: list[Mutated],
    peak_sq: list[Mutated],
    r: list[Mutated],
    code_map: Tensor,
    lower: Tensor,
    code_map_sq: Tensor,
    lower_sq: Tensor,
    block: int,
    beta1: float,
    beta2: float,
    eps: float,
    t: float,
    step: Tensor | None = None,
) -> None:
    """Compute `projected_adam_` for lists with moments in codes of 8 bits.

    The second moment never gets code 0, which would stand for 0: its update would explode.

    Args:
        exp_avg, exp_avg_sq: codes, like r.
        peak, peak_sq: (..., blocks), the element of the largest magnitude of each block, with its sign.
        code_map, code_map_sq: the numbers that codes stand for, as fractions of a peak.
        lower, lower_sq: the first part of `quantize._nearest_table` of each map.
        block: elements that share a peak.
    """
    maps = [(table, low, _midpoints(table, low)) for table, low in ((code_map, lower), (code_map_sq, lower_sq))]
    for m, m_peak, v, v_peak, x in zip(exp_avg, peak, exp_avg_sq, peak_sq, r, strict=True):
        rows = math.prod(m_peak.shape[:-1])
        if not x.numel():
            continue
        elements, numbers = [one.view(rows, -1) for one in (m, v, x)], [one.view(rows, -1) for one in (m_peak, v_peak)]
        for codes, codes_sq, place, top, top_sq in pieces.block_pieces(elements, numbers, block):
            stored = (codes, top), (codes_sq, top_sq)
            wide, wide_sq = (
                table.index_select(0, code.flatten().int()).view(code.shape).mul_(largest)
                for (code, largest), (table, _, _) in zip(stored, maps, strict=True)
            )
            d = place.contiguous()  # pieces of several rows have gaps
            projected_adam_(wide, wide_sq, d, beta1, beta2, eps, t, step)
            place.copy_(d)
            for (code, largest), opened, (table, low, middle) in zip(stored, (wide, wide_sq), maps, strict=True):
                # Operators take no views with gaps: codes are made in tensors of their own, and copied.
                fresh, peaks = torch.empty_like(opened, dtype=torch.uint8), torch.empty_like(largest)
                quantize_blockwise_(fresh, peaks, opened, table, low, middle, block, True)
                code.copy_(fresh)
                largest.copy_(peaks)
            codes_sq.clamp_(min=1)


def _midpoints(code_map: Tensor, lower: Tensor) -> Tensor:
    """Return the midpoint between each entry of `lower` and the next entry of the map: (65536,)."""
    beyond = torch.cat([(code_map[1:] + code_map[:-1]) / 2, torch.full_like(code_map[:1], math.inf)])
    return beyond.index_select(0, lower.int())
