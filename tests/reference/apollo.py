"""APOLLO (Zhu et al. 2024) for one matrix: the raw gradient, each column scaled as Adam would scale its sketch.

`granularity` "tensor" with rank 1 is APOLLO-Mini. Bias correction stands inside the factor and `scale` enters as its
square root; the projection is Gaussian and not orthonormal.
"""

from __future__ import annotations

from .common import turn
from .fira import limited


def apollo_adamw(
    weight, gradients, refresh_at, *, rank, side, lr, betas, eps, weight_decay, scale, normal, granularity="channel",
    scale_front=False, gamma=1.01, floor=1e-3,
):  # fmt: skip
    """The weight after one step per gradient. `normal(shape, count)`: the numbers of refresh number `count`."""
    w, last, count = turn(weight, side), None, 0
    m, v = 0.0, 0.0
    beta1, beta2 = betas
    for step, grad in enumerate(gradients):
        g = turn(grad, side)
        if step in refresh_at:
            p = normal((g.shape[0], rank), count) / rank**0.5
            count += 1
        t = step + 1
        r = p.T @ g
        m = beta1 * m + (1 - beta1) * r
        v = beta2 * v + (1 - beta2) * r**2
        n = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        axis = 0 if granularity == "channel" else (0, 1)
        s = g * n.norm(dim=axis) / (r.norm(dim=axis) + 1e-8)
        if scale_front:
            s, last = limited(scale**0.5 * s, last, gamma, floor)
        else:
            s, last = limited(s, last, gamma, floor)
            s = scale**0.5 * s
        w = (1 - lr * weight_decay) * w
        w = w - lr * s
    return turn(w, side)
