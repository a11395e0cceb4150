"""SLTrain (Han et al. 2024, section 3) for one matrix, with the restarts of Glentis et al. 2025, written for reading.

W = s B A + S is formed as a whole, and so is its gradient. Adam is torch's AdamW, with a clock that resets restart.
"""

from __future__ import annotations

import torch

from .galore import signs


def sltrain(
    b, a, values, support, batches, *, alpha, lr, betas, eps, weight_decay, refactor_every=None, reset_every=None
):  # fmt: skip
    """(B, A, values) after one step per (x, target) on the mean squared error of x W^T."""
    s, beta1, beta2 = alpha / len(a), *betas
    thetas = [b.clone(), a.clone(), values.clone()]
    moments, t = [[torch.zeros_like(x), torch.zeros_like(x)] for x in thetas], 0
    for step, (x, target) in enumerate(batches, start=1):
        b, a, values = thetas
        y = x @ dense(b, a, values, support, s).T
        gradient = (2 * (y - target) / y.numel()).T @ x
        gradients = s * gradient @ a.T, s * b.T @ gradient, gradient.flatten()[support]
        t += 1
        for i, g in enumerate(gradients):
            m, v = moments[i]
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            moments[i] = [m, v]
            update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
            thetas[i] = (1 - lr * weight_decay) * thetas[i] - lr * update
        if refactor_every and step % refactor_every == 0:
            thetas[:2] = refactored(*thetas[:2])
        if reset_every and step % reset_every == 0:
            moments, t = [[torch.zeros_like(x), torch.zeros_like(x)] for x in thetas], 0
    return thetas


def dense(b, a, values, support, s):
    w = s * b @ a
    w.view(-1)[support] += values
    return w


def refactored(b, a):
    """B A = U Z V^T shared out evenly, the largest entry of each column of U positive."""
    u, z, vt = torch.linalg.svd(b @ a, full_matrices=False)
    u, z, vt = u[:, : len(a)], z[: len(a)], vt[: len(a)]
    fixed = signs(u)
    sign = (fixed * u).sum(0).sign()
    return fixed * z.sqrt(), (sign * z.sqrt())[:, None] * vt
