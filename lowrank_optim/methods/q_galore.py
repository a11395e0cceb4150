"""Q-GaLore: quantized GaLore with INT4 projection and lazy refreshes. Zhang et al. 2024, https://arxiv.org/abs/2407.08296"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..optimizer import LowRankOptimizer
from ..parts import STORES, Affine, Lazy
from ..parts.recipes import adam, stores, subspace
from ..recipe.recipe import Recipe
from .options import ONE_SIDED, OPTIONS, given

_BASIS_STORES = {**STORES, "int8": Affine(8), "int4": Affine(4)}


class QGaLoreAdamW(LowRankOptimizer):
    r"""GaLore with int4 bases, int8 moments, int8 weights, and refreshes that become rare where subspaces stand still.

    As `GaLoreAdamW`, with

        P kept in int4: equal steps between the least and the largest of each 256 elements, both kept as floats
        at each refresh:  o = |P_new^T P_old|^2 / r;   if the mean of `queue` o >= threshold:  gap <- growth gap

    Weights in int8 come from `lowrank_optim.quantize_weights(model)`. They are updated in float32 and rounded
    stochastically. Every optimizer of this package can train them.

    Memory: `m r / 2 + 2 n r` bytes per matrix, 8 bytes per 256 elements of P, and 4 bytes per 256 of the moments.

    Args:
        params, lr, betas, eps, weight_decay, rank, scale, basis, moments, stagger: see `GaLoreAdamW`.
        update_proj_gap: initial number of steps between refreshes.
        threshold: mean overlap of subspaces (0: orthogonal, 1: equal) from which a matrix is refreshed less often.
        queue: number of refreshes in the mean.
        growth: factor on the gap; 1: the gap stays.
        basis_dtype: how P is kept: "int4", or "int8", "bfloat16", "float32".
        state_dtype: of the moments; here "int8" by default.
        proj_type: the side that is projected: "std", "reverse_std", "left" or "right".

    Example::

        lowrank_optim.quantize_weights(model)
        opt = lowrank_optim.QGaLoreAdamW(lowrank_optim.param_groups(model, rank=128), lr=1e-2, scale=0.25)

    Differences from the paper and from its authors' code: the overlap is that of whole subspaces (the code: the signed
    cosine of the first vectors); the offset of a block is a float (the code's clamped zero point destroys blocks whose
    elements all have one sign); int4 is packed (the code stores it in bytes); decay is AdamW's, before the update.
    `tests/reference/q_galore.py` is the algorithm as a loop.
    """

    __doc__ = (__doc__ or "") + OPTIONS
    fixed = ("update_proj_gap",)  # the schedule keeps a gap for each matrix
    choices = {
        "basis": ("rsvd", "svd"), "basis_dtype": tuple(_BASIS_STORES), "proj_type": ONE_SIDED,
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
        basis_dtype: str = "int4",
        threshold: float = 0.4,
        queue: int = 5,
        growth: int = 2,
        moments: str = "keep",
        stagger: bool = True,
        state_dtype: str = "int8",
        bf16_update: str = "stochastic",
        nonfinite: str = "skip",
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(params, given(locals()), strict=strict)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        carry = group["update_proj_gap"], group["moments"], group["stagger"]
        lazy = Lazy(*carry, group["threshold"], group["queue"], group["growth"])
        kept = {**stores(group), "basis_store": _BASIS_STORES[group["basis_dtype"]]}
        return Recipe(**{**adam(group), **subspace(group), **kept, "refresh": lazy})
