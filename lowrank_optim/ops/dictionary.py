"""Fixed orthonormal dictionaries of n vectors, and the coefficients of a matrix in them; one formula per kind."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .linalg import orthonormalize
from .philox import key_of, normal, stream_of

KINDS = ("dct2", "dct3", "hadamard", "random")


def atoms(kind: str, n: int, index: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """The vectors number `index (..., r)` as columns `(..., n, r)`; read from the dictionary, or computed if `fast`."""
    if fast and kind in ("dct2", "dct3"):
        rows = torch.arange(n, device=index.device).unsqueeze(-1)
        return _cosines(kind, n, rows, index.long().unsqueeze(-2)).to(dtype)
    columns = dictionary(kind, n, dtype, index.device).mT[index.long()]  # rows of the transpose: one read each
    return columns.mT


def coefficients(kind: str, g: Tensor, fast: bool) -> Tensor:
    """`D^T G`, with the vectors of D as columns: (n, k) -> (n, k)."""
    if fast and kind == "dct2":
        return _dct2(g)
    if fast and kind == "dct3":
        return _dct3(g)
    return dictionary(kind, g.shape[-2], g.dtype, g.device).mT @ g


@functools.lru_cache(maxsize=32)
def dictionary(kind: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The whole dictionary `(n, n)`, vectors as columns; one per width, dtype and device, made once in float64.

    They stay for the next optimizer; `dictionary.cache_clear()` frees them.
    """
    if kind in ("dct2", "dct3"):
        every = torch.arange(n, device=device)
        exact = _cosines(kind, n, every.unsqueeze(-1), every.unsqueeze(0))
    elif kind == "hadamard":
        exact = _hadamard(n, device)
    else:
        exact = orthonormalize(normal((n, n), key_of(0, "dictionary"), stream_of(kind, n), device).double())
    return exact.to(dtype).contiguous()


def _cosines(kind: str, n: int, row: Tensor, column: Tensor) -> Tensor:
    """DCT-II atoms are cosines of frequency `column`; DCT-III is the transpose. Angles are reduced in integers: float32
    products reach n^2, and cost 2e-4 of orthogonality at n = 4096."""
    frequency, place = (column, row) if kind == "dct2" else (row, column)
    angle = (frequency * (2 * place + 1)) % (4 * n)
    size = torch.where(frequency == 0, 1.0, 2.0).double().div(n).sqrt()
    return size * torch.cos(angle.double() * (math.pi / (2 * n)))


def _hadamard(n: int, device: torch.device) -> Tensor:
    """Sylvester's matrix for a power of two; else that of the largest one that divides n, times a small DCT-II."""
    odd = n
    while odd % 2 == 0:
        odd //= 2
    every = torch.arange(odd, device=device)
    result = _cosines("dct2", odd, every.unsqueeze(-1), every.unsqueeze(0))
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device=device) / math.sqrt(2)
    while result.shape[0] < n:
        result = torch.kron(step, result)
    return result


def _dct2(g: Tensor) -> Tensor:
    """Makhoul's N-point algorithm (1980): even places ascending, odd ones descending, one real FFT, a rotation."""
    n = g.shape[-2]
    v = torch.cat([g[..., ::2, :], g[..., 1::2, :].flip(-2)], dim=-2)
    half = torch.fft.rfft(v, dim=-2)
    k = torch.arange(half.shape[-2], device=g.device, dtype=torch.float64)
    turned = half * torch.polar(torch.ones_like(k), -math.pi * k / (2 * n)).unsqueeze(-1).to(half.dtype)
    # Re(V_k w_k) gives frequency k, and -Im(V_k w_k) frequency n - k, which the real FFT leaves out.
    out = torch.cat([turned.real, -turned.imag[..., 1 : n - half.shape[-2] + 1, :].flip(-2)], dim=-2)
    out.mul_(math.sqrt(2 / n))
    out[..., 0, :].mul_(math.sqrt(0.5))
    return out


def _dct3(g: Tensor) -> Tensor:
    """The inverse of `_dct2`, step by step."""
    n = g.shape[-2]
    x = g * math.sqrt(n / 2)
    x[..., 0, :].mul_(math.sqrt(2))
    count = n // 2 + 1
    mirrored = torch.cat([torch.zeros_like(x[..., :1, :]), x[..., 1:, :].flip(-2)], dim=-2)[..., :count, :]
    k = torch.arange(count, device=g.device, dtype=torch.float64)
    rotation = torch.polar(torch.ones_like(k), math.pi * k / (2 * n)).unsqueeze(-1)
    half = torch.complex(x[..., :count, :], -mirrored)
    v = torch.fft.irfft(half * rotation.to(half.dtype), n=n, dim=-2)
    out = torch.empty_like(v)
    out[..., ::2, :] = v[..., : (n + 1) // 2, :]
    out[..., 1::2, :] = v[..., (n + 1) // 2 :, :].flip(-2)
    return out
