"""Fixed orthonormal dictionaries of n vectors, and how much of a matrix lies along each; one formula per kind."""

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
    """The vectors number `index (..., r)` as columns `(..., n, r)`; read from the dictionary, or computed if `fast`."""
    if fast and kind in COSINES:
        return cosines.vectors(kind == "dct3", n, index, dtype)
    columns = dictionary(kind, n, dtype, index.device).mT[index.long()]  # rows of the transpose: one read each
    return columns.mT


def scores(kind: str, g: Tensor, power: int, fast: bool) -> Tensor:
    """Sums of `|D^T G|^power` over the columns of `g (n, k)`, with the vectors of D as columns: `(n,)`.

    By the dense product, which is one tensor of g's size, or if `fast` by transforms of some columns at a time, added
    up in double.
    """
    if not (fast and kind in COSINES):
        return cosines.power_sums(dictionary(kind, g.shape[0], g.dtype, g.device).mT @ g, power, -1)
    if not cosines.transforms(g.shape[0]):
        return cosines.scores(kind == "dct3", g, power)
    (x, across), sums = _as_it_lies(g), g.new_empty(g.shape[0], dtype=torch.float64)
    kernel("cosine_scores_")(sums, x, kind == "dct3", power, across)
    return sums


def transforms(kind: str, g: Tensor, fast: bool) -> bool:
    """Are coefficients of `g (..., n, k)` better transformed than multiplied? Then a step needs no vectors. On CPU."""
    return fast and kind in COSINES and g.device.type == "cpu" and cosines.transforms(g.shape[-2])


def coefficients(kind: str, g: Tensor, index: Tensor) -> Tensor:
    """`D_I^T G`, (..., n, k) -> (..., r, k), by a transform; of g in 16 bits in float32, block by block."""
    if g.dim() > 2:
        return torch.stack([coefficients(kind, *one) for one in zip(g, index, strict=True)])
    cut = [Columns(0, g.shape[1], g.shape[1])] if g.dtype.itemsize > 2 else list(blocks(g.shape))
    parts = []
    for columns in cut:
        x, across = _as_it_lies(widened(columns.of(g)))
        parts.append(x.new_empty(len(index), columns.stop - columns.first))
        kernel("cosine_rows_")(parts[-1], x, index, kind == "dct3", across)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def add_combination_(
    kind: str, w: Tensor, d: Tensor, index: Tensor, alpha: float, beta: float, columns: Columns | None = None
) -> None:
    """`W <- beta W + alpha D_I d` by a transform, in one pass over w; where beta is 0, w is not read.

    `columns`: w has only these, and d (..., r, k) is whole.
    """
    if w.dim() > 2:
        for one in zip(w, d, index, strict=True):
            add_combination_(kind, *one, alpha, beta, columns)
        return
    x, across = _as_it_lies(w)
    kernel("add_cosines_")(
        x, d.contiguous(), index, alpha, beta, kind == "dct3", across, 0 if columns is None else columns.first
    )
    if x.data_ptr() != w.data_ptr():
        w.copy_(x.mT if across else x)


def _as_it_lies(x: Tensor) -> tuple[Tensor, bool]:
    """A matrix, or its transpose and True if that is what is contiguous."""
    across = not x.is_contiguous() and x.mT.is_contiguous()
    return (x.mT if across else x.contiguous()), across


@functools.lru_cache(maxsize=32)
def dictionary(kind: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The whole dictionary `(n, n)`, vectors as columns; one per width, dtype and device, made once in float64.

    They stay for the next optimizer; `dictionary.cache_clear()` frees them.
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
    """Sylvester's matrix for a power of two; else that of the largest one that divides n, times a small DCT-II."""
    odd = n
    while odd % 2 == 0:
        odd //= 2
    every = torch.arange(odd, device=device)
    result = cosines.cosines(False, odd, every.unsqueeze(-1), every.unsqueeze(0), torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device=device) / math.sqrt(2)
    while result.shape[0] < n:
        result = torch.kron(step, result)
    return result
