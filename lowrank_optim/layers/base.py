"""Frozen weights below trained factors: what is merged into them survives, whatever they are stored in."""

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
    """`base += delta`, summed in the dtype of `delta` and rounded once.

    Args:
        base: in any dtype, or packed.
        delta: in the working dtype.
        key, stream: what the noise of rounding is a function of.
        stochastic: round to bfloat16 or to packed codes so that small sums survive on average; else to nearest.
        start: number of the first element, where others have the rows before.
        exact: the same weight unrounded, on any device, which then is what is added to.
    """
    w = (unpacked(base, delta.dtype) if exact is None else exact.to(delta)) + delta
    if exact is not None:
        exact.copy_(w)
        base.copy_(w)  # from the exact one, so there is no error to be averaged away
    elif is_packed(base) and stochastic:
        cast(Any, base).pack_(w, key, stream, start)
    elif base.dtype == torch.bfloat16 and stochastic:
        base.copy_(ops.round_to_bfloat16(w, key, stream, start))
    else:
        base.copy_(w)
