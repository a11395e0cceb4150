"""Refuse what cannot work. Each message says what is wrong, which value was passed, and the way out."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .recipe.plan import Plan


def whole_heads(plan: Plan, heads: int) -> None:
    """Refuse a number of heads (GaLore+) that does not divide the side that is not projected into equal blocks."""
    if plan.matrix[1] % heads:
        blocks = "rows" if plan.side == "right" else "columns"
        raise ValueError(
            f"{plan.name} {plan.shape} has {plan.matrix[1]} {blocks}, which {heads} heads do not divide. Set heads of "
            'its group (1: no heads), or the side: proj_type="right" for query, key and value, "left" for the output'
        )


def fast_dictionary(kind: str, fft: bool) -> None:
    """Refuse `fft=True` for a dictionary that has no fast transform."""
    if fft and kind not in ("dct2", "dct3"):
        raise ValueError(f"fft=True needs dictionary='dct2' or 'dct3', got {kind!r}")


def stable_transfers(plan: Plan, group: Mapping[str, Any]) -> None:
    """Refuse options of Flora with which the momentum would grow without bound.

    Each transfer to a new random subspace enlarges the momentum. It must fade faster than that between two transfers.
    """
    growth = math.sqrt(1 + (plan.matrix[0] + 1) / cast(int, plan.rank))
    beta, gap = group["betas"][0], group["update_proj_gap"]
    if group["moments"] == "rotate" and not group["orthonormal"] and beta**gap * growth >= 1:
        least = math.floor(-math.log(growth) / math.log(beta)) + 1
        raise ValueError(
            f"{plan.name}: momentum would grow without bound, because each transfer to a new subspace multiplies it by "
            f"about {growth:.3g} and {gap} steps only fade it to {beta**gap:.3g}. Use update_proj_gap >= {least} "
            "(the paper: 1000), or orthonormal=True"
        )


def module(model: object) -> None:
    """Refuse anything but a module as `model`."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def of_model(model: torch.nn.Module, plans: Mapping[Tensor, Plan]) -> None:
    """Refuse a model that does not have all parameters of an optimizer, whose plans these are."""
    inside = set(model.parameters())
    outside = [plan.name for p, plan in plans.items() if p not in inside]
    if outside:
        raise ValueError(f"{few(outside)} of the optimizer is no parameter of this model. Was the model copied?")


def parameter(name: str, p: Tensor) -> None:
    """Refuse a tensor that no rule here can update."""
    if p.is_complex() or not p.is_floating_point():
        raise ValueError(f"{name} has dtype {p.dtype}; parameters must be real floating-point tensors. Leave it out")


def whole(name: str, p: Tensor, what: str) -> None:
    """Refuse a DTensor for a function, named by `what`, that works on whole tensors only."""
    if hasattr(p, "device_mesh"):
        raise NotImplementedError(
            f"{name} is a DTensor (FSDP2 or tensor parallel), and {what} does not know how to work on a shard of it; "
            "leave it out, or use DistributedDataParallel or one process"
        )


def gradient(name: str, grad: Tensor) -> None:
    """Refuse a sparse gradient."""
    if grad.is_sparse or grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {name} is sparse ({grad.layout}); low-rank methods need dense gradients. "
            "Build the embedding with sparse=False, or give it to torch.optim.SparseAdam"
        )


def capturable(method: str, feeds_back: bool) -> None:
    """Refuse `capturable=True` for a method whose error feedback would be captured without its refits."""
    if feeds_back:
        raise ValueError(
            f"{method} with capturable=True: error feedback changes the gradient before the basis is refitted, but the "
            "refit happens before the captured graph and error feedback inside of it. Leave capturable out, or switch "
            "error feedback off"
        )


def nonfinite(names: list[str]) -> None:
    """Raise for non-finite gradients under `nonfinite="raise"`. The caller has not updated anything yet."""
    raise FloatingPointError(
        f"non-finite gradient in {few(names)}; nothing was updated. Lower the learning rate, clip gradients, or use "
        'nonfinite="skip" to leave such parameters out of the step'
    )


