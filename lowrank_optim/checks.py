"""Every validation and its message: what is wrong, what was got, the way out."""

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
    """GaLore+: heads are equal blocks of the side that is not projected."""
    if plan.matrix[1] % heads:
        blocks = "rows" if plan.side == "right" else "columns"
        raise ValueError(
            f"{plan.name} {plan.shape} has {plan.matrix[1]} {blocks}, which {heads} heads do not divide. Set heads of "
            'its group (1: no heads), or the side: proj_type="right" for query, key and value, "left" for the output'
        )


def fast_dictionary(kind: str, fft: bool) -> None:
    if fft and kind not in ("dct2", "dct3"):
        raise ValueError(f"fft=True needs dictionary='dct2' or 'dct3', got {kind!r}")


def stable_transfers(plan: Plan, group: Mapping[str, Any]) -> None:
    """Flora: momentum must fade faster than the transfers to new random subspaces blow it up."""
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
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def parameter(name: str, p: Tensor) -> None:
    """Refuses tensors that no rule here can update."""
    if p.is_complex() or not p.is_floating_point():
        raise ValueError(f"{name} has dtype {p.dtype}; parameters must be real floating-point tensors. Leave it out")


def whole(name: str, p: Tensor, what: str) -> None:
    """For what knows nothing of shards."""
    if hasattr(p, "device_mesh"):
        raise NotImplementedError(
            f"{name} is a DTensor (FSDP2 or tensor parallel), and {what} does not know how to work on a shard of it; "
            "leave it out, or use DistributedDataParallel or one process"
        )


def gradient(name: str, grad: Tensor) -> None:
    if grad.is_sparse or grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {name} is sparse ({grad.layout}); low-rank methods need dense gradients. "
            "Build the embedding with sparse=False, or give it to torch.optim.SparseAdam"
        )


def capturable(method: str, feeds_back: bool) -> None:
    if feeds_back:
        raise ValueError(
            f"{method} with capturable=True: error feedback changes the gradient before the basis is refitted, and the "
            "one is in the captured graph and the other before it. Leave capturable out, or switch error feedback off"
        )


def nonfinite(names: list[str]) -> None:
    """`nonfinite="raise"`: called before anything is updated."""
    raise FloatingPointError(
        f"non-finite gradient in {few(names)}; nothing was updated. Lower the learning rate, clip gradients, or use "
        'nonfinite="skip" to leave such parameters out of the step'
    )


def warn(message: str) -> None:
    """A warning at the line of the user, past the frames of this package and of torch."""
    ours = tuple(str(Path(module.__file__ or "").parent) for module in (torch, sys.modules[__package__ or ""]))
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def table(reasons: Iterable[tuple[str, str]]) -> str:
    """A line for each parameter and its reason, for the first few."""
    listed = list(reasons)
    shown = "".join(f"\n  {name}: {reason}" for name, reason in listed[:5])
    return shown + (f"\n  and {len(listed) - 5} more" if len(listed) > 5 else "")


def something_projected(method: str, ranked: bool, reasons: Iterable[tuple[str, str]]) -> None:
    """Called when no parameter is projected: says why, for the first few."""
    verb, lower = ("project", "Lower `rank`, pass") if ranked else ("serve", "Pass")
    raise ValueError(
        f"{method} found nothing to {verb}, so it would silently be another optimizer:{table(reasons)}\n"
        f"{lower} matrices (flattened 1-D shards of FSDP1 have lost their shape: use DDP instead), "
        "or use that optimizer itself"
    )


def nothing_lost(method: str, fallbacks: Iterable[tuple[str, str]]) -> None:
    """`strict=True`: refuses a parameter that was to be projected and cannot be."""
    for name, reason in fallbacks:
        raise ValueError(
            f"{method}(strict=True): {name} cannot be projected ({reason}). Lower its rank, put it into a group with "
            "rank=None, or drop strict"
        )


def same_names(method: str, saved: list[str] | None, ours: list[str] | None) -> None:
    """For subspaces that follow from the names of parameters, and are saved nowhere else."""
    if saved != ours:
        odd = "the one has names and the other none"
        if saved is not None and ours is not None:
            odd = next(
                (f"{a!r} is {b!r} here" for a, b in zip(saved, ours, strict=False) if a != b), "some are missing"
            )
        raise ValueError(
            f"{method} draws its subspaces by the names of the parameters, and those of the state dict differ: {odd}; "
            "nothing was loaded. Build this optimizer with the same names (or none), or with store_projection=True"
        )


def has_state(state_dict: Mapping[str, Any]) -> None:
    """Refuses a state dict of an optimizer that makes its state later than ours and had not stepped yet."""
    if not state_dict.get("state"):
        raise ValueError("the state dict holds no state; nothing was loaded. Which optimizer saved it?")


def loaded_state(name: str, got: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Refuses state that does not fit a parameter, before anything has been changed."""
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
    """One head per rank: gradients of factors are a rank's own, and so would be what a GradScaler finds in them."""
    if hasattr(optimizer, "grad_scale") or hasattr(optimizer, "found_inf"):
        raise NotImplementedError(
            'heads="ranks" with a GradScaler: an overflow on one rank would change the scale of that rank alone, and '
            "gradients that are averaged over ranks would no longer have one scale. Use autocast in bfloat16 instead"
        )


def not_captured(method: str, group: Mapping[str, Any]) -> None:
    if group["capturable"]:
        raise ValueError(
            f"{method} with capturable=True: merges and restarts are decisions of the host, which a captured graph "
            "does not replay. Leave capturable out; `optimizer.compile()` works"
        )


def no_rank(method: str, group: Mapping[str, Any]) -> None:
    if group["rank"] is not None:
        raise ValueError(
            f"a group of {method} has no rank, got {group['rank']!r}: layers are converted when the optimizer is made"
        )
