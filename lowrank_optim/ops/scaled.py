"""Updates that are scaled by row, by column or as a whole, without a tensor of the scaled update."""

from __future__ import annotations

import torch
from torch import Tensor

from .reductions import SMALL
from .schema import kernel


def take_scaled_(w: Tensor, x: Tensor, factors: Tensor, keep: float) -> None:
    """Compute `W <- keep W - x factors` in one pass on CPU; where keep is 0, w is not read.

    Args:
        w, x: (..., m, n). Both are contiguous, or both transposes are, for the fast way.
        factors: (..., 1, n), (..., m, 1) or (..., 1, 1).
    """
    if torch.compiler.is_compiling() or not _suits(w, x, factors):
        if keep == 0:
            torch.mul(x, factors, out=w).neg_()
        else:
            (w if keep == 1 else w.mul_(keep)).addcmul_(x, factors, value=-1)
    elif w.is_contiguous():
        kernel("take_scaled_")(w, x, factors.contiguous(), keep)
    else:
        kernel("take_scaled_")(w.mT, x.mT, factors.mT.contiguous(), keep)


def _suits(w: Tensor, x: Tensor, factors: Tensor) -> bool:
    """Whether the operator takes these tensors, and beats torch's own calls."""
    if w.numel() < SMALL:
        return False
    alike = w.dtype == x.dtype == factors.dtype in (torch.float32, torch.float64) and w.device.type == "cpu"
    whole = factors.dim() == w.dim() > 1 and factors.shape[:-2] == w.shape[:-2] and w.shape == x.shape
    same = (w.is_contiguous() and x.is_contiguous()) or (w.mT.is_contiguous() and x.mT.is_contiguous())
    return alike and whole and same
