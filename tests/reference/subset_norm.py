"""Subset-Norm, Subspace-Momentum and both together (Nguyen and Nguyen 2024) for one matrix.

Subset-Norm: one second moment for a run of rows within a column. Subspace-Momentum: momentum for the projected part of
the gradient only, and the rest of the gradient as it is. Bias corrections are ours, as in AdamW; so is the mean.
"""

from __future__ import annotations

import torch

from .common import turn
from .galore import exact


def subset_norm_adamw(
    weight, gradients, refresh_at, *, rank, side, lr, betas, eps, weight_decay, scale, size=None, reduce="sum"
):  # fmt: skip
    """The weight after one step per gradient. `rank` and `refresh_at` are ignored: nothing is projected."""
    w, m, v = turn(weight, side), 0.0, 0.0
    beta1, beta2 = betas
    for step, grad in enumerate(gradients):
        g, t = turn(grad, side), step + 1
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * subsets(g, size, reduce)
        root = spread((v / (1 - beta2**t)).sqrt(), size, g.shape[0])
        w = (1 - lr * weight_decay) * w
        w = w - lr * scale * (m / (1 - beta1**t)) / (root + eps)
    return turn(w, side)


def subspace_momentum(
    weight, gradients, refresh_at, *, rank, side, fit=exact, lr, beta, weight_decay, scale, moments="reset"
):  # fmt: skip
    """The weight after one step per gradient, with momentum in the subspace and no second moment."""
    w, basis = turn(weight, side), None
    m, t = 0.0, 0
    for step, grad in enumerate(gradients):
        g = turn(grad, side)
        if step in refresh_at:
            old, basis = basis, fit(g, rank, "left", basis)
            m, t = momentum_carried(moments, m, t, old, basis)
        p = basis[0]
        t += 1
        m = beta * m + (1 - beta) * (p.T @ g)
        w = (1 - lr * weight_decay) * w
        w = w - lr * scale * (p @ (m / (1 - beta**t)) + g - p @ (p.T @ g))
    return turn(w, side)


def snsm_adamw(
    weight, gradients, refresh_at, *, rank, side, fit=exact, lr, betas, eps, weight_decay, scale, size=None,
    reduce="sum", moments="reset",
):  # fmt: skip
    """The weight after one step per gradient. The second moment's clock never restarts; the momentum's does."""
    w, basis = turn(weight, side), None
    m, v, t = 0.0, 0.0, 0
    beta1, beta2 = betas
    for step, grad in enumerate(gradients):
        g = turn(grad, side)
        if step in refresh_at:
            old, basis = basis, fit(g, rank, "left", basis)
            m, t = momentum_carried(moments, m, t, old, basis)
        p = basis[0]
        t += 1
        m = beta1 * m + (1 - beta1) * (p.T @ g)
        v = beta2 * v + (1 - beta2) * subsets(g, size, reduce)
        numerator = p @ (m / (1 - beta1**t)) + g - p @ (p.T @ g)
        root = spread((v / (1 - beta2 ** (step + 1))).sqrt(), size, g.shape[0])
        w = (1 - lr * weight_decay) * w
        w = w - lr * scale * numerator / (root + eps)
    return turn(w, side)


def subsets(g, size, reduce):
    """Sum or mean of squares over every run of `size` rows of a column; None: over whole columns."""
    parts = (g**2).split(size or g.shape[0])
    return torch.stack([part.sum(0) if reduce == "sum" else part.mean(0) for part in parts])


def spread(x, size, m):
    """One value per subset, back to one per row."""
    return x.repeat_interleave(size or m, 0)[:m]


def momentum_carried(moments, m, t, old, new):
    if moments == "reset" or old is None:
        return 0.0, 0
    return (new[0].T @ (old[0] @ m), t) if moments == "rotate" else (m, t)
