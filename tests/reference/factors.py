"""Functions that the loops of weight-space methods share: AdamW by hand, and products with balanced factors."""

from __future__ import annotations

import torch

from .galore import signs


class AdamW:
    """Of one matrix. Each entry has a clock of its own, so any of them can restart."""

    def __init__(self, like, lr, betas, eps, weight_decay):
        self.lr, (self.beta1, self.beta2), self.eps, self.decay = lr, betas, eps, weight_decay
        self.m, self.v, self.t = (torch.zeros_like(like) for _ in range(3))

    def step(self, x, g):
        self.t = self.t + 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        m, v = self.m / (1 - self.beta1**self.t), self.v / (1 - self.beta2**self.t)
        return (1 - self.lr * self.decay) * x - self.lr * m / (v.sqrt() + self.eps)

    def restart(self, lost=None):
        """At entries `lost`, or everywhere."""
        keep = torch.zeros_like(self.m) if lost is None else (~lost).to(self.m)
        self.m, self.v, self.t = self.m * keep, self.v * keep, self.t * keep


def balanced(w, rank):
    """(B, A) of a dense matrix, by its SVD; the largest entry of each column of B is positive."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    fixed, root = signs(u[:, :rank]), s[:rank].sqrt()
    sign = (fixed * u[:, :rank]).sum(0).sign()
    return fixed * root, (sign * root)[:, None] * vh[:rank]
