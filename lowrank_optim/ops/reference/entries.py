"""Entries of a matrix by flat position."""

from __future__ import annotations

import torch
from torch import Tensor

from ..signatures import Mutated
from . import pieces

LANES = 16  # partial sums of one sampled product


def add_at_(dense: Mutated, positions: Tensor, values: Tensor, start: int = 0) -> None:
    """Add values (k,) to `dense` at positions (k,); element 0 of dense has position `start`."""
    _ordered(positions, start, start + dense.numel())
    dense.view(-1).index_add_(0, positions - start if start else positions, values)


def gather_at_(out: Mutated, dense: Tensor, positions: Tensor, start: int = 0) -> None:
    """Write the elements of `dense` at positions (k,) into out (k,); element 0 of dense has position `start`."""
    _ordered(positions, start, start + dense.numel())
    out.copy_(dense.view(-1).index_select(0, positions - start if start else positions))


def add_sampled_product_(out: Mutated, left: Tensor, right: Tensor, positions: Tensor) -> None:
    """Add the entries of `left right^T` (m, n) at positions (p,) to out (p,), from left (m, k) and right (n, k).

    Each entry is a sum of `LANES` partial sums, which are added in halves, because native kernels add in that order.
    """
    _ordered(positions, 0, left.shape[0] * right.shape[0])
    size = max(1, 4 * pieces.PIECE // max(1, left.shape[1]))
    for place, target in zip(torch.split(positions, size), torch.split(out, size), strict=True):
        row = place // max(1, right.shape[0])
        column = place - row * right.shape[0]
        # (k, p), so that one row has a summand of each entry; lane j sums the rows j, j + LANES, ...
        products = left.index_select(0, row).mul_(right.index_select(0, column)).mT.contiguous()
        sums = products.new_zeros(LANES, len(place))
        for part in torch.split(products, LANES):
            sums[: len(part)].add_(part)
        while len(sums) > 1:
            first, second = sums.chunk(2)
            sums = first + second
        target.add_(sums[0])


def _ordered(positions: Tensor, start: int, stop: int) -> None:
    """Raise where positions do not ascend or are outside of [start, stop).

    On other devices than CPU, reading values stops the host.
    """
    if positions.device.type != "cpu" or torch.compiler.is_compiling() or not len(positions):
        return
    inside = start <= int(positions[0]) and int(positions[-1]) < stop
    if not (inside and bool((positions[1:] > positions[:-1]).all())):
        raise RuntimeError(f"positions must ascend from at least {start} to below {stop}, none of them twice")
