"""FRUGAL (Zmushko et al. 2024) for one matrix: Adam on a few rows, the sign of the gradient on all the others.

New rows are drawn at every refresh, or are those with the largest gradient, and the moments start again.
"""

from __future__ import annotations

from .common import strongest, turn


def frugal(
    weight, gradients, refresh_at, *, rank, side, lr, betas, eps, weight_decay, scale, normal, ratio, choose="random"
):  # fmt: skip
    """The weight after one step per gradient. `ratio`: size of the stateless step relative to Adam's."""
    w, count = turn(weight, side), 0
    beta1, beta2 = betas
    for step, grad in enumerate(gradients):
        g = turn(grad, side)
        if step in refresh_at:
            if choose == "random":
                rows = normal((g.shape[0],), count).topk(rank).indices.sort().values
            else:
                rows = strongest((g**2).sum(1), rank)
            m, v, t = 0.0, 0.0, 0
            count += 1
        t += 1
        r = g[rows]
        m = beta1 * m + (1 - beta1) * r
        v = beta2 * v + (1 - beta2) * r**2
        u = ratio * g.sign()
        u[rows] = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        w = (1 - lr * weight_decay) * w
        w = w - lr * scale * u
    return turn(w, side)
