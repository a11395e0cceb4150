"""Gram matrices, signs and selections for bases, and rows that move when a selection changes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import blocks
from ..signatures import Mutated

_NEARLY = {
    torch.float32: 1 - 2.0**-14,
    torch.float64: 1 - 2.0**-30,
}  # entries count as equally large from this ratio of magnitudes on


def gram_(out: Mutated, y: Tensor, across: bool = False) -> None:
    """Write `Y^T Y` (..., k, k) of y (..., m, k) into `out`, in float64; or `Y Y^T` (..., m, m) if across."""
    out.zero_()
    lines = y if across else y.mT
    for columns in blocks(lines.shape, y.device.type):
        wide = columns.of(lines).double()
        out.add_(wide @ wide.mT)


def leading_entries(x: Tensor) -> Tensor:
    """Return the first entry of each column of x (..., m, r) that is as large as the largest entry: (..., 1, r).

    Entries of a singular vector whose magnitudes differ by no more than rounding errors are equally large.
    """
    sizes = x.abs()
    limit = sizes.amax(-2, keepdim=True).mul_(_NEARLY[x.dtype])
    return x.gather(-2, sizes.ge_(limit).argmax(-2, keepdim=True))


def fix_signs_(basis: Mutated) -> None:
    """Change the signs of columns of `basis (..., m, r)` so that the entry of largest magnitude is positive.

    Among entries of equal magnitude the first decides.
    """
    if basis.numel():
        basis.mul_(torch.where(leading_entries(basis) < 0, -1.0, 1.0).to(basis.dtype))


def select_top_(index: Mutated, scores: Tensor) -> None:
    """Write the positions of the largest scores of each row into index (..., r), ascending; first ones win ties."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    index.copy_(order[..., : index.shape[-1]].sort(dim=-1).values)


def move_rows_(x: Mutated, source: Tensor) -> None:
    """Replace row i of x by row `source[i]` of the old x, or by zeros where `source[i]` is -1. Sources ascend."""
    _check_ascent(source)
    kept = x[source.clamp(min=0)] if len(x) else x
    x.copy_(kept.masked_fill_((source < 0).view(-1, *[1] * (x.dim() - 1)), 0))


def _check_ascent(source: Tensor) -> None:
    """Raise where sources do not ascend or are outside. On other devices than CPU, reading values stops the host."""
    if source.device.type != "cpu":
        return
    some = source[source != -1]
    if some.numel() and (int(some[0]) < 0 or int(some[-1]) >= len(source) or bool((some.diff() <= 0).any())):
        raise RuntimeError(f"source must ascend from at least 0 to below {len(source)}, none of them twice, or be -1")
