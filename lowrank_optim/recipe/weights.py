"""How a weight is stored: the dtype that it is worked on in, and weights that store themselves in fewer bits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

WEIGHT = "weight"
COMPENSATION = "compensation"  # what bf16_update="kahan" could not write into the weight


def working_dtype(p: Tensor) -> torch.dtype:
    """float32, or float64 for float64 parameters."""
    return torch.promote_types(p.dtype, torch.float32)


def is_packed(p: Tensor) -> bool:
    """A weight that keeps itself in fewer bits (`layers/quantized.py`) and does its own rounding."""
    return hasattr(p, "pack_")


def unpacked(p: Tensor, working: torch.dtype) -> Tensor:
    if is_packed(p):
        return cast(Tensor, cast(Any, p).unpack(working))
    return p if p.dtype == working else p.to(working)
