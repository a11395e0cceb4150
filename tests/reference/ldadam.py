"""LDAdam (Robert et al. 2024) for one matrix: a new basis every step, moments carried along, losses fed back.

One block power iteration from the old basis replaces the SVD. The error buffer keeps what the projection dropped of the
gradient and, weighted so that the momentum telescopes, what the change of basis dropped of the momentum.
"""

from __future__ import annotations

import torch

from .common import carried, orthonormal, turn
from .galore import exact


def ldadamw(weight, gradients, refresh_at, *, rank, side, lr, betas, eps, weight_decay, scale, rho):
    """The weight after one step per gradient. `refresh_at` is ignored: the basis changes before every step."""
    w, p = turn(weight, side), None
    e = torch.zeros_like(w)
    m, v = 0.0, 0.0
    beta1, beta2 = betas
    for step, grad in enumerate(gradients):
        a = turn(grad, side) + e
        if p is None:
            p = exact(a, rank, "left", None)[0]
            lost = 0.0
        else:
            old, m_old = p, m
            b = rho * (old @ (m_old / (1 - beta1**step))) + (1 - rho) * a
            p = orthonormal(b @ (b.T @ old))
            m, v, _ = carried("rotate", m, v, step, old, p, betas)
            lost = old @ m_old - p @ m
        t = step + 1
        r = p.T @ a
        e = a - p @ r + beta1 / (1 - beta1) * lost
        m = beta1 * m + (1 - beta1) * r
        v = beta2 * v + (1 - beta2) * r**2
        n = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        w = (1 - lr * weight_decay) * w
        w = w - lr * scale * (p @ n)
    return turn(w, side)
