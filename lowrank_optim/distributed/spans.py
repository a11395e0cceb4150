"""Which elements of a weight are here, whoever has cut it: some that follow each other in row-major order."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .deepspeed import partition
from .dtensors import first_row, local

# Rows of a product that are computed together. How a product is rounded depends on its shape, so that with others the
# parts of a weight would have other bits than the whole.
_ROWS = 256


class Span(NamedTuple):
    """What is here of a matrix (m, n).

    Args:
        x: those elements, the same memory: whole rows, or flat where stage 3 of DeepSpeed has cut anywhere.
        start: the number of the first one.
    """

    x: Tensor
    start: int

    def of_product(self, b: Tensor, a: Tensor) -> Tensor:
        """The same elements of B A. `b`: the rows of B (m, r) that are here, or where x is flat all; `a`: A (r, n)."""
        if self.x.dim() > 1:
            return _product(b, a, 0, len(b))
        size = _ROWS * a.shape[1]
        first, stop = self.start // size * _ROWS, -(-(self.start + len(self.x)) // size) * _ROWS
        skipped = self.start - first * a.shape[1]
        return _product(b, a, first, min(stop, len(b))).view(-1)[skipped : skipped + len(self.x)]


def _product(b: Tensor, a: Tensor, first: int, stop: int) -> Tensor:
    """Rows of B A, some at a time."""
    rows = b.new_empty(max(0, stop - first), a.shape[1])
    for top in range(first, stop, _ROWS):
        torch.mm(b[top : top + _ROWS], a, out=rows[top - first : top - first + _ROWS])
    return rows


def span(w: Tensor, width: int) -> Span:
    """What is here of a matrix with rows of `width` elements, whole or sharded by rows, or a parameter of stage 3."""
    shard = getattr(w, "ds_tensor", None)
    if shard is None:
        return Span(local(w), first_row(w) * width)
    start, length = partition(w)
    return Span(cast(Any, shard).data[:length], start)
