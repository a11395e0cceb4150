"""Sparse spectral training (Zhao et al. 2024) for one matrix, with dense gradients and singular vectors as columns."""

from __future__ import annotations

import math

import torch

from .common import decomposed


def adam(moments, grad, betas, eps):
    """One bias-corrected direction; `moments` is [m, v, t]."""
    moments[2] += 1
    moments[0] = betas[0] * moments[0] + (1 - betas[0]) * grad
    moments[1] = betas[1] * moments[1] + (1 - betas[1]) * grad**2
    m, v = moments[0] / (1 - betas[0] ** moments[2]), moments[1] / (1 - betas[1] ** moments[2])
    return m / (v.sqrt() + eps)


def draw(sigma, rank, uniforms):
    """Without replacement, by p = 1/2 (1/k + sigma / sum): the first of exponential clocks with rates p to ring."""
    p = 0.5 * (1 / len(sigma) + sigma / sigma.sum()) if sigma.sum() > 0 else torch.ones_like(sigma)
    rings = [-math.log(u) / float(rate) for u, rate in zip(uniforms, p, strict=True)]
    return sorted(sorted(range(len(sigma)), key=rings.__getitem__)[:rank])


def sst(
    weight, gradient, steps, *, rank, lr, betas, eps, weight_decay, iteration_steps, iterations, uniforms, normal
):  # fmt: skip
    """The weight before and after each step; `gradient(step, W)` is dense, `uniforms(i)` are those of draw i.

    `normal(shape)`: see `decomposed`.
    """
    u, sigma, v = decomposed(weight, normal)
    iterations = iterations or math.ceil(len(sigma) / rank)
    of_sigma, of_u, of_v = [0.0, 0.0, 0], [0.0, 0.0, 0], [0.0, 0.0, 0]
    s = draw(sigma, rank, uniforms(0))
    history = [u @ sigma.diag() @ v.T]
    for step in range(steps):
        g = gradient(step, history[-1])
        g_sigma, g_u, g_v = (u.T @ g @ v).diagonal(), g @ v[:, s], g.T @ u[:, s]
        keep = 1 - lr * weight_decay
        sigma = (keep * sigma - lr * adam(of_sigma, g_sigma, betas, eps)).clamp(min=0)
        for x, moments, grad in ((u, of_u, g_u), (v, of_v, g_v)):
            new = keep * x[:, s] - lr * adam(moments, grad, betas, eps)
            x[:, s] = new / new.norm(dim=0)
        if (step + 1) % iteration_steps == 0:
            count = (step + 1) // iteration_steps
            if count % iterations == 0:
                u, sigma, v = decomposed(u @ sigma.diag() @ v.T, normal)
                of_sigma = [0.0, 0.0, 0]
            s, of_u, of_v = draw(sigma, rank, uniforms(count)), [0.0, 0.0, 0], [0.0, 0.0, 0]
        history.append(u @ sigma.diag() @ v.T)
    return history
