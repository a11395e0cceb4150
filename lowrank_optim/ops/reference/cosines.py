"""Cosine transforms."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cosines
from ..products import add_product_, product
from ..signatures import Mutated


def cosine_scores_(sums: Mutated, x: Tensor, third: bool, power: int, across: bool) -> None:
    """Sums of `|coefficient|^power` over the columns of x, or over its lines if `across`."""
    sums.copy_(cosines.scores(third, x.mT if across else x, power))


def cosine_rows_(out: Mutated, x: Tensor, index: Tensor, third: bool, across: bool) -> None:
    """The coefficients number `index` of each column of x, or of each line if `across`."""
    _check_places(index, x.shape[1 if across else 0])
    chosen = cosines.vectors(third, x.shape[1 if across else 0], index, x.dtype)
    out.copy_(product(chosen.mT, x.mT if across else x))


def add_cosines_(
    w: Mutated, d: Tensor, index: Tensor, alpha: float, beta: float, third: bool, across: bool, first: int = 0
) -> None:
    """Vectors times d, which is `(r, k)` and begins with column `first` of it, times alpha, is added to beta W."""
    whole = w.mT if across else w
    _check_places(index, whole.shape[0])
    some = d[:, first : first + whole.shape[1]]
    add_product_(whole, cosines.vectors(third, whole.shape[0], index, w.dtype), some, alpha, beta)


def _check_places(index: Tensor, m: int) -> None:
    """That rows number `index` are there; on a device this would stop the host."""
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= m:
            raise RuntimeError(f"index must be from 0 to below {m}, got {low if low < 0 else high}")
