"""Coefficients of cosine transforms: their scores, a selection of them, and the matrix that a selection gives."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cosines
from ..products import add_product_, product
from ..signatures import Mutated


def cosine_scores_(sums: Mutated, x: Tensor, third: bool, power: int, across: bool) -> None:
    """Write the sums of `|coefficient|^power` over the columns of x (m, n) into sums (m,).

    Args:
        third: transform by DCT-III, else by DCT-II.
        across: transform the rows of x (n, m) instead of its columns.
    """
    sums.copy_(cosines.scores(third, x.mT if across else x, power))


def cosine_rows_(out: Mutated, x: Tensor, index: Tensor, third: bool, across: bool) -> None:
    """Write the coefficients `index (r,)` of each column of x (m, n) into out (r, n); of each row if `across`."""
    _check_places(index, x.shape[1 if across else 0])
    chosen = cosines.vectors(third, x.shape[1 if across else 0], index, x.dtype)
    out.copy_(product(chosen.mT, x.mT if across else x))


def add_cosines_(
    w: Mutated, d: Tensor, index: Tensor, alpha: float, beta: float, third: bool, across: bool, first: int = 0
) -> None:
    """Compute `W <- beta W + alpha D_I d` for w (m, n), or for its transpose if `across`.

    Args:
        d: (r, k), of which the n columns from `first` on are used.
        index: (r,), the numbers of the cosine vectors that are the columns of D_I (m, r).
    """
    whole = w.mT if across else w
    _check_places(index, whole.shape[0])
    some = d[:, first : first + whole.shape[1]]
    add_product_(whole, cosines.vectors(third, whole.shape[0], index, w.dtype), some, alpha, beta)


def _check_places(index: Tensor, m: int) -> None:
    """Raise where an index is outside. On other devices than CPU, reading values stops the host."""
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= m:
            raise RuntimeError(f"index must be from 0 to below {m}, got {low if low < 0 else high}")
