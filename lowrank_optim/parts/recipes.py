"""Build the parts that several papers share: Adam in a subspace, AdamW in full space, schedules, stores."""

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

ERRORS: dict[str, Store | None] = {  # stores of the error in error feedback
    "none": None, "float32": STORES["float32"], "bfloat16": BFloat16(), "int8": Affine(8), "int4": Affine(4),
}  # fmt: skip  # fmt: skip


def adam(group: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of Adam for a `Recipe`: two moments, and lr unchanged."""
    beta1, beta2 = group["betas"]
    return {
        "momentum": EMA(beta1),
        "scaling": RMS(beta2, hyperparameters.single("eps", group["eps"])),
        "step_size": Constant(),
    }


def adamw(group: dict[str, Any]) -> Recipe:
    """Return AdamW in full space, for parameters that are not projected."""
    return Recipe(basis=Identity(), refresh=Never(), residual=Drop(), **adam(group), **stores(group))


def subspace(group: dict[str, Any]) -> dict[str, Any]:
    """Return basis, refresh, residual, scale and stores of a method with GaLore's options, for a `Recipe`."""
    basis = BASES[group["basis"]]
    return {
        "basis": TwoSided(basis) if group["proj_type"] == "full" else basis,
        "refresh": schedule(group),
        "residual": Drop(),
        "scale": group["scale"],
        **stores(group),
    }


def schedule(group: dict[str, Any]) -> Every:
    """Return the refresh every `update_proj_gap` steps, as the group says."""
    return Every(group["update_proj_gap"], group["moments"], group["stagger"])


def stores(group: dict[str, Any]) -> dict[str, Any]:
    """Return the stores of a method, for a `Recipe`.

    With moments in int8 or int4 bases are kept in bfloat16: in fewer bits they would no longer be orthonormal, and they
    are the smaller part of the state.
    """
    narrow = group["state_dtype"] in ("int8", "int4")
    return {"store": STORES[group["state_dtype"]], "basis_store": BFloat16(widen_small=True) if narrow else None}
