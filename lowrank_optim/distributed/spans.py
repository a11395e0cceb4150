"""Which elements of a weight are here, whoever has cut it: some that follow each other in row-major order."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor

from .deepspeed import partition
from .dtensors import first_row, local


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
            return b @ a
        first, stop = self.start // a.shape[1], -(-(self.start + len(self.x)) // a.shape[1])
        skipped = self.start - first * a.shape[1]
        return (b[first:stop] @ a).view(-1)[skipped : skipped + len(self.x)]


def span(w: Tensor, width: int) -> Span:
    """What is here of a matrix with rows of `width` elements, whole or sharded by rows, or a parameter of stage 3."""
    shard = getattr(w, "ds_tensor", None)
    if shard is None:
        return Span(local(w), first_row(w) * width)
    start, length = partition(w)
    return Span(cast(Any, shard).data[:length], start)
