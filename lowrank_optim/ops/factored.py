"""Matrices scaled by factors of their rows and columns (Adafactor), without a matrix of the products of factors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .schema import kernel


class Factors(NamedTuple):
    """Factors of the elements of matrices: `rows[i] columns[j]`, or `most` where that is less.

    Args:
        rows, columns: (..., m, 1) and (..., 1, n).
    """

    rows: Tensor
    columns: Tensor
    most: float


def scale_factored(x: Tensor, factors: Factors) -> Tensor:
    """Return x (..., m, n) scaled, in the memory layout of x."""
    rows, columns, most = factors
    if torch.compiler.is_compiling():  # a compiler knows no transposed `out`, and fuses the passes
        return (rows * columns).clamp_(max=most).mul_(x)
    if x.mT.is_contiguous() and not x.is_contiguous():
        return scale_factored(x.mT, Factors(columns.mT, rows.mT, most)).mT
    x = x.contiguous()
    out = torch.empty_like(x)
    kernel("scale_factored_")(out, x, rows.contiguous(), columns.contiguous(), most)
    return out


def factored_energy(x: Tensor, factors: Factors) -> Tensor:
    """Return the sum of squares of each scaled matrix of a contiguous x (..., m, n): (...), float64."""
    sums = torch.empty(x.shape[:-2], dtype=torch.float64, device=x.device)
    kernel("factored_energy_")(sums, x, *factors)
    return sums
