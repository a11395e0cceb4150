"""Adafactor's whole update of a plain matrix on a CPU, without a second matrix.

Adafactor divides G `(m, n)` by the root of a second moment of rank one, which is a factor per row times a factor per
column. The parts make the quotient as a matrix. Here the factors are applied in passing: G is read three times, W
twice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.schema import kernel
from ..parts.basis import Identity
from ..parts.momentum import EMA, NoMomentum
from ..parts.residual import Drop
from ..parts.scaling import Factored
from ..recipe.algebra import WHOLE
from ..recipe.recipe import Clock, State

_DTYPES = torch.float32, torch.float64


def has(recipe: Any) -> bool:
    """Whether these are the parts of Adafactor, which scales the gradient before it averages."""
    parts = type(recipe.basis), type(recipe.scaling), type(recipe.residual)
    averages = type(recipe.momentum) in (EMA, NoMomentum) and recipe.momentum_of == "update"
    return parts == (Identity, Factored, Drop) and averages and recipe.scale == 1


def suits(recipe: Any, w: Tensor, g: Tensor, st: State, t: Clock) -> bool:
    """Whether the kernel can update w: one matrix on a CPU, with contiguous tensors of one dtype, and t on the host."""
    if not has(recipe) or isinstance(t, Tensor) or w.dim() != 2 or w.device.type != "cpu":
        return False
    tensors = [w, g, *([st["exp_avg"]] if type(recipe.momentum) is EMA else [])]
    return w.dtype in _DTYPES and all(x.dtype == w.dtype and x.is_contiguous() for x in tensors)


def step_(recipe: Any, w: Tensor, g: Tensor, st: State, lr: float, weight_decay: float, t: float) -> None:
    """Update w in four passes: the means of G, the size of its update, the size of W, and the move of W."""
    momentum, scaling = recipe.momentum, recipe.scaling
    factors = scaling.factors_(WHOLE, st, g, t)
    length = float(recipe.step_size(WHOLE, lr, w, t))
    gain = 1.0
    # Clipping divides by the root mean square of the update, if that is above `clip`. Its energy is a sum over G and
    # the factors (m, 1) and (1, n), so the update itself is not made.
    if scaling.clip is not None:
        gain /= max(1.0, math.sqrt(float(ops.factored_energy(g, factors)) / max(1, g.numel())) / scaling.clip)
    # The average m <- beta m + (1 - beta) U runs in the kernel, too. `gain` scales U, `length` what is taken from W.
    mean, beta = None, 0.0
    if type(momentum) is EMA:
        mean, beta = st["exp_avg"], momentum.beta
        gain, length = gain * (1 - beta), length * float(momentum.gain(t))
    keep = 1 - lr * weight_decay
    kernel("step_factored_")(w, mean, g, *factors, beta, gain, length, keep)
