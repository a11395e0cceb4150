"""Norms, sums of squares and maxima of matrices, for which torch has a slow way and a fast one on CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .schema import kernel

SMALL = 1 << 13  # elements below which calls cost more than passes


def largest(x: Tensor) -> Tensor:
    """`max |x|` of each matrix, NaN if there is one: `(..., m, n)` -> `(...)`.

    From both ends, without a tensor of magnitudes; torch's maximum norm takes twenty times as long on CPU.
    """
    return torch.maximum(x.amax(dim=(-2, -1)), -x.amin(dim=(-2, -1)))


def norm(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Euclidean norms of columns (-2), rows (-1) or all of both, dimensions kept.

    On CPU torch's own takes ten times as long as a sum of squares for columns whose elements lie apart.
    """
    if dim != -2 or x.dim() < 2 or x.stride(-2) == 1 or not _fast(x):
        result: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
        return result
    return _squares(x)[1].sqrt_().to(x.dtype).unsqueeze(-2)


def squares(x: Tensor, dim: int) -> Tensor:
    """Sums of squares over rows (-1) or columns (-2), the dimension dropped; on CPU without a tensor of squares."""
    if not _fast(x):
        return x.square().sum(dim)
    rows, columns = _squares(x)
    return (rows if dim == -1 else columns).to(x.dtype)


def mean_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows, (..., m, 1), and of columns, (..., 1, n); on CPU in one pass."""
    if not _fast(x):
        every = x.square()
        return every.mean(-1, keepdim=True), every.mean(-2, keepdim=True)
    (m, n), (rows, columns) = x.shape[-2:], _squares(x)
    return rows.div_(n).to(x.dtype).unsqueeze(-1), columns.div_(m).to(x.dtype).unsqueeze(-2)


def _fast(x: Tensor) -> bool:
    """Is there a kernel that beats torch's own sums? Small matrices are not worth its results' ways to their dtype."""
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return known and x.numel() >= SMALL and not torch.compiler.is_compiling()


def _squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares over rows (..., m) and columns (..., n) in float64, in one pass over memory."""
    if x.mT.is_contiguous() and not x.is_contiguous():
        return _squares(x.mT)[::-1]
    x = x.contiguous()
    rows = x.new_empty(x.shape[:-1], dtype=torch.float64)
    columns = x.new_empty((*x.shape[:-2], x.shape[-1]), dtype=torch.float64)
    kernel("squares_")(rows, columns, x)
    return rows, columns
