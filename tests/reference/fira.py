"""Fira (Chen et al. 2024) for one matrix: GaLore, plus what the projection drops, scaled column by column.

Mode "paper" is the published formula; mode "code" is the published program, which forms the residual with the scaled
back-projection and does not scale the residual's step. The limiter's floor is ours: one (nearly) zero gradient would
otherwise hold the residual near zero for hundreds of steps.
"""

from __future__ import annotations

from .common import carried, rms, turn
from .galore import exact


def fira_adamw(
    weight, gradients, refresh_at, *, rank, side, lr, betas, eps, weight_decay, scale, fit=exact, gamma=1.01,
    floor=1e-3, mode="paper", moments="keep",
):  # fmt: skip
    """The weight after one step per gradient. `fit` is called with side "left"; gamma None: no limiter."""
    w, basis, last = turn(weight, side), None, None
    m, v, t = 0.0, 0.0, 0
    beta1, beta2 = betas
    for step, grad in enumerate(gradients):
        g = turn(grad, side)
        if step in refresh_at:
            old, basis = basis, fit(g, rank, "left", basis)
            p = basis[0]
            if old is not None:
                m, v, t = carried(moments, m, v, t, old[0], p, betas)
        t += 1
        r = p.T @ g
        m = beta1 * m + (1 - beta1) * r
        v = beta2 * v + (1 - beta2) * r**2
        n = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        s = g - (p @ r if mode == "paper" else scale * (p @ r))
        s = s * n.norm(dim=0) / (r.norm(dim=0) + 1e-8)
        s, last = limited(s, last, gamma, floor)
        w = (1 - lr * weight_decay) * w
        w = w - lr * (scale * (p @ n + s) if mode == "paper" else scale * (p @ n) + s)
    return turn(w, side)


def limited(s, last, gamma, floor):
    """S grown by at most gamma over the last size, and the size to compare the next one with.

    A size below the floor is not remembered: the one before it stays.
    """
    if gamma is None:
        return s, None
    size = rms(s)
    if last is not None and size > gamma * last:
        s, size = s * (gamma * last / size), gamma * last
    return s, (size if size >= floor else last)
