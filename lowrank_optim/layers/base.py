"""Add to frozen weights under trained factors, so that the sum survives in any dtype they are stored in."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .. import ops
from ..ops.philox import Stream
from ..recipe.weights import is_packed, unpacked


def add_to_base_(
    base: Tensor,
    delta: Tensor,
    key: int,
    stream: Stream,
    *,
    stochastic: bool = True,
    exact: Tensor | None = None,
    start: int = 0,
) -> None:
    """Add `delta` to `base` in place, in the dtype of `delta` and with a single rounding.

    Args:
        base: (m, n), or the local rows of it, in any dtype or packed.
        delta: of the same shape, in the working dtype (float32 or float64).
        key, stream: the key and the stream of the random numbers that stochastic rounding uses.
        stochastic: round to bfloat16 or to packed codes so that small sums survive on average; else to nearest.
        start: index of the first element in the whole weight, where other ranks have the rows before it.
        exact: an unrounded copy of the weight, on any device. If given, the sum is computed from it and kept in it.
    """
    w = (unpacked(base, delta.dtype) if exact is None else exact.to(delta)) + delta
    if exact is not None:
        # The exact copy accumulates no rounding errors, so rounding the base to nearest is the best choice.
        exact.copy_(w)
        base.copy_(w)
    elif is_packed(base) and stochastic:
        cast(Any, base).pack_(w, key, stream, start)
    elif base.dtype == torch.bfloat16 and stochastic:
        base.copy_(ops.round_to_bfloat16(w, key, stream, start))
    else:
        base.copy_(w)
