"""Adafactor's whole update of a plain matrix: G is read three times, W twice, and no matrix is made."""

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
    """Are these the parts of Adafactor, scaling before it averages?"""
    parts = type(recipe.basis), type(recipe.scaling), type(recipe.residual)
    averages = type(recipe.momentum) in (EMA, NoMomentum) and recipe.momentum_of == "update"
    return parts == (Identity, Factored, Drop) and averages and recipe.scale == 1


def suits(recipe: Any, w: Tensor, g: Tensor, st: State, t: Clock) -> bool:
    """Is it one matrix that lies in the memory of a CPU without gaps, and all that is beside it, and is t known?"""
    if not has(recipe) or isinstance(t, Tensor) or w.dim() != 2 or w.device.type != "cpu":
        return False
    tensors = [w, g, *([st["exp_avg"]] if type(recipe.momentum) is EMA else [])]
    return w.dtype in _DTYPES and all(x.dtype == w.dtype and x.is_contiguous() for x in tensors)


def step_(recipe: Any, w: Tensor, g: Tensor, st: State, lr: float, weight_decay: float, t: float) -> None:
    """One pass for the means of G, one for the size of its update, one for that of W, and one that moves W."""
    momentum, scaling = recipe.momentum, recipe.scaling
    factors = scaling.factors_(WHOLE, st, g, t)
    length = float(recipe.step_size(WHOLE, lr, w, t))
    gain = 1.0
    if scaling.clip is not None:
        gain /= max(1.0, math.sqrt(float(ops.factored_energy(g, factors)) / max(1, g.numel())) / scaling.clip)
    mean, beta = None, 0.0
    if type(momentum) is EMA:
        mean, beta = st["exp_avg"], momentum.beta
        gain, length = gain * (1 - beta), length * float(momentum.gain(t))
    keep = 1 - lr * weight_decay
    kernel("step_factored_")(w, mean, g, *factors, beta, gain, length, keep)
