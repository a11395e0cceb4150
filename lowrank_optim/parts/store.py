"""How are tensors kept between steps?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import round_to_bfloat16
from ..ops.philox import Stream


@dataclass(frozen=True)
class Float32:
    """As they are: float32, or float64 for float64 parameters."""

    def dtype(self, working: torch.dtype) -> torch.dtype:
        return working

    def close_(self, kept: Tensor, x: Tensor, key: int, stream: Stream, start: int) -> None:
        kept.copy_(x)


@dataclass(frozen=True)
class BFloat16:
    """Half the bytes, rounded stochastically.

    Rounded to nearest, a second moment with beta2 = 0.999 never decays: 0.1 % is less than half of bfloat16's last bit.
    Unbiased rounding keeps the average right.
    """

    def dtype(self, working: torch.dtype) -> torch.dtype:
        return torch.bfloat16

    def close_(self, kept: Tensor, x: Tensor, key: int, stream: Stream, start: int) -> None:
        kept.copy_(round_to_bfloat16(x.float(), key, stream, start))
