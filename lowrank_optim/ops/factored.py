"""Matrices scaled by factors of their rows and columns, without a matrix of those factors (Adafactor)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .schema import kernel


class Factors(NamedTuple):
    """Element (i, j) is multiplied by `rows[i] columns[j]`, or by `most` if that is less.

    Args:
        rows, columns: (..., m, 1) and (..., 1, n).
    """

    rows: Tensor
    columns: Tensor
    most: float


def scale_factored(x: Tensor, factors: Factors) -> Tensor:
    """x (..., m, n) scaled, laid out as x is."""
    rows, columns, most = factors
    if torch.compiler.is_compiling():  # knows no `out` that is turned, and fuses passes by itself
        return (rows * columns).clamp_(max=most).mul_(x)
    if x.mT.is_contiguous() and not x.is_contiguous():
        return scale_factored(x.mT, Factors(columns.mT, rows.mT, most)).mT
    x = x.contiguous()
    out = torch.empty_like(x)
    kernel("scale_factored_")(out, x, rows.contiguous(), columns.contiguous(), most)
    return out


def factored_energy(x: Tensor, factors: Factors) -> Tensor:
    """The sum of squares of contiguous x (..., m, n) scaled, in float64: (...)."""
    sums = torch.empty(x.shape[:-2], dtype=torch.float64, device=x.device)
    kernel("factored_energy_")(sums, x, *factors)
    return sums
