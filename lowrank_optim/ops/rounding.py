"""One rounding from float32 to bfloat16, stochastic so that small updates survive on average."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import Places, Stream, numbers_of, random_bits16
from .schema import kernel


def round_to_bfloat16(x: Tensor, key: int, stream: Stream, start: int | Places = 0) -> Tensor:
    """Rounds each element up or down with probability proportional to its distance: `E[result] = x`.

    Args:
        x: float32, any shape; its elements are numbered in row-major order from `start`, or as `Places` says.
        key, stream: what the noise is a function of, so that every run, device and shard rounds alike.

    Infinities stay, a number already in bfloat16 is returned unchanged.
    """
    if isinstance(start, Places):
        bits = random_bits16(x.numel(), key, stream, start, x.device).view(x.shape)
        bits.add_(x.contiguous().view(torch.int32)).bitwise_and_(-65536)
        return bits.view(torch.float32).to(torch.bfloat16)
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    kernel("round_to_bfloat16_")(out, x.contiguous(), *numbers_of(key, stream), start)
    return out
