"""Compose a method from any choice in each slot: for research, and for methods that are not published yet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .. import hyperparameters
from ..optimizer import LowRankOptimizer
from ..parts import (
    EMA,
    RMS,
    STORES,
    Constant,
    Dictionary,
    Drop,
    ErrorFeedback,
    Every,
    Factored,
    HeavyBall,
    Identity,
    Lazy,
    NoMomentum,
    NormScaled,
    NoScaling,
    PowerIteration,
    Random,
    Raw,
    Rescaled,
    Sign,
    Sparse,
    SubsetNorm,
    TwoSided,
)
from ..parts.recipes import BASES, adamw, stores
from ..recipe.recipe import Basis, Momentum, Recipe, Refresh, Residual, Scaling
from .options import OPTIONS, given

_DICTIONARIES = ("dct2", "dct3", "hadamard", "dictionary")
_BASES = (*BASES, "gaussian", "power", "identity", *_DICTIONARIES)
_FOLLOWING = ("rsvd", "svd", "topk", "power", *_DICTIONARIES)  # bases that depend on the gradient
_RATIOS = ("fira", "apollo", "apollo_tensor")
_RESIDUALS = ("drop", "raw", "sign", "error_feedback", "sparse", *_RATIOS)

# Choices by slot that mean nothing together, and the reason.
CLASHES: tuple[tuple[dict[str, tuple[str, ...]], str], ...] = (
    ({"basis": ("identity",), "residual": _RESIDUALS[1:]}, "full space leaves no complement"),
    ({"basis": ("identity",), "moments": ("rotate", "reset")}, "full space is never refreshed"),
    ({"basis": ("gaussian",), "residual": ("sign", "error_feedback", "sparse", "fira")},
     "P is not orthonormal, so G - P P^T G is mostly noise; take basis='random'"),
    ({"basis": ("power",), "momentum": ("none", "heavy_ball")}, "power iteration follows an average of gradients"),
    ({"basis": ("topk", "rows", *_DICTIONARIES), "moments": ("rotate",), "scaling": ("factored", "subset_norm"),
      "scaling_in": ("subspace",)}, "each coordinate has its own age, which a moment of several cannot have"),
    ({"basis": ("gaussian",), "moments": ("rotate",)},
     "P is not orthonormal: each transfer multiplies moments, which overflow; take basis='random', or Flora"),
    ({"basis": ("power",), "scaling": ("factored",)}, "power iteration follows gradients, not updates"),
    ({"basis": ("topk", "rows"), "residual": ("sparse",)}, "rows that are left out have no projection to correct"),
    ({"basis": tuple(b for b in _BASES if b not in ("svd", "rsvd")), "proj_type": ("full",)},
     "only singular vectors are known for both sides"),
    ({"residual": _RESIDUALS[1:], "proj_type": ("full",)},
     "with both sides projected the complement does not belong to one subspace"),
    ({"refresh": ("lazy",), "basis": tuple(b for b in _BASES if b not in _FOLLOWING)},
     "the overlap of subspaces that do not follow the gradient says nothing"),
    ({"residual": ("raw",), "scaling": ("rms", "factored", "subset_norm"), "scaling_in": ("subspace",)},
     "a raw gradient is added to a scaled direction; take scaling_in='full', or residual='fira'"),
    ({"residual": ("sign",), "scaling": ("none",)}, "signs have size 1, unscaled gradients do not"),
    ({"residual": (*_RATIOS, "sign", "sparse"), "scaling_in": ("full",)},
     "this residual needs the scaled direction in the subspace"),
    ({"residual": ("error_feedback",), "scaling": ("factored",), "scaling_in": ("full",)},
     "the error is that of scaled gradients, and would be added to gradients that are not scaled"),
    ({"residual": _RATIOS, "scaling": ("none",), "momentum": ("none",)}, "the ratio of a gradient to itself is 1"),
    ({"residual": ("sparse",), "scaling": ("none", "factored", "subset_norm")}, "its entries follow Adam"),
    ({"residual": ("sparse",), "momentum": ("none", "heavy_ball")}, "its entries follow Adam"),
)  # fmt: skip


class Composed(LowRankOptimizer):
    __doc__ = r"""The optimizer with one named choice per slot of `recipe/recipe.py`. Other parameters get AdamW.

    Args:
        params, lr, betas, eps, weight_decay, rank, update_proj_gap, scale, proj_type: see `GaLoreAdamW`.
        basis: "rsvd", "svd", "power" (one power iteration, LDAdam), "dct2", "dct3", "hadamard", "dictionary" (random),
            "topk" (largest rows), "rows" (random rows), "random" (orthonormal), "gaussian" (drawn again at each step
            instead of kept), "identity" (full space).
        refresh: "staggered" or "every" (all at once) update_proj_gap steps, or "lazy" (Q-GaLore).
        moments: what a refresh does to the moments: "keep", "rotate" or "reset".
        momentum: "low" (Adam's average of the coordinates), "heavy_ball", "none".
        scaling: "rms" (Adam), "factored" (Adafactor, which scales the gradient, so that momentum averages updates),
            "subset_norm" (one mean of squares per column of the turned matrix), "none".
        scaling_in: "subspace", or "full": second moments of the whole gradient, which divide the whole update.
        residual: what becomes of the complement of the subspace: "drop", "raw" (SGD), "sign" (FRUGAL), "fira",
            "apollo" or "apollo_tensor" (the update is the rescaled gradient alone), "error_feedback", "sparse"
            (GaLore+, 1 % of the entries).
        store: how moments and error are kept: "float32", "bfloat16", "int8", "int4".

    Errors, in addition to those of all methods: a ValueError for choices that mean nothing together, with the reason.

    Example::

        opt = lowrank_optim.compose(model.named_parameters(), lr=1e-3, basis="dct2", residual="fira", store="int8")
    """ + OPTIONS.replace("state_dtype:", "store:")
    fixed = ("update_proj_gap",)  # a lazy schedule keeps a gap for each matrix
    choices = {
        "basis": _BASES, "refresh": ("staggered", "every", "lazy"), "momentum": ("low", "heavy_ball", "none"),
        "scaling": ("rms", "factored", "subset_norm", "none"), "scaling_in": ("subspace", "full"),
        "residual": _RESIDUALS, "store": tuple(STORES),
    }  # fmt: skip

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        rank: int | float | str | None = "auto",
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: str = "std",
        basis: str = "rsvd",
        refresh: str = "staggered",
        moments: str = "keep",
        momentum: str = "low",
        scaling: str = "rms",
        scaling_in: str = "subspace",
        residual: str = "drop",
        store: str = "float32",
        bf16_update: str = "stochastic",
        nonfinite: str = "skip",
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(params, given(locals()), strict=strict)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        hyperparameters.compatible(group, CLASHES)
        return Recipe(
            basis=_basis(group),
            refresh=_refresh(group),
            momentum=_momentum(group),
            momentum_of="update" if group["scaling"] == "factored" else "gradient",
            scaling=_scaling(group),
            scaling_in=group["scaling_in"],
            residual=_residual(group),
            step_size=Constant(),
            scale=group["scale"],
            **stores({"state_dtype": group["store"]}),
        )

    def plain(self, group: dict[str, Any]) -> Recipe:
        return adamw({**group, "state_dtype": group["store"]})


def compose(params: Any, lr: float | Tensor = 1e-3, **options: Any) -> Composed:
    """Return an optimizer with one choice per slot; see `Composed` for the choices."""
    return Composed(params, lr, **options)


def _basis(group: dict[str, Any]) -> Basis:
    """Return the basis that the group names."""
    name = group["basis"]
    own: dict[str, Basis] = {
        "identity": Identity(),
        "gaussian": Random(),
        "power": PowerIteration(0.9, group["betas"][0]),
        **{kind: Dictionary("random" if kind == "dictionary" else kind) for kind in _DICTIONARIES},
    }
    basis = own[name] if name in own else BASES[name]
    return TwoSided(basis) if group["proj_type"] == "full" else basis


def _refresh(group: dict[str, Any]) -> Refresh:
    kind = Lazy if group["refresh"] == "lazy" else Every
    # Full space is fitted once, at the first step, and never again.
    gap = 1 << 62 if group["basis"] == "identity" else group["update_proj_gap"]
    return kind(gap, group["moments"], stagger=group["refresh"] != "every")


def _momentum(group: dict[str, Any]) -> Momentum:
    beta = group["betas"][0]
    # Adafactor does not correct the average of its updates, but an average that restarts must be corrected.
    debias = group["scaling"] != "factored" or group["moments"] == "reset"
    return {"low": EMA(beta, debias), "heavy_ball": HeavyBall(beta), "none": NoMomentum()}[group["momentum"]]


def _scaling(group: dict[str, Any]) -> Scaling:
    beta, eps = group["betas"][1], hyperparameters.single("eps", group["eps"])
    scalings: dict[str, Scaling] = {
        "rms": RMS(beta, eps),
        "factored": Factored(-0.8, None, 1.0),
        "subset_norm": SubsetNorm(beta, eps, reduce="mean"),
        "none": NoScaling(),
    }
    return scalings[group["scaling"]]


def _residual(group: dict[str, Any]) -> Residual:
    (beta1, beta2), eps = group["betas"], hyperparameters.single("eps", group["eps"])
    turned = group["moments"] == "rotate" and group["momentum"] == "low" and group["scaling"] != "factored"
    carried = beta1 / (1 - beta1) if turned else 0.0  # an average of updates has lost no gradient
    residuals: dict[str, Residual] = {
        "drop": Drop(),
        "raw": Raw(),
        "sign": Sign(),
        "fira": NormScaled(),
        "apollo": Rescaled(),
        "apollo_tensor": Rescaled(granularity="tensor"),
        "error_feedback": ErrorFeedback(STORES[group["store"]], carried),
        "sparse": Sparse(0.01, 1.0, EMA(beta1), RMS(beta2, eps)),
    }
    return residuals[group["residual"]]
