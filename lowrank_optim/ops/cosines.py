"""Cosine dictionaries in plain torch: their vectors by look-up, their coefficients by FFT.

The vectors (columns) of DCT-II are cosines of ascending frequency. DCT-III, selected by `third`, is the transpose and
inverse of DCT-II.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PIECE = 1 << 22  # elements of one FFT at most
_IN_CACHE = 1 << 18  # the same on CPU, where they stay in cache


def transforms(n: int) -> bool:
    """Whether native kernels can transform n numbers: n is even, and its prime factors are 2, 3, 5 and 7."""
    if n < 2 or n % 2:
        return False
    for factor in (2, 3, 5, 7):
        while n % factor == 0:
            n //= factor
    return n == 1


def vectors(third: bool, n: int, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the vectors with the numbers `index (..., r)` as columns (..., n, r)."""
    rows = torch.arange(n, device=index.device).unsqueeze(-1)
    return cosines(third, n, rows, index.unsqueeze(-2), dtype)


def scores(third: bool, g: Tensor, power: int) -> Tensor:
    """Return the sums of `|coefficient|^power` over the columns of g (n, k): (n,), float64.

    Transforms run over pieces of a few columns, and the sums of pieces are added in float64.
    """
    if not g.numel():  # which torch's FFT refuses
        return g.new_zeros(g.shape[0], dtype=torch.float64)
    return _third_scores(g, power) if third else _second_scores(g, power)


def cosines(third: bool, n: int, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the entries of the dictionary at `row` and `column`, which broadcast.

    Angles are reduced as integers, because products in float32 reach n^2 and cost 2e-4 of orthogonality at n = 4096.
    There are only 4 n different angles, so cosines are looked up.
    """
    whole = torch.int32 if 2 * n * n < 1 << 31 else torch.int64
    frequency, place = (row.to(whole), column.to(whole)) if third else (column.to(whole), row.to(whole))
    angle = frequency * (2 * place + 1)
    angle = angle.bitwise_and_(4 * n - 1) if n & (n - 1) == 0 else angle.remainder_(4 * n)  # division is slow
    angle.masked_fill_(frequency == 0, 4 * n)
    turns = torch.arange(4 * n, dtype=torch.float64, device=row.device) * (math.pi / (2 * n))
    table = torch.nn.functional.pad(torch.cos(turns) * math.sqrt(2 / n), (0, 1), value=math.sqrt(1 / n))
    return table.to(dtype).index_select(0, angle.flatten()).view(angle.shape)


def _second_scores(g: Tensor, power: int) -> Tensor:
    """Return `scores` of DCT-II by Makhoul's N-point algorithm (1980).

    Even elements in ascending order and then odd elements in descending order go through one real FFT and a rotation.
    """
    n = g.shape[0]
    count, order = n // 2 + 1, _evens_first(n, g.device)
    rotation, sums = _rotation(g, -1), g.new_zeros(2 * count, dtype=torch.float64)
    for columns in _pieces(g):
        half = torch.fft.rfft(_columns(columns, order), dim=-1).mul_(rotation)
        sums += power_sums(torch.view_as_real(half).flatten(1), power, 0)
    # Re(V_k w_k) is the coefficient k, and -Im(V_k w_k) that of n - k, which the real FFT leaves out.
    real, imaginary = sums.view(count, 2).unbind(-1)
    sums = torch.cat([real, imaginary[1 : n - count + 1].flip(-1)]).mul_((2 / n) ** (power / 2))
    sums[0].mul_(0.5 ** (power / 2))
    return sums


def _third_scores(g: Tensor, power: int) -> Tensor:
    """Return `scores` of DCT-III by Makhoul's algorithm in reverse."""
    n = g.shape[0]
    count, order = n // 2 + 1, torch.arange(n, device=g.device)
    rotation, sums = _rotation(g, 1), g.new_zeros(n, dtype=torch.float64)
    for columns in _pieces(g):
        x = _columns(columns, order)
        x[:, 0].mul_(math.sqrt(2))
        mirrored = torch.nn.functional.pad(x[:, n - count + 1 :].flip(-1), (1, 0))
        half = torch.complex(x[:, :count], mirrored.neg_()).mul_(rotation)
        sums += power_sums(torch.fft.irfft(half, n=n, dim=-1), power, 0)
    result = torch.empty_like(sums)
    result[_evens_first(n, g.device)] = sums
    return result.mul_((n / 2) ** (power / 2))


def _pieces(g: Tensor) -> tuple[Tensor, ...]:
    """Cut g (n, k) between columns; four copies of a piece have at most as many elements as g."""
    most = min(g.numel() // 4, _IN_CACHE if g.device.type == "cpu" else PIECE)
    return torch.split(g, max(1, most // g.shape[0]), dim=-1)


def _columns(g: Tensor, order: Tensor) -> Tensor:
    """Return the columns of g (n, b) as rows (b, n) of a new tensor, their elements in the given order (n,).

    Both branches read contiguous lines of memory.
    """
    if g.stride(-1) == 1:
        return g.index_select(0, order).mT.contiguous()
    return g.mT.index_select(-1, order)


def _evens_first(n: int, device: torch.device) -> Tensor:
    """Return 0, 2, 4, ..., 5, 3, 1."""
    every = torch.arange(n, device=device)
    return torch.cat([every[::2], every[1::2].flip(-1)])


def _rotation(g: Tensor, sign: int) -> Tensor:
    """Return `exp(sign i pi k / 2n)` for the frequencies k of a real FFT of n numbers, in the complex dtype of g."""
    k = torch.arange(g.shape[0] // 2 + 1, device=g.device, dtype=torch.float64)
    turned = torch.polar(torch.ones_like(k), sign * math.pi * k / (2 * g.shape[0]))
    return turned.to(torch.complex128 if g.dtype == torch.float64 else torch.complex64)


def power_sums(x: Tensor, power: int, dim: int) -> Tensor:
    """Return the sums of `|x|^power` over a dimension; x is overwritten."""
    return (x.abs_() if power == 1 else x.square_()).sum(dim)
