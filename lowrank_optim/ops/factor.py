"""Balanced factors `B (m, r)`, `A (r, n)` of a matrix: `B^T B = A A^T`, the singular values shared out evenly.

Of all splits of the singular values between the two factors the even one conditions training best (Glentis et al.,
arXiv 2505.22922).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .degenerate import settle_
from .linalg import fix_signs


def split(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B, A) with `B A` the best approximation of `w (m, n)` of that rank."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    u, s, vh = _settled(u, s, vh, torch.finfo(w.dtype).eps, rank)
    return _shared_out(u[:, :rank], s[:rank], vh[:rank])


def balance(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(B, A) of the same product, without ever forming it: `O((m + n) r^2)`."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(rb.double() @ ra.double().mT)
    u, s, vh = qb @ u.to(b.dtype), s.to(b.dtype), vh.to(b.dtype) @ qa.mT
    return _shared_out(*_settled(u, s, vh, torch.finfo(b.dtype).eps, len(s)))


def singular(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U (k, m), S (k,), V (k, n)) of `w (m, n)`, k = min(m, n): vectors as contiguous rows, signs as in `split`."""
    try:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
    except torch.linalg.LinAlgError:  # seldom, and more seldom in float64
        u, s, vh = (x.to(w.dtype) for x in torch.linalg.svd(w.double(), full_matrices=False))
    u, s, vh = _settled(u, s, vh, torch.finfo(w.dtype).eps, len(s))
    return u.mT.contiguous(), s, vh.contiguous()


def _settled(u: Tensor, s: Tensor, vh: Tensor, eps: float, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the decomposition that all devices agree on, from any other.

    The largest entry of each column of u becomes positive, and v turns with u. Where the value is zero nothing couples
    them, so v gets a sign of its own.
    """
    rank = settle_(u, s, vh.mT, eps, keep)
    fixed = fix_signs(u)
    vh = (fixed * u).sum(0).sign().unsqueeze(-1) * vh
    if rank < len(s):
        vh[rank:] = fix_signs(vh[rank:].mT).mT
    return fixed, s, vh


def _shared_out(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Zero becomes a unit of rounding of the largest value: a direction that is zero in both factors never trains."""
    root = torch.where(s > 0, s, torch.finfo(s.dtype).eps * s[0]).sqrt()
    return u * root, root.unsqueeze(-1) * vh
