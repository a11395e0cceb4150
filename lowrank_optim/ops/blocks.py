"""Matrices cut into blocks of columns, so that a copy in float32 of weights in 16 bits is never a whole matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 20  # elements of a block on CPU: 4 MiB in float32, which stay in cache
LARGE_BLOCK = 1 << 23  # the same on other devices, where each block costs launches: half of a chunk
_UNIT = 64  # blocks are multiples of so many columns, which suits matrix products and random numbers


class Columns(NamedTuple):
    """The columns `first` to `stop` of a matrix of `whole` columns, or of each matrix of a batch."""

    first: int
    stop: int
    whole: int

    def of(self, x: Tensor) -> Tensor:
        """Return the view of these columns of x (..., whole)."""
        return x[..., self.first : self.stop]


def blocks(shape: torch.Size | tuple[int, ...], device: str = "cpu", most: int | None = None) -> Iterator[Columns]:
    """Cut matrices (..., m, n) between columns.

    Args:
        device: the type of the device, which decides the size of blocks.
        most: elements of a block, instead of the size for that device. A block of a matrix has at least 64 columns, or
            all of them.
    """
    rows, n = math.prod(shape[:-1]), shape[-1]
    size = max(1, (most or (BLOCK if device == "cpu" else LARGE_BLOCK)) // max(1, rows))
    size = max(_UNIT, size // _UNIT * _UNIT) if len(shape) > 1 else size
    for first in range(0, n, size):
        yield Columns(first, min(first + size, n), n)


def largest_block(shape: torch.Size | tuple[int, ...], most: int | None = None) -> int:
    """Return the number of elements of the largest block on CPU."""
    widths = (columns.stop - columns.first for columns in blocks(shape, most=most))
    return math.prod(shape[:-1]) * max(widths, default=0)


def widened(x: Tensor) -> Tensor:
    """Return x in the dtype of arithmetic: float32 where x has fewer bits, else its own dtype."""
    working = torch.promote_types(x.dtype, torch.float32)
    return x if x.dtype == working else x.to(working)
