"""Tell how a weight is stored: the dtype of its arithmetic, and weights that store themselves in fewer bits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

WEIGHT = "weight"  # purpose of the random numbers that round a weight
COMPENSATION = "compensation"  # state key: the rounding error of the weight, which bf16_update="kahan" keeps


def working_dtype(p: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic on a parameter: float32, or float64 for float64 parameters."""
    return torch.promote_types(p.dtype, torch.float32)


def is_packed(p: Tensor) -> bool:
    """Whether a weight stores itself in fewer bits (`layers/quantized.py`) and does its own rounding."""
    return hasattr(p, "pack_")


def unpacked(p: Tensor, working: torch.dtype) -> Tensor:
    """Return the values of a weight in the dtype `working`, without a copy where it already has that dtype."""
    if is_packed(p):
        return cast(Tensor, cast(Any, p).unpack(working))
    return p if p.dtype == working else p.to(working)
