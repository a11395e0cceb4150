"""ReLoRA (Lialin et al. 2023) for one matrix: AdamW on factors that are merged into a frozen weight now and then.

Only B starts at zero (the published program zeroes A too, and then nothing is trained until the first merge), and a
partial reset takes both moments and the step count at the same entries.
"""

from __future__ import annotations

import math

import torch

from .factors import AdamW


def relora(
    weight, gradient, steps, *, rank, alpha, merge_every, draw, reset="drop", reset_ratio=1.0, chosen=None,
    rounded=None, exact_base=False, **adamw,
):  # fmt: skip
    """The weight after each step.

    `gradient(w, step)`; `draw(count)`: A number `count`; `chosen(name, step)`: uniform numbers in the shape of a
    factor; `rounded(w, count)`: the weight as the base keeps it after that many merges.
    """
    s, weights = alpha / rank, []
    rounded = rounded or (lambda w, count: w)
    exact, base = weight, rounded(weight, 0)
    factors = {"B": weight.new_zeros(len(weight), rank), "A": draw(0)}
    rules = {name: AdamW(x, **adamw) for name, x in factors.items()}
    for step in range(steps):
        b, a = factors["B"], factors["A"]
        g = gradient(base + s * b @ a, step)
        factors = {"B": rules["B"].step(b, s * g @ a.T), "A": rules["A"].step(a, s * b.T @ g)}
        if (step + 1) % merge_every == 0:
            count = (step + 1) // merge_every
            update = s * factors["B"] @ factors["A"]
            exact = exact + update
            base = rounded(exact if exact_base else base + update, count)
            factors = {"B": torch.zeros_like(b), "A": draw(count)}
            for name, rule in rules.items():
                if reset == "drop":
                    lost = None
                elif reset == "magnitude":
                    count = math.floor(reset_ratio * rule.m.numel())
                    lost = rule.m.abs() <= rule.m.abs().flatten().sort().values[count - 1]
                else:
                    lost = chosen(name, step + 1) < reset_ratio
                rule.restart(lost)
        weights.append(base + s * factors["B"] @ factors["A"])
    return weights
