"""Check the options and keys of a param group, with a message for each value that is refused."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
# Keys that other code writes into groups: torch itself, its schedulers, and users who label their groups.
_FOREIGN_KEYS = {"params", "param_names", "name", "group_name", "initial_lr", "swa_lr", "max_lr", "min_lr"}
_FOREIGN_KEYS |= {"base_momentum", "max_momentum", "grad_norm", "group_id"}
# Options that may be edited in a group that has state. All other options determine the state.
_FREE = {"lr", "betas", "eps", "weight_decay", "scale", "momentum", "beta2_decay", "d", "sign_scale", "residual_scale"}
_FREE |= {"rho", "threshold", "growth", "update_proj_gap", "random_after", "stagger", "bf16_update", "nonfinite"}
_FREE |= {"reset_ratio", "maximize", "foreach", "strict", "capturable", "differentiable", "fused"}
Check = Callable[[str, Any], None]  # raises a ValueError for a value that the option of this name cannot have


def _number(low: float, high: float = math.inf, *, open_low: bool = False, hint: str = "") -> Check:
    """Return a check for a finite real number in [low, high), or in (low, high) where `open_low`."""
    interval = f"{'>' if open_low else '>='} {low:g}" + (f" and < {high:g}" if high < math.inf else "")

    def check(name: str, value: Any) -> None:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
        if not real or value < low or (open_low and value == low) or value >= high:
            raise ValueError(f"{name} must be a number {interval}, got {value!r}{'; ' + hint if hint else ''}")

    return check


def _one_of(*choices: str) -> Check:
    """Return a check for one of several strings, which suggests the nearest string for a misspelt value."""

    def check(name: str, value: Any) -> None:
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, 1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}")

    return check


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def _flag_or_none(name: str, value: Any) -> None:
    if value is not None:
        _flag(name, value)


def _lr(name: str, value: Any) -> None:
    """Check a number >= 0, which may be a tensor with one element."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    _number(0)(name, value)


def _betas(name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be a pair of numbers, got {value!r}; for example (0.9, 0.999)")
    for index, beta in enumerate(value):
        _number(0, 1)(f"{name}[{index}]", beta)


def _beta1(name: str, value: Any) -> None:
    if value is not None:
        _number(0, 1, hint="None switches the first moment off")(name, value)


def _eps(name: str, value: Any) -> None:
    """Check one number (Adam), or a pair whose first may be None (Adafactor). None means the method's own default."""
    if value is None:
        return
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} must be a number or a pair, got {value!r}")
        for index, part in enumerate(value):
            if not (index == 0 and part is None):
                _number(0)(f"{name}[{index}]", part)
    else:
        _number(0)(name, value)


def _rank(name: str, value: Any) -> None:
    """Check an int >= 1, a fraction in (0, 1], or None."""
    if value is None:
        return
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1
    fraction = isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral) and 0 < float(value) <= 1
    if not (whole or fraction):
        raise ValueError(
            f"{name} must be an int >= 1, a fraction in (0, 1] of the shorter side, or None (do not project), "
            f"got {value!r}"
        )


def _whole(low: int) -> Check:
    """Return a check for an int >= low."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} must be an int >= {low}, got {value!r}")

    return check


def _whole_or_none(name: str, value: Any) -> None:
    if value is not None:
        _whole(1)(name, value)


def _ratio(name: str, value: Any) -> None:
    """Check a share above 0 and at most 1."""
    _number(0, math.nextafter(1, 2), open_low=True)(name, value)


def _lr_or_none(name: str, value: Any) -> None:
    if value is not None:
        _lr(name, value)


def _limit(name: str, value: Any) -> None:
    """Check a growth factor above 1, or None."""
    if value is not None:
        _number(1, open_low=True, hint="None switches the limiter off")(name, value)


def _subset_size(name: str, value: Any) -> None:
    """Check an int >= 1, "sqrt", or None."""
    if value not in (None, "sqrt"):
        try:
            _whole(1)(name, value)
        except ValueError as error:
            raise ValueError(f"{error}; or None for whole rows or columns, or 'sqrt'") from None


def _decay(name: str, value: Any) -> None:
    """Check the exponent of Adafactor's second moment, in [-1, 0)."""
    if not isinstance(value, numbers.Real) or not -1 <= float(value) < 0:
        raise ValueError(f"{name} must be a number in [-1, 0), got {value!r}; Adafactor's is -0.8")


def _not_differentiable(name: str, value: Any) -> None:
    """Check that `differentiable` keeps its default False."""
    _flag(name, value)
    if value:
        raise ValueError(
            "differentiable=True: bases are fitted and state is written in place, without gradients. For a step that "
            "can be differentiated use an optimizer of torch.optim"
        )


def _fused(name: str, value: Any) -> None:
    """Check that `fused` keeps its default None."""
    if value is not None:
        raise ValueError(
            f"{name} must be None, got {value!r}: fused kernels are used wherever they exist, and cannot be forced "
            "where they do not"
        )


def _clip(name: str, value: Any) -> None:
    """Check how a step during backward clips gradients."""
    if value == "global":
        raise ValueError(
            f"{name}='global': the norm of all gradients is known only when most of them have been used and freed. "
            "Take clip='delayed' (the norm of the step before), clip='tensor' (each gradient by its own norm), or step "
            "normally"
        )
    _one_of("tensor", "delayed")(name, value)


def _positive_or_none(name: str, value: Any) -> None:
    if value is not None:
        _number(0, open_low=True, hint="None does not clip")(name, value)


def _alpha(name: str, value: Any) -> None:
    """Check a positive number. None stands for the method's own default."""
    if value is not None:
        _number(0, open_low=True)(name, value)


