"""Fixed orthonormal dictionaries of n vectors, and how much of a matrix lies along each; one formula per kind."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .linalg import orthonormalize
from .philox import key_of, normal, stream_of

KINDS = ("dct2", "dct3", "hadamard", "random")


PIECE = 1 << 22  # most elements that go through one FFT
_IN_CACHE = 1 << 18  # the same on CPU
COSINES = ("dct2", "dct3")


def atoms(kind: str, n: int, index: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """The vectors number `index (..., r)` as columns `(..., n, r)`; read from the dictionary, or computed if `fast`."""
    if fast and kind in COSINES:
        rows = torch.arange(n, device=index.device).unsqueeze(-1)
        return _cosines(kind, n, rows, index.unsqueeze(-2), dtype)
    columns = dictionary(kind, n, dtype, index.device).mT[index.long()]  # rows of the transpose: one read each
    return columns.mT


def scores(kind: str, g: Tensor, power: int, fast: bool) -> Tensor:
    """Sums of `|D^T G|^power` over the columns of `g (n, k)`, with the vectors of D as columns: `(n,)`.

    By the dense product, which is one tensor of g's size, or if `fast` by FFT of some columns at a time.
    """
    if fast and kind in COSINES:
        return _dct2_scores(g, power) if kind == "dct2" else _dct3_scores(g, power)
    return _sums(dictionary(kind, g.shape[0], g.dtype, g.device).mT @ g, power, -1)


@functools.lru_cache(maxsize=32)
def dictionary(kind: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The whole dictionary `(n, n)`, vectors as columns; one per width, dtype and device, made once in float64.

    They stay for the next optimizer; `dictionary.cache_clear()` frees them.
    """
    if kind in COSINES:
        every = torch.arange(n, device=device)
        exact = _cosines(kind, n, every.unsqueeze(-1), every.unsqueeze(0), torch.float64)
    elif kind == "hadamard":
        exact = _hadamard(n, device)
    else:
        exact = orthonormalize(normal((n, n), key_of(0, "dictionary"), stream_of(kind, n), device).double())
    return exact.to(dtype).contiguous()


def _cosines(kind: str, n: int, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
    """DCT-II atoms are cosines of frequency `column`; DCT-III is the transpose. Angles are reduced in integers: float32
    products reach n^2, and cost 2e-4 of orthogonality at n = 4096. There are 4 n of them, so cosines are looked up."""
    whole = torch.int32 if 2 * n * n < 1 << 31 else torch.int64
    frequency, place = (column.to(whole), row.to(whole)) if kind == "dct2" else (row.to(whole), column.to(whole))
    angle = frequency * (2 * place + 1)
    angle = angle.bitwise_and_(4 * n - 1) if n & (n - 1) == 0 else angle.remainder_(4 * n)  # division is slow
    angle.masked_fill_(frequency == 0, 4 * n)
    turns = torch.arange(4 * n, dtype=torch.float64, device=row.device) * (math.pi / (2 * n))
    table = torch.nn.functional.pad(torch.cos(turns) * math.sqrt(2 / n), (0, 1), value=math.sqrt(1 / n))
    return table.to(dtype).index_select(0, angle.flatten()).view(angle.shape)


def _hadamard(n: int, device: torch.device) -> Tensor:
    """Sylvester's matrix for a power of two; else that of the largest one that divides n, times a small DCT-II."""
    odd = n
    while odd % 2 == 0:
        odd //= 2
    every = torch.arange(odd, device=device)
    result = _cosines("dct2", odd, every.unsqueeze(-1), every.unsqueeze(0), torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device=device) / math.sqrt(2)
    while result.shape[0] < n:
        result = torch.kron(step, result)
    return result


def _dct2_scores(g: Tensor, power: int) -> Tensor:
    """Makhoul's N-point algorithm (1980): even places ascending, odd ones descending, one real FFT, a rotation."""
    n = g.shape[0]
    count, order = n // 2 + 1, _evens_first(n, g.device)
    rotation, sums = _rotation(g, -1), g.new_zeros(2 * count)
    for columns in _pieces(g):
        half = torch.fft.rfft(_columns(columns, order), dim=-1).mul_(rotation)
        sums += _sums(torch.view_as_real(half).flatten(1), power, 0)
    # Re(V_k w_k) is the coefficient k, and -Im(V_k w_k) that of n - k, which the real FFT leaves out.
    real, imaginary = sums.view(count, 2).unbind(-1)
    sums = torch.cat([real, imaginary[1 : n - count + 1].flip(-1)]).mul_((2 / n) ** (power / 2))
    sums[0].mul_(0.5 ** (power / 2))
    return sums


def _dct3_scores(g: Tensor, power: int) -> Tensor:
    """The inverse of Makhoul's algorithm, step by step."""
    n = g.shape[0]
    count, order = n // 2 + 1, torch.arange(n, device=g.device)
    rotation, sums = _rotation(g, 1), g.new_zeros(n)
    for columns in _pieces(g):
        x = _columns(columns, order)
        x[:, 0].mul_(math.sqrt(2))
        mirrored = torch.nn.functional.pad(x[:, n - count + 1 :].flip(-1), (1, 0))
        half = torch.complex(x[:, :count], mirrored.neg_()).mul_(rotation)
        sums += _sums(torch.fft.irfft(half, n=n, dim=-1), power, 0)
    result = torch.empty_like(sums)
    result[_evens_first(n, g.device)] = sums
    return result.mul_((n / 2) ** (power / 2))


def _pieces(g: Tensor) -> tuple[Tensor, ...]:
    """Some columns at a time, of which there may be four copies before they are as many elements as g."""
    most = min(g.numel() // 4, _IN_CACHE if g.device.type == "cpu" else PIECE)
    return torch.split(g, max(1, most // g.shape[0]), dim=-1)


def _columns(g: Tensor, order: Tensor) -> Tensor:
    """The columns of `g (n, b)` as rows of a tensor of its own, their elements in some order; reads lines of memory."""
    if g.stride(-1) == 1:
        return g.index_select(0, order).mT.contiguous()
    return g.mT.index_select(-1, order)


def _evens_first(n: int, device: torch.device) -> Tensor:
    """0, 2, 4, ..., 5, 3, 1."""
    every = torch.arange(n, device=device)
    return torch.cat([every[::2], every[1::2].flip(-1)])


def _rotation(g: Tensor, sign: int) -> Tensor:
    k = torch.arange(g.shape[0] // 2 + 1, device=g.device, dtype=torch.float64)
    turned = torch.polar(torch.ones_like(k), sign * math.pi * k / (2 * g.shape[0]))
    return turned.to(torch.complex128 if g.dtype == torch.float64 else torch.complex64)


def _sums(x: Tensor, power: int, dim: int) -> Tensor:
    """Sums of `|x|^power`; x is overwritten."""
    return (x.abs_() if power == 1 else x.square_()).sum(dim)
