"""Q-GaLore's optimizer (Zhang et al. 2024) for one matrix: GaLore with a quantized basis, refitted ever more rarely.

Whether the basis still moves is judged by the overlap of whole bases (the paper's words), not of first vectors (its
program). The quantized weight is not part of this loop.
"""

from __future__ import annotations

from .common import turn
from .galore import exact


def q_galore_adamw(
    weight, gradients, refresh_at, *, rank, side, lr, betas, eps, weight_decay, scale, gap, threshold, queue=5,
    quantize=lambda p: p, fit=exact, refreshed=None,
):  # fmt: skip
    """The weight after one step per gradient; `refreshed` collects the steps before which the basis was refitted.

    `refresh_at` is ignored. `quantize`: a basis as it reads after being stored in few bits.
    """
    w, p, last, overlaps = turn(weight, side), None, None, []
    m, v = 0.0, 0.0
    beta1, beta2 = betas
    for step, grad in enumerate(gradients):
        g, t = turn(grad, side), step + 1
        if p is None or step // gap > last // gap:
            old, p, last = p, quantize(fit(g, rank, "left", p if p is None else (p, None))[0]), step
            if refreshed is not None:
                refreshed.append(step)
            if old is not None:
                overlaps = [*overlaps, float((p.T @ old).pow(2).sum()) / rank][-queue:]
                if len(overlaps) == queue and sum(overlaps) / queue >= threshold:
                    gap *= 2
        r = p.T @ g
        m = beta1 * m + (1 - beta1) * r
        v = beta2 * v + (1 - beta2) * r**2
        n = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        w = (1 - lr * weight_decay) * w
        w = w - lr * scale * (p @ n)
    return turn(w, side)
