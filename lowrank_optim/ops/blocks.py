"""Matrices some columns at a time, where what is kept in 16 bits is worked on in 32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 20  # elements worked on at once on CPU: 4 MiB in float32, which stay in cache
LARGE_BLOCK = 1 << 23  # and elsewhere, where each block costs launches: half of a chunk
_UNIT = 64  # columns that matrix products and random numbers like to come in


class Columns(NamedTuple):
    """Columns `first` to `stop` of `whole`, of all matrices of a batch."""

    first: int
    stop: int
    whole: int

    def of(self, x: Tensor) -> Tensor:
        return x[..., self.first : self.stop]


def blocks(shape: torch.Size | tuple[int, ...], device: str = "cpu", most: int | None = None) -> Iterator[Columns]:
    """Cuts matrices `(..., n)` between columns, into blocks of at most so many elements; some columns are the least.

    `most`: unless given, what suits the kind of device.
    """
    rows, n = math.prod(shape[:-1]), shape[-1]
    size = max(1, (most or (BLOCK if device == "cpu" else LARGE_BLOCK)) // max(1, rows))
    size = max(_UNIT, size // _UNIT * _UNIT) if len(shape) > 1 else size
    for first in range(0, n, size):
        yield Columns(first, min(first + size, n), n)


def largest_block(shape: torch.Size | tuple[int, ...], most: int | None = None) -> int:
    """Elements of the largest of them, on CPU."""
    widths = (columns.stop - columns.first for columns in blocks(shape, most=most))
    return math.prod(shape[:-1]) * max(widths, default=0)


def widened(x: Tensor) -> Tensor:
    """In the dtype of arithmetic: float32 where x has fewer bits."""
    working = torch.promote_types(x.dtype, torch.float32)
    return x if x.dtype == working else x.to(working)
