"""GaLore+ (Liao et al. 2024) for one matrix, as reconstructed here: no program was published.

The basis comes from one head's gradient (or as many heads as the rank needs), and on a fixed sparse set of entries the
step is exact Adam's. Heads are equal blocks of columns once the matrix is turned.
"""

from __future__ import annotations

import torch

from .common import turn, untied
from .galore import exact


def one_svd(block, rank):
    return exact(block, rank, "left", None)[0]


def galore_plus_adamw(
    weight, gradients, refresh_at, *, rank, side, lr, betas, eps, weight_decay, scale, heads, density, residual_scale,
    normal, fit_block=one_svd,
):  # fmt: skip
    """The weight after one step per gradient. `normal((heads,), count, "head")` orders the heads."""
    w, entries, count = turn(weight, side), None, 0
    m, v, m_exact, v_exact = 0.0, 0.0, 0.0, 0.0
    beta1, beta2 = betas
    for step, grad in enumerate(gradients):
        g, t = turn(grad, side), step + 1
        if step in refresh_at:
            blocks = g.split(g.shape[1] // heads, dim=1)
            needed = -(-rank // blocks[0].shape[1])
            order = normal((heads,), count, "head").argsort().tolist()
            alive = [head for head in order if blocks[head].any()]
            chosen = sorted((alive + [head for head in order if head not in alive])[:needed])
            p = fit_block(torch.cat([blocks[head] for head in chosen], 1), rank)
            count += 1
        if entries is None:
            lost = (g - p @ (p.T @ g)).abs().reshape(-1)
            size = round(density * lost.numel())
            entries = untied(lost, size, g.abs().max()).topk(size).indices.sort().values
        r = p.T @ g
        m = beta1 * m + (1 - beta1) * r
        v = beta2 * v + (1 - beta2) * r**2
        step_low = p @ ((m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps))
        x = g.reshape(-1)[entries]
        m_exact = beta1 * m_exact + (1 - beta1) * x
        v_exact = beta2 * v_exact + (1 - beta2) * x**2
        step_exact = (m_exact / (1 - beta1**t)) / ((v_exact / (1 - beta2**t)).sqrt() + eps)
        residual = torch.zeros_like(step_low).reshape(-1)
        residual[entries] = step_exact - step_low.reshape(-1)[entries]
        w = (1 - lr * weight_decay) * w
        w = w - lr * scale * (step_low + residual_scale * residual.view_as(step_low))
    return turn(w, side)
