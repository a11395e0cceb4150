"""Adafactor: matrices scaled by factors of their rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..signatures import Mutated
from . import pieces


def scale_factored_(out: Mutated, x: Tensor, rows: Tensor, columns: Tensor, most: float) -> None:
    """Each element of x (..., m, n) times the factors of its row and its column, or times `most` if that is less."""
    for _, by_row, by_column, piece, target in pieces.factored_lines(x, rows, columns, out):
        torch.mul(by_row, by_column, out=target).clamp_(max=most).mul_(piece)


def factored_energy_(sums: Mutated, x: Tensor, rows: Tensor, columns: Tensor, most: float) -> None:
    """The sum of squares of the same, one number in float64 per matrix."""
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
    """`M <- beta M + gain Y; W <- keep W - length M`, Y being the same; without M `W <- keep W - length gain Y`."""
    others = [w] if exp_avg is None else [w, exp_avg]
    for _, by_row, by_column, piece, target, *mean in pieces.factored_lines(x, rows, columns, *others):
        scaled = (by_row * by_column).clamp_(max=most).mul_(piece).mul_(gain)
        if mean:
            scaled.copy_(mean[0].mul_(beta).add_(scaled))
        target.mul_(keep).sub_(scaled.mul_(length))
