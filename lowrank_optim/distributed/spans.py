"""Find the local elements of a weight, a contiguous range in row-major order, under FSDP2 or stage 3 of ZeRO alike."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .deepspeed import partition
from .dtensors import first_row, local

# Rows of a product that are computed together. The shape of a product decides how it is rounded. With another number of
# rows, the parts of a weight would have other bits than the whole weight.
_ROWS = 256


class Span(NamedTuple):
    """The local elements of a matrix (m, n).

    Args:
        x: the elements, in the memory of the weight: (local rows, n), or (elements,) under stage 3 of DeepSpeed ZeRO,
            which cuts anywhere.
        start: the index of the first one in the whole matrix, row-major.
    """

    x: Tensor
    start: int

    def of_product(self, b: Tensor, a: Tensor) -> Tensor:
        """Return the elements of the product B A at the places of `x`, in the shape of `x`.

        Args:
            b: the local rows of B (m, r), or all of B where `x` is flat.
            a: A (r, n), whole.
        """
        if self.x.dim() > 1:
            return _product(b, a, 0, len(b))
        # The range may begin and end inside a row. Whole blocks of _ROWS rows around it are computed, from row `first`
        # to row `stop`, because the block decides the rounding; then the elements before and after it are dropped.
        size = _ROWS * a.shape[1]
        first, stop = self.start // size * _ROWS, -(-(self.start + len(self.x)) // size) * _ROWS
        skipped = self.start - first * a.shape[1]
        return _product(b, a, first, min(stop, len(b))).view(-1)[skipped : skipped + len(self.x)]


def _product(b: Tensor, a: Tensor, first: int, stop: int) -> Tensor:
    """Return rows `first` to `stop` of B A, (stop - first, n), computed in blocks of `_ROWS` rows."""
    rows = b.new_empty(max(0, stop - first), a.shape[1])
    for top in range(first, stop, _ROWS):
        torch.mm(b[top : top + _ROWS], a, out=rows[top - first : top - first + _ROWS])
    return rows


def span(w: Tensor, width: int) -> Span:
    """Return the local elements of a matrix with rows of `width` elements.

    `w` may be whole, a DTensor that is sharded by rows, or a parameter that stage 3 of DeepSpeed ZeRO has partitioned.
    """
    # Stage 3 keeps the local range in `ds_tensor`, padded at its end; the padding is no part of the weight.
    shard = getattr(w, "ds_tensor", None)
    if shard is None:
        return Span(local(w), first_row(w) * width)
    start, length = partition(w)
    return Span(cast(Any, shard).data[:length], start)
