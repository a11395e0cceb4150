"""Flora (Hao et al. 2024) for one matrix: the momentum lives in a random sketch that is drawn again now and then.

The step uses the present gradient (Adafactor: the present normalised gradient) as it is, and only the past through the
sketch. The AdamW base is ours: its second moment is full. Transfer to a new sketch happens before the step.
"""

from __future__ import annotations

import torch

from .common import orthonormal as positive_qr
from .common import rms, turn


def flora(
    weight, gradients, refresh_at, *, rank, side, lr, betas, eps, weight_decay, scale, normal, base="adafactor",
    decay=-0.8, factored_eps=1e-30, clip=1.0, floor=1e-3, scale_parameter=True, orthonormal=False,
):  # fmt: skip
    """The weight after one step per gradient. `eps` and betas[1] are those of AdamW; Adafactor uses the rest."""
    w, p, count = turn(weight, side), None, 0
    big_m = torch.zeros(rank, w.shape[1]).to(w)
    v, row, col = 0.0, 0.0, 0.0
    beta1, beta2 = betas
    for step, grad in enumerate(gradients):
        g, t = turn(grad, side), step + 1
        if step in refresh_at:
            old, p = p, normal((g.shape[0], rank), count)
            p = positive_qr(p) if orthonormal else p / rank**0.5
            if old is not None:
                big_m = p.T @ (old @ big_m)
            count += 1
        if base == "adafactor":
            weight_of_new = t**decay
            row = row + weight_of_new * ((g**2).mean(1, keepdim=True) - row)
            col = col + weight_of_new * ((g**2).mean(0, keepdim=True) - col)
            factored = row @ col / row.mean().clamp(min=factored_eps)
            u = g / factored.clamp(min=factored_eps**2).sqrt()
            applied = beta1 * (p @ big_m) + (1 - beta1) * u
            big_m = beta1 * big_m + (1 - beta1) * (p.T @ u)
            applied = applied / max(1.0, rms(applied) / clip)
            a = lr * max(floor, rms(w)) if scale_parameter else lr
        else:
            v = beta2 * v + (1 - beta2) * g**2
            numerator = beta1 * (p @ big_m) + (1 - beta1) * g
            big_m = beta1 * big_m + (1 - beta1) * (p.T @ g)
            applied = numerator / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
            a = lr
        w = (1 - lr * weight_decay) * w
        w = w - a * scale * applied
    return turn(w, side)
