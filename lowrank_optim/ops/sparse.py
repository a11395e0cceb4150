"""A few entries of a dense matrix: adding to them, reading them, and a product of two matrices there and nowhere else.

Entries are flat row-major positions, int32 or int64, ascending, none of them twice. On CPU that is looked at before
anything is written; elsewhere it would stop the host, and only positions outside of the matrix stop a kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .schema import kernel

TOKENS = 256  # summed over at once: so many of each column stay in cache
_KERNELS = (torch.float32, torch.float64, torch.bfloat16)  # other dtypes take the plain versions


def add_at_(dense: Tensor, positions: Tensor, values: Tensor, start: int = 0) -> None:
    """Adds `values (k,)` at `positions (k,)` of a tensor of which dense, contiguous, begins with element `start`."""
    _kernel("add_at_", dense)(dense, positions, values, start)


def gather_at(dense: Tensor, positions: Tensor, start: int = 0) -> Tensor:
    """The elements at `positions (k,)` of a tensor of which dense, contiguous, begins with element `start`."""
    out = dense.new_empty(positions.shape)
    _kernel("gather_at_", dense)(out, dense, positions, start)
    return out


def sampled_product(left: Tensor, right: Tensor, positions: Tensor) -> Tensor:
    """`L^T R` at positions: (t, m), (t, n), positions `(k,)` in (m, n) -> (k,). In float32 or float64."""
    out = left.new_zeros(positions.shape)
    for some, others in zip(torch.split(left, TOKENS), torch.split(right, TOKENS), strict=True):
        kernel("add_sampled_product_")(out, some.mT.contiguous(), others.mT.contiguous(), positions)
    return out


def _kernel(name: str, like: Tensor) -> Any:
    return kernel(name) if like.dtype in _KERNELS else getattr(reference, name)
