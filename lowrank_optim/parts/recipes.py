"""Choices of parts that several papers share: Adam in a subspace, AdamW in full space, schedules, stores."""

from __future__ import annotations

from typing import Any

from .. import hyperparameters
from ..recipe.recipe import Basis, Recipe
from ..recipe.store import Store
from . import (
    EMA,
    RMS,
    STORES,
    SVD,
    Affine,
    BFloat16,
    Constant,
    Drop,
    Every,
    Identity,
    Never,
    Random,
    Rows,
    SubspaceIteration,
    TwoSided,
)

BASES: dict[str, Basis] = {
    "rsvd": SubspaceIteration(),
    "svd": SVD(),
    "random": Random(orthonormal=True, kept=True),
    "topk": Rows("norm"),
    "rows": Rows("random"),
}

ERRORS: dict[str, Store | None] = {  # how error feedback is kept
    "none": None, "float32": STORES["float32"], "bfloat16": BFloat16(), "int8": Affine(8), "int4": Affine(4),
}  # fmt: skip  # fmt: skip


def adam(group: dict[str, Any]) -> dict[str, Any]:
    """Adam's two moments, and lr as it is."""
    beta1, beta2 = group["betas"]
    return {
        "momentum": EMA(beta1),
        "scaling": RMS(beta2, hyperparameters.single("eps", group["eps"])),
        "step_size": Constant(),
    }


def adamw(group: dict[str, Any]) -> Recipe:
    """AdamW in full space, for what is not projected."""
    return Recipe(basis=Identity(), refresh=Never(), residual=Drop(), **adam(group), **stores(group))


def subspace(group: dict[str, Any]) -> dict[str, Any]:
    """Basis, refresh, residual and store of a method with GaLore's options."""
    basis = BASES[group["basis"]]
    return {
        "basis": TwoSided(basis) if group["proj_type"] == "full" else basis,
        "refresh": schedule(group),
        "residual": Drop(),
        "scale": group["scale"],
        **stores(group),
    }


def schedule(group: dict[str, Any]) -> Every:
    return Every(group["update_proj_gap"], group["moments"], group["stagger"])


def stores(group: dict[str, Any]) -> dict[str, Any]:
    """How state is kept. A basis in few bits would no longer be orthonormal, and it is the smaller part."""
    narrow = group["state_dtype"] in ("int8", "int4")
    return {"store": STORES[group["state_dtype"]], "basis_store": BFloat16(widen_small=True) if narrow else None}
