"""Subset-Norm: one second moment per subset. Nguyen and Nguyen, ICML 2025, https://arxiv.org/abs/2411.07120"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..optimizer import LowRankOptimizer
from ..parts import Drop, Identity, Never, SubsetNorm
from ..parts.recipes import adam, adamw, stores
from ..recipe.recipe import Recipe
from .options import OPTIONS, given


class SubsetNormAdamW(LowRankOptimizer):
    r"""AdamW whose second moment is one number per subset of a matrix, instead of one per entry.

        M <- beta1 M + (1 - beta1) G                                  (m, n)
        v_i <- beta2 v_i + (1 - beta2) sum of G^2 over subset i       rows of a tall matrix, columns of a wide one
        W <- (1 - lr weight_decay) W - lr scale M / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    Memory: `m n + max(m, n)` elements per matrix, against `2 m n` of AdamW. This is no subspace method: matrices are
    updated whole.

    Args:
        params, lr, betas, eps, weight_decay: as in torch.optim.AdamW; embeddings, heads and vectors get AdamW itself.
        scale: multiplies the updates of matrices only.
        subset_size: entries per subset; None: whole rows or columns; "sqrt": about the square root of the number of
            entries of the matrix. A subset is a run along the shorter side; the last run of a row or column may be
            shorter.
        reduce: "sum", as published: steps shrink by the square root of the subset size, so the right scale grows with
            it; "mean": an lr that suits AdamW stays right.

    Groups: `rank=None` leaves a group to AdamW; any other rank has no meaning here.

    Example::

        opt = lowrank_optim.SubsetNormAdamW(model.named_parameters(), lr=1e-3, reduce="mean")

    Differences from the paper and from its authors' code: eps comes after bias correction and is 1e-8 (the code: 1e-6);
    decay comes before the update; subsets of a given size run along the shorter side (the code: along the row-major
    order, with a size that divides the number of entries, hence 1 for a prime number).
    `tests/reference/subset_norm.py` is the algorithm as a loop.
    """

    __doc__ = (__doc__ or "") + OPTIONS
    choices = {"reduce": ("sum", "mean"), "proj_type": ("std",)}
    ranked = False

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
        scale: float = 1.0,
        subset_size: int | str | None = None,
        reduce: str = "sum",
        state_dtype: str = "float32",
        bf16_update: str = "stochastic",
        nonfinite: str = "skip",
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(params, given(locals()), strict=strict)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        subsets = SubsetNorm(group["betas"][1], group["eps"], group["subset_size"], group["reduce"])
        common = {**adam(group), "scaling": subsets, "scale": group["scale"], **stores(group)}
        return Recipe(basis=Identity(), refresh=Never(), residual=Drop(), **common)

    def plain(self, group: dict[str, Any]) -> Recipe:
        return adamw(group)
