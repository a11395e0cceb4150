"""What the loops share. They see every matrix with the projected side first, so side "right" is turned at the door."""

from __future__ import annotations

import torch
from torch import Tensor

from .galore import rotate


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
