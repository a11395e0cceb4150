"""Balanced factors `B (m, r)`, `A (r, n)` of a matrix: `B^T B = A A^T`, the singular values shared out evenly.

Of all splits of the singular values between the two factors the even one conditions training best (Glentis et al.,
arXiv 2505.22922).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg import fix_signs


def split(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B, A) with `B A` the best approximation of `w (m, n)` of that rank."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return _shared_out(u[:, :rank], s[:rank], vh[:rank])


def balance(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(B, A) of the same product, without ever forming it: `O((m + n) r^2)`."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(rb.double() @ ra.double().mT)
    return _shared_out(qb @ u.to(b.dtype), s.to(b.dtype), vh.to(b.dtype) @ qa.mT)


def singular(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U (k, m), S (k,), V (k, n)) of `w (m, n)`, k = min(m, n): vectors as contiguous rows, signs as in `split`."""
    try:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
    except torch.linalg.LinAlgError:  # seldom, and more seldom in float64
        u, s, vh = (x.to(w.dtype) for x in torch.linalg.svd(w.double(), full_matrices=False))
    fixed = fix_signs(u)
    signs = (fixed * u).sum(0).sign()
    return fixed.mT.contiguous(), s, (signs.unsqueeze(-1) * vh).contiguous()


def _shared_out(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Signs are free, and fixed so that all devices agree: the largest entry of each column of u becomes positive."""
    fixed = fix_signs(u)
    signs = (fixed * u).sum(0).sign()
    root = s.sqrt()
    return fixed * root, (signs * root).unsqueeze(-1) * vh
