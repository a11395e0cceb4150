"""Norms, sums of squares and maxima of matrices, where the obvious call of torch is slow on CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .schema import kernel

SMALL = 1 << 13  # below this number of elements, calls cost more time than passes over memory


def largest(x: Tensor) -> Tensor:
    """Return `max |x|` (...) of each matrix of x (..., m, n), NaN where the matrix has one.

    It comes from the maximum and the minimum, without a tensor of magnitudes. torch's maximum norm takes twenty times
    as long on CPU.
    """
    return torch.maximum(x.amax(dim=(-2, -1)), -x.amin(dim=(-2, -1)))


def norm(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return Euclidean norms of the columns (-2) or rows (-1) of x (..., m, n), or of matrices, dimensions kept.

    On CPU, torch's norm of columns with strided elements takes ten times as long as a sum of squares.
    """
    if dim != -2 or x.dim() < 2 or x.stride(-2) == 1 or not _fast(x):
        result: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
        return result
    return _squares(x)[1].sqrt_().to(x.dtype).unsqueeze(-2)


def squares(x: Tensor, dim: int) -> Tensor:
    """Return sums of squares of rows (-1) or columns (-2), dimension dropped; on CPU without a tensor of squares."""
    if not _fast(x):
        return x.square().sum(dim)
    rows, columns = _squares(x)
    return (rows if dim == -1 else columns).to(x.dtype)


def mean_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean squares of rows (..., m, 1) and of columns (..., 1, n); on CPU in one pass."""
    if not _fast(x):
        squared = x.square()
        return squared.mean(-1, keepdim=True), squared.mean(-2, keepdim=True)
    (m, n), (rows, columns) = x.shape[-2:], _squares(x)
    return rows.div_(n).to(x.dtype).unsqueeze(-1), columns.div_(m).to(x.dtype).unsqueeze(-2)


def _fast(x: Tensor) -> bool:
    """Whether a kernel is faster than torch's sums. For small matrices, converting its results takes too long."""
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return known and x.numel() >= SMALL and not torch.compiler.is_compiling()


def _squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums of squares of rows (..., m) and of columns (..., n) in float64, in one pass over memory."""
    if x.mT.is_contiguous() and not x.is_contiguous():
        return _squares(x.mT)[::-1]
    x = x.contiguous()
    rows = x.new_empty(x.shape[:-1], dtype=torch.float64)
    columns = x.new_empty((*x.shape[:-2], x.shape[-1]), dtype=torch.float64)
    kernel("squares_")(rows, columns, x)
    return rows, columns
