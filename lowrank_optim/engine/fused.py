"""Combinations of parts for which one kernel exists: the same numbers up to rounding, in fewer passes over memory.

EMA and RMS one after the other read and write the moments `(r, n)` several times; a kernel for both does so once. But
neither the engine nor a part may know another part. So this file has tables from the types of parts, and of the stores
that keep their tensors, to functions. A function reports whether it could do the work; otherwise the parts do it, one
after the other. Without the tables everything still runs.
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

_DTYPES, _DEVICES = (torch.float32, torch.float64), ("cpu", "cuda")  # for which kernels exist
_MOMENTS = "exp_avg", "exp_avg_sq"


def direction(recipe: Recipe, st: State, r: Tensor, t: Clock, whole: Tensor | None) -> tuple[Tensor, Clock] | None:
    """Return (D, gain) from one kernel, or None if no kernel can find D.

    Args:
        r: the coordinates `(r, n)` or `(b, r, n)`.
        whole: the gradient that r was computed from; None if the caller brought r.
    """
    kernel = _DIRECTIONS.get((type(recipe.momentum), type(recipe.scaling)))
    # A compiler fuses the parts by itself, and cannot look into our kernels.
    if kernel is None or recipe.momentum_of != "gradient" or torch.compiler.is_compiling():
        return None
    # D takes the place of r, one pass over memory less, unless r is the gradient's memory or is read again.
    spare = type(recipe.residual) is Drop and whole is not None and not _share_memory(r, whole)
    return kernel(recipe, st, r, t, spare)


def whole(recipe: Any) -> _Step | None:
    """Return the kernel for the whole update of several W, if these parts have one."""
    # torch's kernel also decays by lr, so a scale other than 1 cannot be multiplied into its lr.
    parts = (recipe.basis, recipe.momentum, recipe.scaling, recipe.residual, recipe.step_size)
    kernel = _STEPS.get(tuple(map(type, parts)))
    return kernel if kernel is not None and _is_adam(recipe) and recipe.scale == 1 else None


def takes(w: Tensor) -> bool:
    """Whether there are kernels for parameters like this one."""
    return w.dtype in _DTYPES and w.device.type in _DEVICES


def _suits(w: Tensor, g: Tensor, st: State) -> bool:
    """Whether W, G and both moments have one dtype and are contiguous, since kernels walk them flat."""
    m, v = (st[key] for key in _MOMENTS)
    one_dtype = takes(w) and w.dtype == g.dtype == m.dtype == v.dtype
    return one_dtype and w.is_contiguous() and g.is_contiguous() and m.is_contiguous() and v.is_contiguous()


def step_(
    recipe: Recipe, algebra: Algebra, w: Tensor, g: Tensor, st: State, lr: Clock, weight_decay: float, t: Clock
) -> bool:
    """Update w from its gradient in one kernel. Return False, and change nothing, if there is no such kernel."""
    if torch.compiler.is_compiling():
        return False
    if algebra is WHOLE and fused_factored.suits(recipe, w, g, st, t):
        fused_factored.step_(recipe, w, g, st, cast(float, lr), weight_decay, cast(float, t))
        return True
    # A clock per matrix cannot be passed: torch's kernel takes one step count per tensor.
    one_clock = not isinstance(t, Tensor) or t.dim() == 0
    if (kernel := whole(recipe)) is None or not (one_clock and _suits(w, g, st)):
        return False
    kernel(recipe, [w], [g], [st], lr, weight_decay, t)
    return True


def listed(recipe: Recipe) -> bool:
    """Whether a list kernel finds the directions of several matrices, each of which holds only R and D until then.

    A clock that is a tensor, and error feedback, need the matrices one at a time.
    """
    kinds = type(recipe.momentum), type(recipe.scaling)
    return kinds in _DIRECTIONS and _is_adam(recipe) and not (recipe.aged or recipe.residual.feeds_back)


def directions(recipe: Any, states: Sequence[State], r: list[Tensor], whole: list[Tensor], t: float) -> list[Tensor]:
    """Return D of several matrices from one kernel, for recipes that `listed` accepts.

    Args:
        r: their coordinates `(r, n)`.
        whole: the gradients that r was computed from.
    """
    # As in `direction`, D takes the place of R where nobody reads R again and R is not the memory of a gradient.
    spared = type(recipe.residual) is Drop
    rows = [x.contiguous() for x in r]
    d = [y if spared and not _share_memory(y, g) else y.clone() for y, g in zip(rows, whole, strict=True)]
    m, v = ([st[key] for st in states] for key in _MOMENTS)
    rule = recipe.momentum.beta, recipe.scaling.beta, recipe.scaling.eps, t
    torch.ops.lowrank_optim.projected_adam_list_.default(m, v, d, *rule)
    return d


def stays_closed(recipe: Any, spec: Mapping[str, Spec], working: torch.dtype, stack: bool) -> set[str]:
    """Return the names of the tensors that a step without a refresh updates as they are stored; for `estimate_memory`.

    Args:
        stack: whether the matrices are a stack, which may restart at different steps.
    """
    if (type(recipe.momentum), type(recipe.scaling)) not in _DIRECTIONS:
        return set()
    # The conditions of `_adam_direction` and `_from_store`, as far as they are known before a step. Plain
    # parameters are left out: the kernel for a whole update looks at open moments.
    adam = _is_adam(recipe) and not recipe.basis.elementwise
    one_clock = AGE not in spec and not (stack and recipe.refresh.restarts)
    known = working == torch.float32 and all(type(spec[key].store) in _FROM_STORE for key in _MOMENTS)
    return set(_MOMENTS) if adam and one_clock and known else set()


def _adam_direction(recipe: Any, st: State, r: Tensor, t: Clock, spare: bool) -> tuple[Tensor, Clock] | None:
    """Find Adam's direction, with the moments where they are stored if possible, else with open ones."""
    if not (r.is_contiguous() and r.dtype in _DTYPES and recipe.momentum.debias):
        return None
    if isinstance(t, Tensor) and t.numel() != 1:
        return _by_age(recipe, st, r, t, spare)
    # A clock on the device is read there, so that a captured step does not replay an old count.
    step, count = (t, 0.0) if isinstance(t, Tensor) else (None, t)
    rule = recipe.momentum.beta, recipe.scaling.beta, recipe.scaling.eps, count, step
    d = r if spare else r.clone()
    return (d, 1.0) if _from_store(st, d, rule) or _from_open(st, d, rule) else None


