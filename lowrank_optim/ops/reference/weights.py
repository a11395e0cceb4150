"""Weights in bfloat16, stepped and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..signatures import Mutated
from . import pieces
from .random import BLOCK, Stream, philox


def add_nearest_(w: Mutated, x: Tensor, keep: float, factor: Tensor | None = None, first: int = 0) -> None:
    """Compute `W <- round(keep W + x)` to nearest, in float32 until the rounding.

    Args:
        w: (m, k). Only its n columns from `first` on change.
        x: (m, n), float32.
        factor: a tensor of one number, which replaces keep and is read on the device.
    """
    for target, y in pieces.row_pieces(w[:, first : first + x.shape[1]], x):
        target.copy_(_moved(target.float(), y, keep, factor))


def add_kahan_(w: Mutated, owed: Mutated, x: Tensor, keep: float, factor: Tensor | None = None, first: int = 0) -> None:
    """Compute `add_nearest_` for the sum `W + owed`, then store the rounding error in `owed` (Kahan summation)."""
    some = slice(first, first + x.shape[1])
    for target, rest, y in pieces.row_pieces(w[:, some], owed[:, some], x):
        exact = _moved(target.float().add_(rest), y, keep, factor)
        target.copy_(exact)
        rest.copy_(exact.sub_(target))


def add_stochastic_(
    w: Mutated,
    x: Tensor,
    keep: float,
    key: int,
    purpose: int,
    time: int,
    at: Tensor | None = None,
    start: int = 0,
    pitch: int = 0,
    factor: Tensor | None = None,
    first: int = 0,
) -> None:
    """Compute `add_nearest_` with stochastic rounding.

    The element (i, j) of x is rounded by the number `start + i pitch + j` of the stream.
    """
    stream = purpose, time if at is None else at.view(())
    rows, run = x.shape
    wide = min(run, BLOCK * 8)
    some = max(1, BLOCK * 8 // max(1, wide))  # rows of a piece
    for row in range(0, rows, some):
        begins = start + pitch * torch.arange(row, min(row + some, rows), dtype=torch.int64, device=x.device)
        for column in range(0, run, max(1, wide)):
            y = x[row : row + some, column : column + wide]
            target = w[row : row + some, first + column : first + column + y.shape[1]]
            bits = _bits16_of_rows(begins + column, y.shape[1], key, stream)
            exact = _moved(target.float(), y, keep, factor)
            target.copy_(bits.add_(exact.view(torch.int32)).bitwise_and_(-65536).view(torch.float32))


def _moved(w: Tensor, x: Tensor, keep: float, factor: Tensor | None) -> Tensor:
    return w.mul_(keep if factor is None else factor.view(()).float()).add_(x)


def _bits16_of_rows(begins: Tensor, run: int, key: int, stream: Stream) -> Tensor:
    """Return `run` consecutive numbers of 16 bits per row, from the element `begins[i]` of the stream on.

    Args:
        begins: (rows,), int64.

    Returns:
        (rows, run), int32.
    """
    # A counter gives 8 numbers. A row that begins within a counter needs up to two more than run / 8 of them.
    counters = (begins // 8).unsqueeze(-1) + torch.arange(run // 8 + 2, dtype=torch.int64, device=begins.device)
    lanes = counters.new_empty(counters.numel(), 8, dtype=torch.int32)
    for i, word in enumerate(philox(counters.flatten(), key, stream)):
        lanes[:, 2 * i].copy_(word & 0xFFFF)
        lanes[:, 2 * i + 1].copy_(word >> 16)
    return lanes.view(len(begins), -1).gather(1, (begins % 8).unsqueeze(-1) + torch.arange(run, device=begins.device))
