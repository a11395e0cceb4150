"""Stochastic rounding from float32 to bfloat16, with which small updates survive on average."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import Places, Stream, numbers_of, random_bits16
from .schema import kernel


def round_to_bfloat16(x: Tensor, key: int, stream: Stream, start: int | Places = 0) -> Tensor:
    """Round each element up or down, with probabilities by distance such that `E[result] = x`.

    Infinities and numbers that bfloat16 holds stay unchanged.

    Args:
        x: float32, any shape. Its elements are numbered in row-major order from `start` on, or as `Places` says.
        key, stream: select the noise, so that all runs, devices and shards round alike.
    """
    if isinstance(start, Places):
        bits = random_bits16(x.numel(), key, stream, start, x.device).view(x.shape)
        bits.add_(x.contiguous().view(torch.int32)).bitwise_and_(-65536)
        return bits.view(torch.float32).to(torch.bfloat16)
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    kernel("round_to_bfloat16_")(out, x.contiguous(), *numbers_of(key, stream), start)
    return out
