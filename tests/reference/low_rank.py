"""Low-rank training with restarts (Glentis et al. 2025) for one matrix: AdamW on two factors, which share the singular
values of their product evenly again from time to time, and whose moments restart from time to time."""

from __future__ import annotations

from .factors import AdamW, balanced


def low_rank(weight, gradient, steps, *, rank, alpha, refactor_every, reset_every, init="spectral", draw=None, **adamw):
    """The weight after each step. `draw()`: B and A for init "random"."""
    s, weights = alpha / rank, []
    b, a = balanced(weight / s, rank) if init == "spectral" else draw()
    rules = [AdamW(x, **adamw) for x in (b, a)]
    for step in range(steps):
        g = gradient(s * b @ a, step)
        b, a = rules[0].step(b, s * g @ a.T), rules[1].step(a, s * b.T @ g)  # both at once
        if refactor_every and (step + 1) % refactor_every == 0:
            b, a = balanced(b @ a, rank)
        if reset_every and (step + 1) % reset_every == 0:
            for rule in rules:
                rule.restart()
        weights.append(s * b @ a)
    return weights