_CHECKS: dict[str, Check] = {
    "accumulation_steps": _whole(1),
    "world_size": _whole(1),
    "alpha": _alpha,
    "base": _one_of("dense", "int8", "nf4", "none"),
    "exact_base": _flag,
    "init": _one_of("spectral", "random"),
    "iteration_steps": _whole(1),
    "iterations": _whole_or_none,
    "merge_every": _whole(1),
    "refactor_every": _whole_or_none,
    "reset_every": _whole_or_none,
    "reset": _one_of("drop", "magnitude", "random"),
    "reset_ratio": _ratio,
    "rest_lr": _lr_or_none,
    "accumulate": _one_of("projected", "whole"),
    "basis_from": _one_of("window", "micro-batch"),
    "clip": _clip,
    "clip_norm": _positive_or_none,
    "lr": _lr,
    "betas": _betas,
    "beta1": _beta1,
    "beta2_decay": _decay,
    "eps": _eps,
    "d": _number(0, open_low=True),
    "weight_decay": _number(0),
    "rank": _rank,
    "update_proj_gap": _whole(1),
    "scale": _number(0, open_low=True),
    "proj_type": _one_of(*PROJ_TYPES),
    "momentum": _number(0, 1),
    "limit": _limit,
    "rho": _number(0, 1),
    "density": _number(0, math.nextafter(1, 2)),
    "residual_scale": _number(0),
    "sign_scale": _number(0),
    "heads": _whole(1),
    "queue": _whole(1),
    "growth": _whole(1),
    "gap_growth": _number(1),
    "compensation": _whole(0),
    "threshold": _number(0),
    "random_after": _whole(0),
    "subset_size": _subset_size,
    "store_projection": _flag,
    "scale_front": _flag,
    "orthonormal": _flag,
    "fft": _flag_or_none,
    "moments": _one_of("keep", "rotate", "reset"),
    "stagger": _flag,
    "state_dtype": _one_of("float32", "bfloat16", "int8", "int4"),
    "bf16_update": _one_of("stochastic", "kahan", "none"),
    "nonfinite": _one_of("skip", "raise"),
    "seed": _whole(0),
    "maximize": _flag,
    "foreach": _flag_or_none,
    "capturable": _flag,
    "differentiable": _not_differentiable,
    "fused": _fused,
    "skip_embeddings": _flag,
    "strict": _flag,
    "as_matrix": _one_of("auto", "flatten", "batch"),
    "scale_parameter": _flag,
    "relative_step": _flag,
}


def known_keys(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse group keys that no code would read, because a misspelt option must not be ignored silently."""
    if not isinstance(group, dict):
        raise TypeError(f"a param group is a dict with the key 'params', got {type(group).__name__}")
    for key in group:
        if key not in defaults and key not in _FOREIGN_KEYS:
            near = difflib.get_close_matches(key, list(defaults), 1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(sorted(defaults))}"
            raise ValueError(f"unknown key {key!r} in a param group; {hint}")


def check(group: Mapping[str, Any], choices: Mapping[str, tuple[str, ...]]) -> None:
    """Check every number and option in a group, so that overrides and later groups are covered as well.

    Args:
        group: the whole group, defaults included.
        choices: options for which the class has choices of its own, which replace the common check.
    """
    for key, value in group.items():
        if key in choices:
            _one_of(*choices[key])(key, value)
        elif key in _CHECKS:
            _CHECKS[key](key, value)


def single(name: str, value: Any) -> Any:
    """Return the value of an option that is one number here, while other methods take a pair."""
    if value is None or isinstance(value, (tuple, list)):
        raise ValueError(f"{name} must be one number here, got {value!r}")
    return value


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """Return the value of an option that is a pair here, while other methods take one number."""
    if not isinstance(value, (tuple, list)):
        raise ValueError(f"{name} must be a pair here, got {value!r}; for example (None, 0.001)")
    return value[0], value[1]


def compatible(group: Mapping[str, Any], clashes: Iterable[tuple[Mapping[str, tuple[str, ...]], str]]) -> None:
    """Refuse choices that mean nothing together.

    Args:
        group: a group of `Composed`.
        clashes: (choices by slot, reason). A group clashes whose choice in each of these slots is listed.
    """
    for clash, reason in clashes:
        if all(group[slot] in choices for slot, choices in clash.items()):
            named = ", ".join(f"{slot}={group[slot]!r}" for slot in clash)
            raise ValueError(f"{named} mean nothing together: {reason}")


def snapshot(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group, without the keys that schedulers write, for a later call of `unchanged`."""
    kept = {key: value for key, value in group.items() if key not in _FOREIGN_KEYS and key != "lr"}
    return {**kept, "params": len(group["params"])}


def unchanged(now: Mapping[str, Any], before: Mapping[str, Any], fixed: Iterable[str] = ()) -> None:
    """Refuse edits of a group that can no longer take effect, instead of ignoring them.

    Args:
        now, before: snapshots of the group.
        fixed: options on which the state of this method depends, in addition to those that are fixed for all methods.
    """
    for key in before.keys() | now.keys():
        if (key not in _FREE or key in fixed) and now.get(key) != before.get(key):
            raise ValueError(
                f"{key} of a group is fixed once it has state: {before.get(key)!r} became {now.get(key)!r}; nothing "
                "was updated. Set it back, or build a new optimizer; use add_param_group for new parameters"
            )


def heads(value: Any) -> tuple[int, bool]:
    """Return the option `heads` of LTE as (heads in this process, whether every process has its own)."""
    if isinstance(value, str):
        if value != "ranks":
            raise ValueError(f'heads must be an int >= 1 or "ranks" (one head in every process), got {value!r}')
        return 1, True
    _whole(1)("heads", value)
    return value, False
