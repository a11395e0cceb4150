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

_DTYPES, _DEVICES = (torch.float32, torch.float64), ("cpu", "cuda")  # that kernels have


def direction(recipe: Recipe, st: State, r: Tensor, t: Clock, whole: Tensor | None) -> tuple[Tensor, Clock] | None:
    """(D, gain) in one kernel, or None. `whole`: the gradient that r was computed from, None where r came as it is."""
    kernel = _DIRECTIONS.get((type(recipe.momentum), type(recipe.scaling)))
    if kernel is None or recipe.momentum_of != "gradient" or torch.compiler.is_compiling():
        return None
    # D takes the place of r, one pass over memory less, unless r is the gradient's memory or is read again.
    spare = type(recipe.residual) is Drop and whole is not None and not _share_memory(r, whole)
    return kernel(recipe, st, r, t, spare)


def step_(recipe: Recipe, w: Tensor, g: Tensor, st: State, lr: Clock, weight_decay: float, t: Clock) -> bool:
    """The whole update of w in one kernel, or False and nothing is changed."""
    parts = (recipe.basis, recipe.momentum, recipe.scaling, recipe.residual, recipe.step_size)
    kernel = _STEPS.get(tuple(map(type, parts))) if recipe.momentum_of == "gradient" and recipe.scale == 1 else None
    return kernel is not None and kernel(recipe, w, g, st, lr, weight_decay, t)


def _adam_direction(recipe: Any, st: State, r: Tensor, t: Clock, spare: bool) -> tuple[Tensor, Clock] | None:
    m, v = st["exp_avg"], st["exp_avg_sq"]
    alike = all(x.is_contiguous() and x.dtype == r.dtype and x.device == r.device for x in (r, m, v))
    one_clock = not isinstance(t, Tensor) or t.numel() == 1
    if not (alike and one_clock and r.dtype in _DTYPES and recipe.momentum.debias):
        return None
    d = r if spare else r.clone()
    step, count = (t, 0.0) if isinstance(t, Tensor) else (None, t)
    numbers = recipe.momentum.beta, recipe.scaling.beta, recipe.scaling.eps, count
    torch.ops.lowrank_optim.projected_adam_.default(m, v, d, *numbers, step)
    return d, 1.0


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


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


_Direction = Callable[[Recipe, State, Tensor, Clock, bool], "tuple[Tensor, Clock] | None"]
_Step = Callable[[Recipe, Tensor, Tensor, State, Clock, float, Clock], bool]
_DIRECTIONS: dict[tuple[type, ...], _Direction] = {(EMA, RMS): _adam_direction}
_STEPS: dict[tuple[type, ...], _Step] = {(Identity, EMA, RMS, Drop, Constant): _adamw_}
