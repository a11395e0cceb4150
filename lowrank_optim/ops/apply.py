"""What a step adds to weights in 16 bits: `W <- round(keep W + x)` in one pass, with all arithmetic in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .philox import Stream, numbers_of
from .schema import kernel

Noise = tuple[int, Stream, int, int]  # key, stream, number of the first element of x, and from one row of x to the next


def add_rounded_(
    w: Tensor,
    x: Tensor,
    keep: float | Tensor,
    *,
    first: int = 0,
    owed: Tensor | None = None,
    noise: Noise | None = None,
) -> None:
    """Decays, adds and rounds once: with `owed` by Kahan, with `noise` stochastically, else to nearest.

    Args:
        w: (rows, width) in bfloat16, or in float16, which takes no noise.
        x: (rows, columns), float32; added to the columns of w from `first` on, and nothing happens to the others.
        keep: what decay leaves of w, a number or one on the device.
        owed: like w: what rounding has kept from w so far, and then what it keeps from it now.
    """
    number, factor = (1.0, keep) if isinstance(keep, Tensor) else (keep, None)
    find = kernel if w.dtype == torch.bfloat16 else lambda name: getattr(reference, name)
    if owed is not None:
        find("add_kahan_")(w, owed, x, number, factor, first)
    elif noise is not None:
        key, stream, start, pitch = noise
        kernel("add_stochastic_")(w, x, number, *numbers_of(key, stream), start, pitch, factor, first)
    else:
        find("add_nearest_")(w, x, number, factor, first)
