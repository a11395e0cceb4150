"""Laws of papers: what a law needs to run each method as the paper's loop and as the engine.

Inner quantities (errors, residuals, momenta) are read from the movement of the weight. A huge eps with an equally huge
scale removes Adam's normalization.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_optim
from lowrank_optim import ops
from lowrank_optim.recipe.plan import resolve_side
from tests.reference.apollo import apollo_adamw
from tests.reference.dct import dct_adamw
from tests.reference.fira import fira_adamw
from tests.reference.flora import flora
from tests.reference.frugal import frugal
from tests.reference.galore import exact, galore_adamw
from tests.reference.galore_plus import galore_plus_adamw
from tests.reference.golore import golore_adamw
from tests.reference.ldadam import ldadamw
from tests.reference.q_galore import q_galore_adamw
from tests.reference.subset_norm import snsm_adamw, subset_norm_adamw, subspace_momentum

M, N, RANK, STEPS = 6, 8, 3, 9
ADAM = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
COMMON = dict(rank=RANK, side="left", scale=0.5, **ADAM)
LINEAR = dict(eps=1e10, scale=1e10)  # the step is then lr * mhat, to ten digits
MOMENTUM = dict(rank=RANK, side="left", lr=0.01, beta=0.9, weight_decay=0.1, scale=0.5)
SEED = 5


def normal(shape: tuple[int, ...], count: int, purpose: str = "sketch") -> Tensor:
    """Return the numbers that the engine draws at refresh `count` of the parameter "w"."""
    return ops.normal(shape, ops.key_of(SEED, "w"), ops.stream_of(f"{purpose} 0", count)).double()


METHODS = {
    "galore": (galore_adamw, lowrank_optim.GaLoreAdamW),
    "fira": (fira_adamw, lowrank_optim.FiraAdamW),
    "apollo": (apollo_adamw, lowrank_optim.APOLLO),
    "ldadam": (ldadamw, lowrank_optim.LDAdamW),
    "frugal": (frugal, lowrank_optim.FRUGAL),
    "golore": (golore_adamw, lowrank_optim.GoLoreAdamW),
    "subset_norm": (subset_norm_adamw, lowrank_optim.SubsetNormAdamW),
    "subspace_momentum": (subspace_momentum, lowrank_optim.SubspaceMomentum),
    "snsm": (snsm_adamw, lowrank_optim.SNSMAdamW),
    "dct": (dct_adamw, lowrank_optim.DCTAdamW),
    "flora": (flora, lowrank_optim.Flora),
    "galore_plus": (galore_plus_adamw, lowrank_optim.GaLorePlusAdamW),
    "q_galore": (q_galore_adamw, lowrank_optim.QGaLoreAdamW),
}
# arguments of loops whose names differ in the optimizers
_NAMES = {
    "side": "proj_type", "gamma": "limit", "mode": "form", "ratio": "sign_scale", "choose": "basis", "beta": "momentum",
    "size": "subset_size", "clip": "d", "decay": "beta2_decay", "gap": "update_proj_gap",
}  # fmt: skip
_VALUES = {("choose", "random"): "rows", ("choose", "norm"): "topk", ("error_feedback", True): "float32"}
_OF_LOOPS = ("fit", "normal", "refreshed")


def methods(kind: str) -> SimpleNamespace:
    """Return all methods by name as functions with the signatures of the loops; `kind` is "loop" or "engine"."""
    if kind == "loop":
        found = {name: _with_normal(loop) for name, (loop, _) in METHODS.items()}
    else:
        found = {name: _engine(make, name) for name, (_, make) in METHODS.items()}
    return SimpleNamespace(**found, kind=kind)


def _with_normal(loop: Callable[..., Tensor]) -> Callable[..., Tensor]:
    names = inspect.signature(loop).parameters
    own: dict[str, Any] = {"normal": normal} if "normal" in names else {}
    if names.get("fit") is not None and names["fit"].default is inspect.Parameter.empty:
        own["fit"] = exact

    def run(*args: Any, **options: Any) -> Tensor:
        return loop(*args, **{**own, **options})

    return run


def _engine(make: Any, name: str) -> Callable[..., Tensor]:
    known = inspect.signature(make).parameters
    fixed = {"stagger": False, "state_dtype": "float32", "basis_dtype": "float32", "basis": "svd", "seed": SEED}
    if name in ("apollo", "flora", "frugal", "dct"):
        del fixed["basis"]

    def run(weight: Tensor, gradients: list[Tensor], refresh_at: Iterable[int] | None, **options: Any) -> Tensor:
        refreshed = options.get("refreshed", [])
        if name == "flora" and options.get("base", "adafactor") == "adafactor":
            options["eps"] = (options.pop("factored_eps", 1e-30), options.pop("floor", 1e-3))
        own = {_NAMES.get(k, k): _VALUES.get((k, v), v) for k, v in options.items() if k not in _OF_LOOPS}
        if refresh_at is not None and name != "ldadam":  # which refreshes at every step
            own["update_proj_gap"] = _gap_of(sorted(refresh_at), len(gradients))
        own = {**{k: v for k, v in fixed.items() if k in known}, **own}
        if name == "subset_norm":  # whose side follows from the shape
            assert own["proj_type"] == resolve_side("std", *weight.shape)
            own = {k: v for k, v in own.items() if k not in ("rank", "update_proj_gap", "proj_type")}
        p, other = nn.Parameter(weight.clone()), nn.Parameter(torch.zeros(8, 8, dtype=weight.dtype))
        optimizer = make([("w", p), ("other", other)], **own)  # next to `other`, the rank of "w" may be its own
        for step, grad in enumerate(gradients):
            before = int(optimizer.state[p].get("refreshes", 0))
            p.grad = grad.clone()
            optimizer.step()
            if int(optimizer.state[p].get("refreshes", 0)) > before:
                refreshed.append(step)
        return p.detach()

    return run


def _gap_of(refresh_at: list[int], steps: int) -> int:
    """Return the interval between refreshes; the engine has no other schedules than regular ones."""
    gap = refresh_at[1] if len(refresh_at) > 1 else max(steps, 1)
    assert [step for step in refresh_at if step < steps] == list(range(0, steps, gap))
    return gap


def problem(m: int = M, n: int = N, steps: int = STEPS) -> tuple[Tensor, list[Tensor]]:
    weight = torch.randn(m, n, dtype=torch.float64)
    return weight, list(torch.randn(steps, m, n, dtype=torch.float64))


def moves(run: Callable[..., Tensor], weight: Tensor, grads: list[Tensor], refresh_at: Any = (0,), **options: Any):
    """Return what every step subtracts, without weight decay."""
    options["weight_decay"] = 0.0
    path = [run(weight, grads[:count], set(refresh_at), **options) for count in range(len(grads) + 1)]
    return [before - after for before, after in pairwise(path)]


def torch_path_end(optimizer_class: Any, weight: Tensor, grads: list[Tensor], **options: Any) -> Tensor:
    """Return the weight after training with an optimizer of torch."""
    p = nn.Parameter(weight.clone())
    optimizer = optimizer_class([p], **options)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach()


def steps_of(optimizer: torch.optim.Optimizer, p: nn.Parameter, grads: Iterable[Tensor]) -> Tensor:
    """Take a step for each gradient of `p`; return a copy of `p`."""
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach().clone()


def close(actual: Any, expected: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
