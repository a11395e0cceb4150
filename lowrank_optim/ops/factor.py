"""Balanced factors B (m, r), A (r, n) of a matrix: `B^T B = A A^T`. Each factor has the roots of the singular values.

Of all ways to share the singular values between the factors, the even one conditions training best (Glentis et al.,
arXiv 2505.22922).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .degenerate import settle_
from .linalg import fix_signs


def split(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return balanced (B, A) whose product is the best approximation of w (m, n) of that rank."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    u, s, vh = _settled(u, s, vh, torch.finfo(w.dtype).eps, rank)
    return _shared_out(u[:, :rank], s[:rank], vh[:rank])


def balance(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return balanced (B, A) with the product of b (m, r) and a (r, n), which is not formed: `O((m + n) r^2)`."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(rb.double() @ ra.double().mT)
    u, s, vh = qb @ u.to(b.dtype), s.to(b.dtype), vh.to(b.dtype) @ qa.mT
    return _shared_out(*_settled(u, s, vh, torch.finfo(b.dtype).eps, len(s)))


def singular(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of w (m, n), signs as in `split`.

    Returns:
        U (k, m), S (k,) and V (k, n) with k = min(m, n). Vectors are contiguous rows.
    """
    try:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
    except torch.linalg.LinAlgError:  # in rare cases; float64 fails in still fewer
        u, s, vh = (x.to(w.dtype) for x in torch.linalg.svd(w.double(), full_matrices=False))
    u, s, vh = _settled(u, s, vh, torch.finfo(w.dtype).eps, len(s))
    return u.mT.contiguous(), s, vh.contiguous()


def _settled(u: Tensor, s: Tensor, vh: Tensor, eps: float, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the decomposition that all devices agree on, given any decomposition of the same matrix.

    The largest entry of each column of u becomes positive, and v changes its sign together with u. Where the value is
    zero, nothing couples u and v, so the sign of v is fixed separately.

    Args:
        u, s, vh: (m, k), (k,) and (k, n).
        eps: the unit of rounding of the matrix.
        keep: the number of leading vectors that matter.
    """
    rank = settle_(u, s, vh.mT, eps, keep)
    fixed = fix_signs(u)
    vh = (fixed * u).sum(0).sign().unsqueeze(-1) * vh
    if rank < len(s):
        vh[rank:] = fix_signs(vh[rank:].mT).mT
    return fixed, s, vh


def _shared_out(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, A) of singular vectors and values, each with the roots of the values.

    A value of zero is replaced by a unit of rounding of the largest value, because a direction that is zero in both
    factors never trains.
    """
    root = torch.where(s > 0, s, torch.finfo(s.dtype).eps * s[0]).sqrt()
    return u * root, root.unsqueeze(-1) * vh
