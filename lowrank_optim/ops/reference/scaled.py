"""Sums of squares, and updates scaled by row, by column or as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ..signatures import Mutated
from . import pieces


def squares_(rows: Mutated, columns: Mutated, x: Tensor) -> None:
    """Write the sums of squares of x (..., m, n) over rows (..., m) and over columns (..., n), in float64."""
    columns.zero_()
    for some in pieces.some_rows(x):
        squares = x[..., some, :].to(torch.float64, copy=True).square_()
        rows[..., some] = squares.sum(-1)
        columns.add_(squares.sum(-2))


def take_scaled_(w: Mutated, x: Tensor, factors: Tensor, keep: float) -> None:
    """Compute `W <- keep W - x factors`, for w and x (..., m, n). Where keep is 0, w is not read.

    Args:
        factors: (..., m, 1), (..., 1, n) or (..., 1, 1).
    """
    if keep == 0:
        torch.mul(x, factors, out=w).neg_()
        return
    w.mul_(keep)
    for some in pieces.some_rows(x):
        w[..., some, :].sub_(x[..., some, :] * (factors if factors.shape[-2] == 1 else factors[..., some, :]))
