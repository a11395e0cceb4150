"""Adafactor: matrices scaled by factors of their rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..signatures import Mutated
from . import pieces


def scale_factored_(out: Mutated, x: Tensor, rows: Tensor, columns: Tensor, most: float) -> None:
    """Write x (..., m, n), scaled, into `out`.

    Each element is multiplied by the factors of its row and its column, or by `most` where their product is larger.

    Args:
        rows, columns: (..., m, 1) and (..., 1, n).
    """
    for _, by_row, by_column, piece, target in pieces.factored_lines(x, rows, columns, out):
        torch.mul(by_row, by_column, out=target).clamp_(max=most).mul_(piece)


def factored_energy_(sums: Mutated, x: Tensor, rows: Tensor, columns: Tensor, most: float) -> None:
    """Write the sum of squares of `scale_factored_` of each matrix into sums (...), in float64."""
    sums.zero_()
    for which, by_row, by_column, piece in pieces.factored_lines(x, rows, columns):
        scaled = (by_row * by_column).clamp_(max=most).mul_(piece)
        sums.view(-1)[which] += scaled.double().square_().sum((-2, -1))


def step_factored_(
    w: Mutated,
    exp_avg: Mutated | None,
    x: Tensor,
    rows: Tensor,
    columns: Tensor,
    most: float,
    beta: float,
    gain: float,
    length: float,
    keep: float,
) -> None:
    """Update the momentum M and the weights W by Y, which is `scale_factored_` of x.

    `M <- beta M + gain Y; W <- keep W - length M`. Without a momentum (None) `W <- keep W - length gain Y`.
    """
    others = [w] if exp_avg is None else [w, exp_avg]
    for _, by_row, by_column, piece, target, *mean in pieces.factored_lines(x, rows, columns, *others):
        scaled = (by_row * by_column).clamp_(max=most).mul_(piece).mul_(gain)
        if mean:
            scaled.copy_(mean[0].mul_(beta).add_(scaled))
        target.mul_(keep).sub_(scaled.mul_(length))