def warn(message: str) -> None:
    """Warn at the line of the user's code that led here, past the frames of this package and of torch."""
    ours = tuple(str(Path(module.__file__ or "").parent) for module in (torch, sys.modules[__package__ or ""]))
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def few(names: list[str]) -> str:
    """Return the first three names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def table(reasons: Iterable[tuple[str, str]]) -> str:
    """Return one line for each of the first five (parameter, reason), and the number of further parameters."""
    listed = list(reasons)
    shown = "".join(f"\n  {name}: {reason}" for name, reason in listed[:5])
    return shown + (f"\n  and {len(listed) - 5} more" if len(listed) > 5 else "")


def something_projected(method: str, ranked: bool, reasons: Iterable[tuple[str, str]]) -> None:
    """Raise for an optimizer in which no parameter is projected.

    Args:
        method: name of the class.
        ranked: False for methods that update whole matrices, without a rank.
        reasons: (parameter, why it is not projected).
    """
    verb, lower = ("project", "Lower `rank`, pass") if ranked else ("serve", "Pass")
    raise ValueError(
        f"{method} found nothing to {verb}, so it would silently be another optimizer:{table(reasons)}\n"
        f"{lower} matrices (flattened 1-D shards of FSDP1 have lost their shape: use DDP instead), "
        "or use that optimizer itself"
    )


def nothing_lost(method: str, fallbacks: Iterable[tuple[str, str]]) -> None:
    """Refuse, under `strict=True`, a parameter that its group wants to project but that cannot be projected."""
    for name, reason in fallbacks:
        raise ValueError(
            f"{method}(strict=True): {name} cannot be projected ({reason}). Lower its rank, put it into a group with "
            "rank=None, or drop strict"
        )


def same_names(method: str, saved: list[str] | None, ours: list[str] | None) -> None:
    """Refuse a state dict from parameters of other names, for methods that draw subspaces by name and do not save them.

    Args:
        method: name of the class.
        saved, ours: names in the state dict and in this optimizer; None where parameters came without names.
    """
    if saved != ours:
        odd = "only one side has names"
        if saved is not None and ours is not None:
            odd = next(
                (f"{a!r} is {b!r} here" for a, b in zip(saved, ours, strict=False) if a != b),
                "one side has more of them",
            )
        raise ValueError(
            f"{method} draws its subspaces by the names of the parameters, and those of the state dict differ: {odd}; "
            "nothing was loaded. Build this optimizer with the same names (or none), or with store_projection=True"
        )


def has_state(state_dict: Mapping[str, Any]) -> None:
    """Refuse a state dict without state.

    An optimizer that creates its state at the first step saves such a dict before that step.
    """
    if not state_dict.get("state"):
        raise ValueError(
            "the state dict holds no state; nothing was loaded. Was it saved by another optimizer before its first "
            "step?"
        )


def loaded_state(name: str, got: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Refuse state that does not fit a parameter. The caller has not changed anything yet."""
    if got.keys() != expected.keys():
        odd = sorted(got.keys() ^ expected.keys())
        raise ValueError(
            f"the state dict does not fit {name}: {', '.join(odd)} on one side only; nothing was loaded. Was it saved "
            "by another class, from parameters with names (or without), or from a model of another dtype?"
        )
    for key, tensor in expected.items():
        value = got[key]
        if not isinstance(value, Tensor) or value.shape != tensor.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(
                f"the state dict does not fit {name}: {key} is {shape}, expected {tuple(tensor.shape)}; nothing was "
                "loaded. Was it saved from a model of other shapes, or with other keys in its groups?"
            )


def no_grad_scaler(optimizer: Any) -> None:
    """Refuse a GradScaler where each rank has its own head (LTE).

    The gradients of the factors differ between ranks, so each rank would find overflows of its own.
    """
    if hasattr(optimizer, "grad_scale") or hasattr(optimizer, "found_inf"):
        raise NotImplementedError(
            'heads="ranks" with a GradScaler: an overflow on one rank would change the scale of that rank alone, and '
            "gradients that are averaged over ranks would no longer have one scale. Use autocast in bfloat16 instead"
        )


def not_captured(method: str, group: Mapping[str, Any]) -> None:
    """Refuse `capturable=True` for weight-space methods."""
    if group["capturable"]:
        raise ValueError(
            f"{method} with capturable=True: merges and restarts are decisions of the host, which a captured graph "
            "does not replay. Leave capturable out; `optimizer.compile()` works"
        )


def no_rank(method: str, group: Mapping[str, Any]) -> None:
    """Refuse a rank in a group of a weight-space method."""
    if group["rank"] is not None:
        raise ValueError(
            f"a group of {method} has no rank, got {group['rank']!r}: layers are converted when the optimizer is made"
        )
