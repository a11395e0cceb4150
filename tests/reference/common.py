"""Functions that the loops share. They see every matrix with the projected side first, so "right" is transposed."""

from __future__ import annotations

import torch
from torch import Tensor

from .galore import rotate, signs

TIE = 64  # units of rounding within which numbers are equal


def turn(x: Tensor, side: str) -> Tensor:
    return x if side == "left" else x.T


def orthonormal(x: Tensor) -> Tensor:
    """Q of x = QR, made unique by a positive diagonal of R."""
    q, r = torch.linalg.qr(x)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(x)


def carried(moments, m, v, t, old, new, betas):
    """(m, v, t) after a change of basis from `old` to `new`, t being the steps these moments have seen."""
    if moments == "rotate":
        m, v = rotate(m, v, (old, None), (new, None), 1 - betas[0] ** t, 1 - betas[1] ** t)
    elif moments == "reset":
        m, v, t = 0.0, 0.0, 0
    return m, v, t


def rms(x: Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


def decomposed(w: Tensor, normal) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V) with vectors as columns. `normal(shape)` picks those of equal values and of zero."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    v, near = vh.T.clone(), TIE * torch.finfo(w.dtype).eps * s[0]
    rank, first = int((s > near).sum()), 0
    for i in range(1, rank + 1):
        if i == rank or s[first] - s[i] > near:
            if i > first + 1:
                some, short = slice(first, i), u if len(u) <= len(v) else v
                q = torch.linalg.qr(short[:, some].T @ normal((len(short), i - first)))[0]
                u[:, some], v[:, some] = u[:, some] @ q, v[:, some] @ q
            first = i
    for x in (u, v):
        x[:, rank:] = signs(torch.linalg.qr(outside(x[:, :rank], normal((len(x), len(s) - rank))))[0])
    s[rank:] = 0
    return u, s, v


def outside(known: Tensor, x: Tensor) -> Tensor:
    return x - known @ (known.T @ x)


def untied(scores: Tensor, count: int, scale) -> Tensor:
    """Scores less the smallest of the `count` largest ones, and zero where that is a rounding error of `scale`."""
    if not count:
        return scores
    rest = scores - scores.topk(count).values[-1]
    return torch.where(rest.abs() <= TIE * torch.finfo(scores.dtype).eps * scale, 0, rest)


def strongest(energies: Tensor, count: int) -> Tensor:
    """The positions of the largest, ascending; of those that rounding makes equal, the first."""
    rest = untied(energies, count, energies.max())
    return rest.sort(descending=True, stable=True).indices[:count].sort().values
