"""LoQT (Loeschcke et al. 2024) for one matrix: a rounded weight, and AdamW on one factor of its update.

The other factor P is rounded too, and consists of the leading singular vectors of a whole gradient, on the shorter
side. Compensation is the version that minimizes the distance to the weight; the printed one oscillates. The batch of a
new subspace trains the factor, and moments restart there; the published program does neither.
"""

from __future__ import annotations

import torch

from .common import TIE
from .factors import AdamW


def times(tau, psi, until):
    """Steps before which a new subspace is taken: gaps tau, tau + [psi], tau + [psi^2], ..."""
    found, k = [0, tau], 0
    while found[-1] < until:
        k += 1
        found.append(found[-1] + tau + (int(psi**k) if psi > 1 else 0))
    return [time for time in found if time < until]


def compensated(w, p, rounded, iterations):
    """(Q, B) with Q + B P close to w, and the errors of the iterations."""
    target, errors = w, [torch.linalg.norm(w - rounded(w))]
    best = rounded(w), w.new_zeros(len(w), len(p))
    for _ in range(iterations):
        q = rounded(target)
        b = (w - q) @ torch.linalg.pinv(p)
        error = torch.linalg.norm(w - q - b @ p)
        if error < min(errors) * (1 - TIE * torch.finfo(w.dtype).eps):
            best = q, b
        errors.append(error)
        target = w - b @ p
    return best, errors


def loqt(
    weight, gradient, steps, at, *, rank, scale, compensation, signs, rounded=lambda x: x, moments="reset", **adamw
):
    """The weight after each step. `at`: steps before which a new subspace is taken; `signs`: makes vectors unique."""
    wide = weight.shape[1] > weight.shape[0]

    def turned(x):
        return x.T if wide else x

    def kept(x):
        return turned(rounded(turned(x)))

    q, weights = kept(turned(weight)), []
    p, b = q.new_zeros(rank, q.shape[1]), q.new_zeros(len(q), rank)
    rule = AdamW(b, **adamw)
    for step in range(steps):
        w = q + scale * b @ p
        g = turned(gradient(turned(w), step))
        if step in at:
            p = kept(signs(torch.linalg.svd(g, full_matrices=False).Vh[:rank].T).T)
            (q, b), _ = compensated(w, scale * p, kept, compensation)
            if moments == "reset":
                rule.restart()
        b = rule.step(b, scale * g @ p.T)
        weights.append(turned(q + scale * b @ p))
    return weights
