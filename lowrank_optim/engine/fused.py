"""Combinations of parts for which one kernel exists. Same numbers to rounding, fewer passes over memory.

Tables from the types of parts, and of the stores that keep their tensors, to functions, so that neither the engine nor
the parts know of it. Each function says by its result whether it could do the work; where it could not, the parts do it
one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..ops import quantize
from ..ops.philox import Places, numbers_of
from ..parts.basis import Identity
from ..parts.momentum import EMA
from ..parts.residual import Drop
from ..parts.scaling import RMS
from ..parts.step_size import Constant
from ..parts.store import BFloat16, Float32, Int8
from ..recipe.algebra import WHOLE, Algebra
from ..recipe.recipe import AGE, Clock, Recipe, State
from ..recipe.store import Spec
from . import fused_factored
from .open_state import Opened, Stored

_DTYPES, _DEVICES = (torch.float32, torch.float64), ("cpu", "cuda")  # that kernels have
_MOMENTS = "exp_avg", "exp_avg_sq"


def direction(recipe: Recipe, st: State, r: Tensor, t: Clock, whole: Tensor | None) -> tuple[Tensor, Clock] | None:
    """(D, gain) in one kernel, or None. `whole`: the gradient that r was computed from, None where r came as it is."""
    kernel = _DIRECTIONS.get((type(recipe.momentum), type(recipe.scaling)))
    if kernel is None or recipe.momentum_of != "gradient" or torch.compiler.is_compiling():
        return None
    # D takes the place of r, one pass over memory less, unless r is the gradient's memory or is read again.
    spare = type(recipe.residual) is Drop and whole is not None and not _share_memory(r, whole)
    return kernel(recipe, st, r, t, spare)


def whole(recipe: Any) -> _Step | None:
    """The kernel for the whole update of several W, if these parts have one."""
    parts = (recipe.basis, recipe.momentum, recipe.scaling, recipe.residual, recipe.step_size)
    kernel = _STEPS.get(tuple(map(type, parts)))
    return kernel if kernel is not None and _is_adam(recipe) and recipe.scale == 1 else None


def takes(w: Tensor) -> bool:
    """Are there kernels for parameters like this one?"""
    return w.dtype in _DTYPES and w.device.type in _DEVICES


def _suits(w: Tensor, g: Tensor, st: State) -> bool:
    """Kernels of `whole` walk tensors flat, whatever their strides, so all must be laid out alike."""
    m, v = (st[key] for key in _MOMENTS)
    alike = takes(w) and w.dtype == g.dtype == m.dtype == v.dtype
    return alike and w.is_contiguous() and g.is_contiguous() and m.is_contiguous() and v.is_contiguous()


def step_(
    recipe: Recipe, algebra: Algebra, w: Tensor, g: Tensor, st: State, lr: Clock, weight_decay: float, t: Clock
) -> bool:
    """The whole update of w in one kernel, or False and nothing is changed."""
    if torch.compiler.is_compiling():
        return False
    if algebra is WHOLE and fused_factored.suits(recipe, w, g, st, t):
        fused_factored.step_(recipe, w, g, st, cast(float, lr), weight_decay, cast(float, t))
        return True
    one_clock = not isinstance(t, Tensor) or t.dim() == 0
    if (kernel := whole(recipe)) is None or not (one_clock and _suits(w, g, st)):
        return False
    kernel(recipe, [w], [g], [st], lr, weight_decay, t)
    return True


def listed(recipe: Recipe) -> bool:
    """Is there a kernel for the state of several matrices, of which each holds little more than R and D until then?"""
    kinds = type(recipe.momentum), type(recipe.scaling)
    return kinds in _DIRECTIONS and _is_adam(recipe) and not (recipe.aged or recipe.residual.feeds_back)


def directions(recipe: Any, states: Sequence[State], r: list[Tensor], whole: list[Tensor], t: float) -> list[Tensor]:
    """D of several matrices in one kernel, where `listed` says so. `whole`: the gradients that r was computed from."""
    spared = type(recipe.residual) is Drop
    rows = [x.contiguous() for x in r]
    d = [y if spared and not _share_memory(y, g) else y.clone() for y, g in zip(rows, whole, strict=True)]
    m, v = ([st[key] for st in states] for key in _MOMENTS)
    rule = recipe.momentum.beta, recipe.scaling.beta, recipe.scaling.eps, t
    torch.ops.lowrank_optim.projected_adam_list_.default(m, v, d, *rule)
    return d


def stays_closed(recipe: Any, spec: Mapping[str, Spec], working: torch.dtype, stack: bool) -> set[str]:
    """The tensors that a step without a refresh updates as they are stored; for `estimate_memory`.

    `stack`: of a stack of matrices, which may restart at times of their own.
    """
    if (type(recipe.momentum), type(recipe.scaling)) not in _DIRECTIONS:
        return set()
    adam = _is_adam(recipe) and not recipe.basis.elementwise
    one_clock = AGE not in spec and not (stack and recipe.refresh.restarts)
    known = working == torch.float32 and all(type(spec[key].store) in _FROM_STORE for key in _MOMENTS)
    return set(_MOMENTS) if adam and one_clock and known else set()


def _adam_direction(recipe: Any, st: State, r: Tensor, t: Clock, spare: bool) -> tuple[Tensor, Clock] | None:
    if not (r.is_contiguous() and r.dtype in _DTYPES and recipe.momentum.debias):
        return None
    if isinstance(t, Tensor) and t.numel() != 1:
        return _by_age(recipe, st, r, t, spare)
    step, count = (t, 0.0) if isinstance(t, Tensor) else (None, t)
    rule = recipe.momentum.beta, recipe.scaling.beta, recipe.scaling.eps, count, step
    d = r if spare else r.clone()
    return (d, 1.0) if _from_store(st, d, rule) or _from_open(st, d, rule) else None


def _by_age(recipe: Any, st: State, r: Tensor, t: Tensor, spare: bool) -> tuple[Tensor, Clock] | None:
    """Where each row has a clock of its own."""
    m, v = (st[key] for key in _MOMENTS)
    if t.shape != (*r.shape[:-1], 1) or t.dtype != r.dtype or not _alike(r, m, v):
        return None
    d = r if spare else r.clone()
    rule = recipe.momentum.beta, recipe.scaling.beta, recipe.scaling.eps
    torch.ops.lowrank_optim.projected_adam_rows_.default(m, v, d, *rule, t.contiguous())
    return d, 1.0


def _from_store(st: State, d: Tensor, rule: _Rule) -> bool:
    """Moments updated where they are kept, whatever they are kept as."""
    if not isinstance(st, Opened) or (pairs := st.stored(*_MOMENTS)) is None:
        return False
    kinds = {type(one.store) for one in pairs[0]}
    kernel = _FROM_STORE.get(kinds.pop()) if len(kinds) == 1 else None
    alike = all(x.is_contiguous() and x.device == d.device for pair in pairs for one in pair for x in one.kept.values())
    return kernel is not None and alike and kernel(pairs, st.split(d), rule)


def _from_open(st: State, d: Tensor, rule: _Rule) -> bool:
    m, v = (st[key] for key in _MOMENTS)
    if not _alike(d, m, v):
        return False
    torch.ops.lowrank_optim.projected_adam_.default(m, v, d, *rule)
    return True


def _float32(pairs: _Pairs, d: list[Tensor], rule: _Rule) -> bool:
    moments = [[one.kept[""] for one in each] for each in zip(*pairs, strict=True)]
    if any(x.dtype != d[0].dtype for tensors in moments for x in tensors):
        return False
    if len(d) == 1:
        torch.ops.lowrank_optim.projected_adam_.default(moments[0][0], moments[1][0], d[0], *rule)
    else:
        torch.ops.lowrank_optim.projected_adam_list_.default(*moments, d, *rule)
    return True


def _bfloat16(pairs: _Pairs, d: list[Tensor], rule: _Rule) -> bool:
    if d[0].dtype != torch.float32 or any(isinstance(m.noise[2], Places) for m, _ in pairs):
        return False  # columns of a sharded parameter have numbers that do not follow each other
    moments = [[one.kept[""] for one in each] for each in zip(*pairs, strict=True)]
    drawn = [numbers_of(key, stream) for key, stream, _ in (m.noise for m, _ in pairs)]
    (_, purpose, time, at), (_, (purpose_sq, _), _) = drawn[0], pairs[0][1].noise
    keys, starts = [key for key, *_ in drawn], [m.noise[2] for m, _ in pairs]
    noise = keys, purpose, purpose_sq, time, at, starts
    torch.ops.lowrank_optim.projected_adam_bfloat16_list_.default(*moments, d, *rule, *noise)
    return True


def _int8(pairs: _Pairs, d: list[Tensor], rule: _Rule) -> bool:
    if d[0].dtype != torch.float32:
        return False
    tensors = [[one.kept[suffix] for one in each] for each in zip(*pairs, strict=True) for suffix in ("", "_peak")]
    levels = *quantize.dynamic_levels(True, d[0].device), *quantize.dynamic_levels(False, d[0].device)
    torch.ops.lowrank_optim.projected_adam_int8_list_.default(*tensors, d, *levels, Int8.block, *rule)
    return True


def _alike(d: Tensor, *moments: Tensor) -> bool:
    return all(x.is_contiguous() and x.dtype == d.dtype and x.device == d.device for x in moments)


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def _is_adam(recipe: Any) -> bool:
    return bool(recipe.momentum_of == "gradient" and recipe.scaling_in == "subspace" and recipe.momentum.debias)


def _adamw_(
    recipe: Any, w: list[Tensor], g: list[Tensor], st: Sequence[State], lr: Clock, weight_decay: float, t: Clock
) -> None:
    """torch's fused AdamW."""
    m, v = ([one[key] for one in st] for key in _MOMENTS)
    # made on the device: to send a number to a GPU would stop the host
    step = t.float() if isinstance(t, Tensor) else torch.full((), t, dtype=torch.float32, device=w[0].device)
    torch._fused_adamw_(
        w, g, m, v, [], [step] * len(w),
        lr=lr, beta1=recipe.momentum.beta, beta2=recipe.scaling.beta, weight_decay=weight_decay, eps=recipe.scaling.eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip


_Direction = Callable[[Recipe, State, Tensor, Clock, bool], "tuple[Tensor, Clock] | None"]
_Step = Callable[[Recipe, list[Tensor], list[Tensor], Sequence[State], Clock, float, Clock], None]
_Rule = tuple[float, float, float, float, "Tensor | None"]  # beta1, beta2, eps, t and where it is on the device
_Pairs = list[tuple[Stored, ...]]  # first and second moment of each parameter
_DIRECTIONS: dict[tuple[type, ...], _Direction] = {(EMA, RMS): _adam_direction}
_STEPS: dict[tuple[type, ...], _Step] = {(Identity, EMA, RMS, Drop, Constant): _adamw_}
_FROM_STORE: dict[type, Callable[[_Pairs, list[Tensor], _Rule], bool]] = {
    Float32: _float32,
    BFloat16: _bfloat16,
    Int8: _int8,
}
