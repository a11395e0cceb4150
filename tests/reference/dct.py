"""DCT-AdamW (Modoranu et al. 2025) for one matrix: the basis is the best few atoms of a fixed orthonormal dictionary.

Changing between sets of atoms is a partial permutation, so "rotate" moves what belongs to an atom with it. An atom that
enters starts with no history: it has its own age, which corrects its bias.
"""

from __future__ import annotations

import math

import torch

from .common import strongest, turn


def dct_adamw(
    weight, gradients, refresh_at, *, rank, side, lr, betas, eps, weight_decay, scale, dictionary="dct2", norm="l2",
    error_feedback=False, moments="rotate",
):  # fmt: skip
    """The weight after one step per gradient. `norm`: how an atom's coefficients are ranked, "l1" or "l2"."""
    w, atoms = turn(weight, side), None
    d = matrix(dictionary, w.shape[0]).to(w)
    e = torch.zeros_like(w)
    beta1, beta2 = betas
    for step, grad in enumerate(gradients):
        a = turn(grad, side) + e
        if step in refresh_at:
            s = d.T @ a
            score = (s**2).sum(1) if norm == "l2" else s.abs().sum(1)
            old, atoms = atoms, strongest(score, rank).tolist()
            if old is None or moments == "reset":
                m, v, age = torch.zeros_like(a[:rank]), torch.zeros_like(a[:rank]), torch.zeros_like(a[:rank, :1])
            elif moments == "rotate":
                m, v, age = (moved(x, old, atoms) for x in (m, v, age))
        p = d[:, atoms]
        r = p.T @ a
        if error_feedback:
            e = a - p @ r
        age = age + 1
        m = beta1 * m + (1 - beta1) * r
        v = beta2 * v + (1 - beta2) * r**2
        n = (m / (1 - beta1**age)) / ((v / (1 - beta2**age)).sqrt() + eps)
        w = (1 - lr * weight_decay) * w
        w = w - lr * scale * (p @ n)
    return turn(w, side)


def moved(x, old, new):
    """Row `slot` of the result is the row that the atom had before, or zeros for an atom that enters."""
    return torch.stack([x[old.index(atom)] if atom in old else torch.zeros_like(x[0]) for atom in new])


def matrix(dictionary, m):
    """m x m, atoms in columns, float64. The argument is reduced in integers, so large m lose nothing."""
    if dictionary == "identity":
        return torch.eye(m, dtype=torch.float64)
    rows = [[math.cos(math.pi * (k * (2 * j + 1) % (4 * m)) / (2 * m)) for k in range(m)] for j in range(m)]
    d = torch.tensor(rows, dtype=torch.float64) * (2 / m) ** 0.5
    d[:, 0] *= 0.5**0.5
    return d if dictionary == "dct2" else d.T
