"""GoLore (He et al. 2024) for one matrix: GaLore whose basis becomes a random one late in training.

Near a minimum the leading singular vectors of a gradient are those of its noise; a random basis still sees the rest.
"""

from __future__ import annotations

from .common import carried, orthonormal, turn
from .galore import exact


def golore_adamw(
    weight, gradients, refresh_at, *, rank, side, lr, betas, eps, weight_decay, scale, normal, random_after, fit=exact,
    moments="rotate",
):  # fmt: skip
    """The weight after one step per gradient. Refreshes before steps >= `random_after` draw their basis."""
    w, basis, count = turn(weight, side), None, 0
    m, v, t = 0.0, 0.0, 0
    beta1, beta2 = betas
    for step, grad in enumerate(gradients):
        g = turn(grad, side)
        if step in refresh_at:
            old = basis
            if step < random_after:
                basis = fit(g, rank, "left", old)
            else:
                basis = orthonormal(normal((g.shape[0], rank), count)), None
            p = basis[0]
            if old is not None:
                m, v, t = carried(moments, m, v, t, old[0], p, betas)
            count += 1
        t += 1
        r = p.T @ g
        m = beta1 * m + (1 - beta1) * r
        v = beta2 * v + (1 - beta2) * r**2
        n = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        w = (1 - lr * weight_decay) * w
        w = w - lr * scale * (p @ n)
    return turn(w, side)
