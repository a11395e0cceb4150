"""Updates of weights in 16 bits: `W <- round(keep W + x)` in one pass, with all arithmetic in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .philox import Stream, numbers_of
from .schema import kernel

Noise = tuple[int, Stream, int, int]  # key, stream, number of the first element of x, and step from row to row


def add_rounded_(
    w: Tensor,
    x: Tensor,
    keep: float | Tensor,
    *,
    first: int = 0,
    owed: Tensor | None = None,
    noise: Noise | None = None,
) -> None:
    """Update weights by `W <- keep W + x`, and round once: to nearest, with Kahan compensation, or stochastically.

    Args:
        w: (rows, width), bfloat16, or float16 without noise.
        x: (rows, columns), float32. It is added to the columns of w from `first` on; the remaining columns stay.
        keep: the factor that weight decay leaves, as a number or as a tensor of one number on the device.
        owed: like w, the rounding errors so far, which are added before rounding and replaced by the new ones (Kahan).
        noise: the random numbers of stochastic rounding, one per element of x.
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
