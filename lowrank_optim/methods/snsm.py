"""SNSM: Subspace-Momentum with Subset-Norm. Nguyen and Nguyen, ICML 2025, https://arxiv.org/abs/2411.07120"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..optimizer import LowRankOptimizer
from ..parts import Raw, SubsetNorm
from ..parts.recipes import BASES, adam, adamw, subspace
from ..recipe.recipe import Recipe
from .options import ONE_SIDED, OPTIONS, given


class SNSMAdamW(LowRankOptimizer):
    r"""Momentum inside a subspace, the gradient outside of it, and one second moment per row or column for both.

    With P, R and M as in `SubspaceMomentum` (momentum = beta1), and subsets as in `SubsetNormAdamW`:

        U = P M / (1 - beta1^t) + G - P R                             (m, n); t since the last refresh
        v_i <- beta2 v_i + (1 - beta2) sum of G^2 over subset i       never reset
        W <- (1 - lr weight_decay) W - lr scale U / (sqrt(v / (1 - beta2^step)) + eps)

    Memory: `m r + n r + n` elements per matrix, where n is the longer side unless proj_type says otherwise. With basis
    "topk" or "rows" r indices replace `m r`. A step holds U and its quotient, two (m, n) tensors.

    Args:
        params, betas, eps, weight_decay, rank, update_proj_gap, scale, stagger: see `GaLoreAdamW`.
        lr: for all parameters; embeddings, heads and vectors get AdamW.
        basis, moments, proj_type: see `SubspaceMomentum`.
        subset_size, reduce: see `SubsetNormAdamW`.

    Example::

        opt = lowrank_optim.SNSMAdamW(model.named_parameters(), lr=1e-3, rank=0.25, reduce="mean")

    Differences from the paper and from its authors' code: those of `SubspaceMomentum` and of `SubsetNormAdamW`.
    `tests/reference/subset_norm.py` is the algorithm as a loop.
    """

    __doc__ = (__doc__ or "") + OPTIONS
    choices = {"basis": tuple(BASES), "proj_type": ONE_SIDED, "reduce": ("sum", "mean")}

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
        subset_size: int | str | None = None,
        reduce: str = "sum",
        moments: str = "reset",
        stagger: bool = True,
        state_dtype: str = "float32",
        bf16_update: str = "stochastic",
        nonfinite: str = "skip",
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(params, given(locals()), strict=strict)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        subsets = SubsetNorm(group["betas"][1], group["eps"], group["subset_size"], group["reduce"])
        common = {**adam(group), **subspace(group), "scaling": subsets}
        return Recipe(**{**common, "scaling_in": "full", "residual": Raw()})

    def plain(self, group: dict[str, Any]) -> Recipe:
        return adamw(group)
