"""Selected entries of a dense matrix: adding to them, reading them, and a product of two matrices there only.

Entries are given by flat row-major positions, int32 or int64, which ascend without repetition. On CPU this is checked
before anything is written. On other devices a check would stop the host, and only a position outside stops the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .schema import kernel

TOKENS = 256  # tokens of a piece of the sum, whose columns stay in cache
_KERNELS = (torch.float32, torch.float64, torch.bfloat16)  # other dtypes take the plain versions


def add_at_(dense: Tensor, positions: Tensor, values: Tensor, start: int = 0) -> None:
    """Add values (k,) to a contiguous tensor at positions (k,); element 0 of `dense` has position `start`."""
    _kernel("add_at_", dense)(dense, positions, values, start)


def gather_at(dense: Tensor, positions: Tensor, start: int = 0) -> Tensor:
    """Return the elements (k,) of a contiguous tensor at positions (k,); element 0 of `dense` has position `start`."""
    out = dense.new_empty(positions.shape)
    _kernel("gather_at_", dense)(out, dense, positions, start)
    return out


def sampled_product(left: Tensor, right: Tensor, positions: Tensor) -> Tensor:
    """Return the entries (k,) of `L^T R` (m, n) at positions (k,), from left (t, m) and right (t, n).

    Both are float32 or float64.
    """
    out = left.new_zeros(positions.shape)
    for some, others in zip(torch.split(left, TOKENS), torch.split(right, TOKENS), strict=True):
        kernel("add_sampled_product_")(out, some.mT.contiguous(), others.mT.contiguous(), positions)
    return out


def _kernel(name: str, like: Tensor) -> Any:
    return kernel(name) if like.dtype in _KERNELS else getattr(reference, name)
