"""GaLore+: cross-head projection and a sparse residual. Liao et al. 2024, https://arxiv.org/abs/2412.19820"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .. import checks, hyperparameters
from ..optimizer import LowRankOptimizer
from ..parts import EMA, RMS, SharedHead, Sparse
from ..parts.recipes import BASES, adam, subspace
from ..recipe.plan import Plan
from ..recipe.recipe import Recipe
from .options import ONE_SIDED, OPTIONS, given


class GaLorePlusAdamW(LowRankOptimizer):
    r"""GaLore with the subspace of one random attention head for all heads, and exact Adam on a few entries.

    The text of the paper was not available. This is a **reconstruction** from its abstract, its reviews and its
    equations as quoted in other papers. With G turned so that its projected side m comes first, and heads as blocks of
    its columns:

        every update_proj_gap steps:  P (m, r) <- leading left singular vectors of one random head's columns of G
                                      (of ceil(r / columns of a head) heads together, if one has too few)
        D = Adam(P^T G)                                               (r, n)
        at the first refresh:         O <- the density m n largest entries of |G - P P^T G|
        U_O = Adam(G_O)                                               exact, on these entries alone
        W <- (1 - lr weight_decay) W - lr scale (P D + residual_scale (U - P D)_O)

    Memory: `m r + 2 n r` elements per matrix, and two elements and an int32 per entry of O.

    Args:
        params, lr, betas, eps, weight_decay, rank, update_proj_gap, scale, basis, moments, stagger: see `GaLoreAdamW`.
        heads: number of heads in each matrix of a group: blocks of rows if columns are projected (side "right": query,
            key and value), blocks of columns if rows are projected ("left": the output). 1: the whole matrix.
            `lowrank_optim.param_groups(model, heads=True)` reads heads and sides from the attention modules. Fitting
            is cheaper only if the rank is at most the width of a head.
        density: share of the entries that follow Adam exactly.
        residual_scale: weight of the correction on these entries; with 1 they follow Adam.
        proj_type: the side that is projected: "std", "reverse_std", "left" or "right".

    Example::

        groups = lowrank_optim.param_groups(model, rank=32, heads=True)
        opt = lowrank_optim.GaLorePlusAdamW(groups, lr=1e-3)

    Differences from the paper: unknown, see above. The reconstruction chooses O at one step, without a warm-up that
    would need a whole matrix of scores. `tests/reference/galore_plus.py` is the algorithm as a loop.
    """

    __doc__ = (__doc__ or "") + OPTIONS
    choices = {"basis": ("rsvd", "svd"), "proj_type": ONE_SIDED}

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
        heads: int = 1,
        density: float = 0.01,
        residual_scale: float = 1.0,
        basis: str = "rsvd",
        moments: str = "keep",
        stagger: bool = True,
        state_dtype: str = "float32",
        bf16_update: str = "stochastic",
        nonfinite: str = "skip",
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(params, given(locals()), strict=strict)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        (beta1, beta2), eps = group["betas"], hyperparameters.single("eps", group["eps"])
        residual = Sparse(group["density"], group["residual_scale"], EMA(beta1), RMS(beta2, eps))
        basis = SharedHead(BASES[group["basis"]], group["heads"])
        return Recipe(**{**adam(group), **subspace(group), "basis": basis, "residual": residual})

    def refuse(self, plan: Plan, group: dict[str, Any]) -> None:
        checks.whole_heads(plan, group["heads"])
