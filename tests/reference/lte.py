"""LTE (Huh et al. 2024) for one linear layer, written for reading: a copy of the weight for every head, all dense.

The published method with two decisions of ours: AdamW as in torch.optim, and evaluation that sees what was not merged.
"""

from __future__ import annotations

import torch


def lte(weight, a, batches, loss, *, alpha, merge_every, lr, betas, eps, weight_decay, reset="keep"):
    """(weight, B, A, what evaluation sees after each update). a (H, r, n): where A begins.

    `loss(y, target)` of outputs y and their targets, a mean; `batches`: of (inputs, targets), H dividing each.
    """
    heads, rank, _ = a.shape
    s, w, (beta1, beta2) = alpha / rank, weight.clone(), betas
    a = [one.clone().requires_grad_() for one in a]
    b = [torch.zeros(len(w), rank, dtype=w.dtype, requires_grad=True) for _ in a]
    merged = [torch.zeros_like(w) for _ in a]  # s B' A' of each head
    m, v, t, seen = [0.0] * 2 * heads, [0.0] * 2 * heads, 0, []
    for number, (x, target) in enumerate(batches, 1):
        own = [w - merged[h] + s * b[h] @ a[h] for h in range(heads)]  # every head's weight
        y = torch.cat([part @ own[h].T for h, part in enumerate(x.chunk(heads))])
        grads = torch.autograd.grad(loss(y, target), b + a)
        with torch.no_grad():
            t += 1
            for i, (p, grad) in enumerate(zip(b + a, grads, strict=True)):
                m[i] = beta1 * m[i] + (1 - beta1) * grad
                v[i] = beta2 * v[i] + (1 - beta2) * grad**2
                p *= 1 - lr * weight_decay
                p -= lr * (m[i] / (1 - beta1**t)) / ((v[i] / (1 - beta2**t)).sqrt() + eps)
            mean = w + sum(s * b[h] @ a[h] - merged[h] for h in range(heads)) / heads
            if number % merge_every == 0:
                w, merged = mean, [s * b[h] @ a[h] for h in range(heads)]
                if reset == "drop":
                    m, v, t = [0.0] * 2 * heads, [0.0] * 2 * heads, 0
            seen.append(mean)
    return w, torch.stack(b).detach(), torch.stack(a).detach(), seen
