"""GaLore (Zhao et al. 2024, algorithm 2) for one matrix, written for reading.

The published algorithm with four decisions of ours: AdamW as in torch.optim (decay first, eps after bias correction),
fixed signs of singular vectors, an optional rotation or reset of the moments, and a basis that may be approximate.
"""

from __future__ import annotations

import torch
from torch import Tensor


def galore_adamw(
    weight, gradients, refresh_at, *, rank, side, fit, lr, betas, eps, weight_decay, scale, moments="keep"
):  # fmt: skip
    """The weight after one step per gradient. `refresh_at`: steps (0, 1, ...) before which the basis is refitted."""
    w, basis, t = weight.clone(), None, 0
    beta1, beta2 = betas
    for step, grad in enumerate(gradients):
        if step in refresh_at:
            old, basis = basis, fit(grad, rank, side, basis)
            if old is None:
                m = torch.zeros_like(down(grad, basis))
                v = torch.zeros_like(m)
            elif moments == "rotate":
                m, v = rotate(m, v, old, basis, 1 - beta1**t, 1 - beta2**t)
            elif moments == "reset":
                m, v, t = torch.zeros_like(m), torch.zeros_like(v), 0
        t += 1
        r = down(grad, basis)
        m = beta1 * m + (1 - beta1) * r
        v = beta2 * v + (1 - beta2) * r**2
        n = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        w = w - lr * weight_decay * w
        w = w - lr * scale * up(n, basis)
    return w


def galore_adafactor(
    weight, gradients, refresh_at, *, rank, side, fit, lr, decay, eps, d, weight_decay, scale, beta1, parameter,
    relative,
):  # fmt: skip
    """GaLore with Adafactor (Shazeer and Stern 2018, algorithm 4, in torch's form) in the subspace."""
    w, basis = weight.clone(), None
    for step, grad in enumerate(gradients):
        t = step + 1
        if step in refresh_at:
            basis = fit(grad, rank, side, basis)
        r = down(grad, basis)
        if step == 0:
            row, col, average = torch.zeros_like(r[:, :1]), torch.zeros_like(r[:1]), torch.zeros_like(r)
        weight_of_new = t**decay
        row = row + weight_of_new * ((r**2).mean(1, keepdim=True) - row)
        col = col + weight_of_new * ((r**2).mean(0, keepdim=True) - col)
        v = row @ col / row.mean().clamp(min=eps[0])
        u = r / v.clamp(min=eps[0] ** 2).sqrt()
        u = u / max(1.0, float(u.pow(2).mean().sqrt()) / d)
        if beta1 is not None:
            u = average = beta1 * average + (1 - beta1) * u
        a = min(lr, t**-0.5) if relative else lr
        a = a * max(eps[1], float(w.pow(2).mean().sqrt())) if parameter else a
        w = w - lr * weight_decay * w
        w = w - a * scale * up(u, basis)
    return w


def down(grad, basis):
    left, right = basis
    r = grad if left is None else left.T @ grad
    return r if right is None else r @ right


def up(n, basis):
    left, right = basis
    u = n if left is None else left @ n
    return u if right is None else u @ right.T


def rotate(m, v, old, new, correction1, correction2):
    """m exactly; of v only the variance around the mean, since a rotation mixes variances and not squares."""

    def turned(x, power):
        for which in (0, 1):
            if old[which] is not None:
                c = (new[which].T @ old[which]) ** power
                x = c @ x if which == 0 else x @ c.T
        return x

    mean = m / correction1
    variance = (v / correction2 - mean**2).clamp(min=0)
    return turned(m, 1), (turned(variance, 2) + turned(mean, 1) ** 2) * correction2


def exact(grad, rank, side, old):
    """(left, right) singular vectors with positive largest entries; None on a side that is not projected."""
    u, _, vt = torch.linalg.svd(grad, full_matrices=False)
    left = signs(u[:, :rank]) if side in ("left", "full") else None
    right = signs(vt[:rank].T) if side in ("right", "full") else None
    return left, right


def randomized(normal):
    """Subspace iteration with Householder QR: two rounds from a sketch at first, one from the old basis later.

    `normal(shape, count)` draws the numbers of refresh number `count`.
    """
    count = 0

    def fit(grad, rank, side, old):
        nonlocal count
        g = grad if side == "left" else grad.T
        m, n = g.shape
        width = min(rank + 16, m, n)
        if old is None:
            y = g @ normal((n, width), count)
        else:
            y = torch.cat([old[side == "right"], normal((m, width - rank), count) / m**0.5], 1)
        for _ in range(2 if old is None else 1):
            y = g @ torch.linalg.qr(g.T @ torch.linalg.qr(y)[0])[0]
        basis = signs(torch.linalg.svd(y, full_matrices=False)[0][:, :rank])
        count += 1
        return (basis, None) if side == "left" else (None, basis)

    return fit


def signs(basis: Tensor) -> Tensor:
    """The largest entry of each column positive, the first of those that rounding makes equal."""
    nearly = 1 - (2.0**-30 if basis.dtype == torch.float64 else 2.0**-14)
    large = basis.abs() >= nearly * basis.abs().amax(0, keepdim=True)
    pivot = basis.gather(0, large.int().argmax(0, keepdim=True))
    return torch.where(pivot < 0, -basis, basis)