def _by_age(recipe: Any, st: State, r: Tensor, t: Tensor, spare: bool) -> tuple[Tensor, Clock] | None:
    """Find Adam's direction where each row of R has its own clock: t is `(r, 1)` or `(b, r, 1)`."""
    m, v = (st[key] for key in _MOMENTS)
    if t.shape != (*r.shape[:-1], 1) or t.dtype != r.dtype or not _match(r, m, v):
        return None
    d = r if spare else r.clone()
    rule = recipe.momentum.beta, recipe.scaling.beta, recipe.scaling.eps
    torch.ops.lowrank_optim.projected_adam_rows_.default(m, v, d, *rule, t.contiguous())
    return d, 1.0


def _from_store(st: State, d: Tensor, rule: _Rule) -> bool:
    """Update moments in their stored form, and d to the direction. Return False if this store has no kernel."""
    if not isinstance(st, Opened) or (pairs := st.stored(*_MOMENTS)) is None:
        return False
    # One call serves all parameters of a chunk, so their moments must have one kind of store.
    kinds = {type(stored.store) for stored in pairs[0]}
    kernel = _FROM_STORE.get(kinds.pop()) if len(kinds) == 1 else None
    usable = all(
        x.is_contiguous() and x.device == d.device for pair in pairs for stored in pair for x in stored.kept.values()
    )
    return kernel is not None and usable and kernel(pairs, st.split(d), rule)


