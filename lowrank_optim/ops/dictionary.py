"""Fixed orthonormal dictionaries D (n, n), vectors as columns: vectors, scores, coefficients and combinations."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import cosines
from .blocks import Columns, blocks, widened
from .linalg import orthonormalize
from .philox import key_of, normal, stream_of
from .schema import kernel

KINDS = ("dct2", "dct3", "hadamard", "random")
COSINES = ("dct2", "dct3")


def atoms(kind: str, n: int, index: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """Return the vectors with the numbers `index (..., r)` as columns (..., n, r).

    Args:
        fast: compute vectors of cosine dictionaries instead of reading them from the whole dictionary.
    """
    if fast and kind in COSINES:
        return cosines.vectors(kind == "dct3", n, index, dtype)
    columns = dictionary(kind, n, dtype, index.device).mT[index.long()]  # rows of the transpose are contiguous
    return columns.mT


def scores(kind: str, g: Tensor, power: int, fast: bool) -> Tensor:
    """Return the sums of `|D^T G|^power` over the columns of g (n, k): (n,).

    Args:
        fast: transform a few columns at a time and add up in float64, where there is a transform. Otherwise the dense
            product `D^T G` is formed, a tensor of g's size.
    """
    if not (fast and kind in COSINES):
        return cosines.power_sums(dictionary(kind, g.shape[0], g.dtype, g.device).mT @ g, power, -1)
    if not cosines.transforms(g.shape[0]):
        return cosines.scores(kind == "dct3", g, power)
    (x, across), sums = _as_stored(g), g.new_empty(g.shape[0], dtype=torch.float64)
    kernel("cosine_scores_")(sums, x, kind == "dct3", power, across)
    return sums


def transforms(kind: str, g: Tensor, fast: bool) -> bool:
    """Whether coefficients of g (..., n, k) are transformed and not multiplied, so that a step needs no vectors.

    Only the CPU has such kernels.
    """
    return fast and kind in COSINES and g.device.type == "cpu" and cosines.transforms(g.shape[-2])


def coefficients(kind: str, g: Tensor, index: Tensor) -> Tensor:
    """Return `D_I^T G` (..., r, k) of g (..., n, k) by a transform, in float32 at least."""
    if g.dim() > 2:
        return torch.stack([coefficients(kind, *pair) for pair in zip(g, index, strict=True)])
    # A g in 16 bits is widened block by block, so that there is never a whole copy in float32.
    cut = [Columns(0, g.shape[1], g.shape[1])] if g.dtype.itemsize > 2 else list(blocks(g.shape))
    parts = []
    for columns in cut:
        x, across = _as_stored(widened(columns.of(g)))
        parts.append(x.new_empty(len(index), columns.stop - columns.first))
        kernel("cosine_rows_")(parts[-1], x, index, kind == "dct3", across)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def add_combination_(
    kind: str, w: Tensor, d: Tensor, index: Tensor, alpha: float, beta: float, columns: Columns | None = None
) -> None:
    """Compute `W <- beta W + alpha D_I d` by a transform, in one pass over w; where beta is 0, w is not read.

    Args:
        w: (..., n, k).
        d: (..., r, k).
        index: (..., r), the numbers of the vectors in D_I.
        columns: the columns of d that w has. None means that w has all of them.
    """
    if w.dim() > 2:
        for matrix in zip(w, d, index, strict=True):
            add_combination_(kind, *matrix, alpha, beta, columns)
        return
    x, across = _as_stored(w)
    kernel("add_cosines_")(
        x, d.contiguous(), index, alpha, beta, kind == "dct3", across, 0 if columns is None else columns.first
    )
    if x.data_ptr() != w.data_ptr():
        w.copy_(x.mT if across else x)


def _as_stored(x: Tensor) -> tuple[Tensor, bool]:
    """Return (x, False) with a contiguous x, or (x^T, True) where only the transpose is contiguous."""
    across = not x.is_contiguous() and x.mT.is_contiguous()
    return (x.mT if across else x.contiguous()), across


@functools.lru_cache(maxsize=32)
def dictionary(kind: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the whole dictionary (n, n), vectors as columns, computed in float64.

    Dictionaries are cached for the next optimizer by width, dtype and device; `dictionary.cache_clear()` frees them.
    """
    if kind in COSINES:
        every = torch.arange(n, device=device)
        exact = cosines.cosines(kind == "dct3", n, every.unsqueeze(-1), every.unsqueeze(0), torch.float64)
    elif kind == "hadamard":
        exact = _hadamard(n, device)
    else:
        exact = orthonormalize(normal((n, n), key_of(0, "dictionary"), stream_of(kind, n), device).double())
    return exact.to(dtype).contiguous()


def _hadamard(n: int, device: torch.device) -> Tensor:
    """Return Sylvester's matrix of order n, a power of two.

    For other n it is the Kronecker product of the matrix of the largest power of two that divides n and a DCT-II.
    """
    odd = n
    while odd % 2 == 0:
        odd //= 2
    every = torch.arange(odd, device=device)
    result = cosines.cosines(False, odd, every.unsqueeze(-1), every.unsqueeze(0), torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device=device) / math.sqrt(2)
    while result.shape[0] < n:
        result = torch.kron(step, result)
    return result
