"""Combinations of parts for which one kernel exists. Same numbers to rounding, fewer passes over memory.

A table from the types of parts to a function, so that neither the engine nor the parts know of it. Each function says
by its result whether it could do the work; where it could not, the parts do it one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..recipe import Clock, Recipe, State
from .basis import Identity
from .momentum import EMA
from .residual import Drop
from .scaling import RMS
from .step_size import Constant

_DTYPES, _DEVICES = (torch.float32, torch.float64), ("cpu", "cuda")  # that torch's fused AdamW has


def direction(recipe: Recipe, st: State, r: Tensor, t: Clock) -> tuple[Tensor, Clock] | None:
    """(D, gain) in one kernel, or None."""
    kernel = _DIRECTIONS.get((type(recipe.momentum), type(recipe.scaling)))
    return kernel(recipe, st, r, t) if kernel and recipe.momentum_of == "gradient" else None


def step_(recipe: Recipe, w: Tensor, g: Tensor, st: State, lr: Clock, weight_decay: float, t: Clock) -> bool:
    """The whole update of w in one kernel, or False and nothing is changed."""
    parts = (recipe.basis, recipe.momentum, recipe.scaling, recipe.residual, recipe.step_size)
    kernel = _STEPS.get(tuple(map(type, parts))) if recipe.momentum_of == "gradient" and recipe.scale == 1 else None
    return kernel is not None and kernel(recipe, w, g, st, lr, weight_decay, t)


def _adam_direction(recipe: Any, st: State, r: Tensor, t: Clock) -> tuple[Tensor, Clock] | None:
    """AdamW with lr 1 on a tensor of zeros moves it by minus the direction."""
    d = torch.zeros_like(r)
    return (d, -1.0) if _adamw_(recipe, d, r, st, 1.0, 0.0, t) else None


def _adamw_(recipe: Any, w: Tensor, g: Tensor, st: State, lr: Clock, weight_decay: float, t: Clock) -> bool:
    """torch's fused AdamW. It walks tensors flat, whatever their strides, so all must be laid out alike."""
    m, v = st["exp_avg"], st["exp_avg_sq"]
    alike = all(x.is_contiguous() and x.dtype == w.dtype for x in (w, g, m, v))
    supported = w.dtype in _DTYPES and w.device.type in _DEVICES
    one_clock = not isinstance(t, Tensor) or t.dim() == 0
    if torch.compiler.is_compiling() or not (alike and supported and one_clock and recipe.momentum.debias):
        return False
    step = t.float() if isinstance(t, Tensor) else torch.tensor(t, device=w.device)
    torch._fused_adamw_(
        [w], [g], [m], [v], [], [step],
        lr=lr, beta1=recipe.momentum.beta, beta2=recipe.scaling.beta, weight_decay=weight_decay, eps=recipe.scaling.eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip
    return True


_Direction = Callable[[Recipe, State, Tensor, Clock], "tuple[Tensor, Clock] | None"]
_Step = Callable[[Recipe, Tensor, Tensor, State, Clock, float, Clock], bool]
_DIRECTIONS: dict[tuple[type, ...], _Direction] = {(EMA, RMS): _adam_direction}
_STEPS: dict[tuple[type, ...], _Step] = {(Identity, EMA, RMS, Drop, Constant): _adamw_}