def _from_open(st: State, d: Tensor, rule: _Rule) -> bool:
    """Update open moments `(r, n)` or `(b, r, n)`, and d to the direction."""
    m, v = (st[key] for key in _MOMENTS)
    if not _match(d, m, v):
        return False
    torch.ops.lowrank_optim.projected_adam_.default(m, v, d, *rule)
    return True


def _float32(pairs: _Pairs, d: list[Tensor], rule: _Rule) -> bool:
    """Update moments that are stored in float32, or in float64 for float64 parameters."""
    moments = [[stored.kept[""] for stored in moment] for moment in zip(*pairs, strict=True)]
    if any(x.dtype != d[0].dtype for tensors in moments for x in tensors):
        return False
    # A list of one tensor costs more than a single call.
    if len(d) == 1:
        torch.ops.lowrank_optim.projected_adam_.default(moments[0][0], moments[1][0], d[0], *rule)
    else:
        torch.ops.lowrank_optim.projected_adam_list_.default(*moments, d, *rule)
    return True


def _bfloat16(pairs: _Pairs, d: list[Tensor], rule: _Rule) -> bool:
    """Update moments that are stored in bfloat16; the kernel rounds them stochastically."""
    if d[0].dtype != torch.float32 or any(isinstance(m.noise[2], Places) for m, _ in pairs):
        return False  # noise numbers of a block of columns have gaps, which the kernel does not step over
    moments = [[stored.kept[""] for stored in moment] for moment in zip(*pairs, strict=True)]
    # Each moment has its own purpose in the random stream. Key and first number belong to the parameter, so the second
    # moment has those of the first one.
    drawn = [numbers_of(key, stream) for key, stream, _ in (m.noise for m, _ in pairs)]
    (_, purpose, time, at), (_, (purpose_sq, _), _) = drawn[0], pairs[0][1].noise
    keys, starts = [key for key, *_ in drawn], [m.noise[2] for m, _ in pairs]
    noise = keys, purpose, purpose_sq, time, at, starts
    torch.ops.lowrank_optim.projected_adam_bfloat16_list_.default(*moments, d, *rule, *noise)
    return True


def _int8(pairs: _Pairs, d: list[Tensor], rule: _Rule) -> bool:
    """Update moments that are stored as int8 codes with one peak per block."""
    if d[0].dtype != torch.float32:
        return False
    tensors = [
        [stored.kept[suffix] for stored in moment] for moment in zip(*pairs, strict=True) for suffix in ("", "_peak")
    ]
    # The kernel decodes and encodes with two maps: m has a sign, v has none.
    levels = *quantize.dynamic_levels(True, d[0].device), *quantize.dynamic_levels(False, d[0].device)
    torch.ops.lowrank_optim.projected_adam_int8_list_.default(*tensors, d, *levels, Int8.block, *rule)
    return True


def _match(d: Tensor, *moments: Tensor) -> bool:
    """Whether moments have the layout that kernels demand: contiguous, with dtype and device of d."""
    return all(x.is_contiguous() and x.dtype == d.dtype and x.device == d.device for x in moments)


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def _is_adam(recipe: Any) -> bool:
    """Whether the rule is Adam's: gradients are averaged, the average is scaled in the subspace, bias is corrected."""
    return bool(recipe.momentum_of == "gradient" and recipe.scaling_in == "subspace" and recipe.momentum.debias)


def _adamw_(
    recipe: Any, w: list[Tensor], g: list[Tensor], st: Sequence[State], lr: Clock, weight_decay: float, t: Clock
) -> None:
    """Update parameters with torch's fused AdamW. Its bits are expected of a plain float32 parameter."""
    m, v = ([state[key] for state in st] for key in _MOMENTS)
    # Filled on the device: to send a number from the host would make the host wait.
    step = t.float() if isinstance(t, Tensor) else torch.full((), t, dtype=torch.float32, device=w[0].device)
    torch._fused_adamw_(
        w, g, m, v, [], [step] * len(w),
        lr=lr, beta1=recipe.momentum.beta, beta2=recipe.scaling.beta, weight_decay=weight_decay, eps=recipe.scaling.eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip


# The tables. They come last because they name the functions above.
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
