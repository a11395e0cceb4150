"""LDAdam: adaptive optimization from low-dimensional gradient statistics. Robert et al., ICLR 2025, 2410.16103"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..optimizer import LowRankOptimizer
from ..parts import Drop, ErrorFeedback, PowerIteration
from ..parts.recipes import ERRORS, adam, schedule, stores
from ..recipe.recipe import Recipe
from .options import ONE_SIDED, OPTIONS, given


class LDAdamW(LowRankOptimizer):
    r"""AdamW in a subspace that moves at every step, with rotated moments and error feedback.

    With G turned so that its projected side m comes first, E (m, n) the error, M and V Adam's moments:

        A = G + E
        B = rho P_old M / (1 - beta1^t) + (1 - rho) A;    P <- orth(B B^T P_old)      the first P is exact: SVD of A
        C = P^T P_old;    M_old <- M;    M <- C M;    V <- rotated by variance around the mean, see `moments`
        R = P^T A;        E <- A - P R + beta1 / (1 - beta1) (P_old M_old - P M)
        W <- (1 - lr weight_decay) W - lr scale P Adam(R)

    Memory: `m r + 2 n r` elements per matrix, and the error: `m n` elements in a dtype of its own.

    Args:
        params, lr, eps, weight_decay, rank, scale, moments, stagger: see `GaLoreAdamW`.
        betas: as in Adam; the paper's defaults differ from Adam's.
        update_proj_gap: steps between moves of the subspace.
        rho: weight of the momentum in the power iteration.
        error_feedback: how E is kept: "float32", "bfloat16", "int8", "int4", or "none" for no error feedback.
        proj_type: the side that is projected: "std", "reverse_std", "left" or "right".

    Example::

        opt = lowrank_optim.LDAdamW(model.named_parameters(), lr=1e-3, rank=16)

    Differences from the paper and from its authors' code: E is state of its own (the code keeps it in `p.grad`, where
    clipping, accumulation and `zero_grad` break it); a negative variance is 0 (the code: its absolute value); square
    matrices project columns (the code: rows); CholeskyQR2 orthonormalizes. `tests/reference/ldadam.py` is the algorithm
    as a loop.
    """

    __doc__ = (__doc__ or "") + OPTIONS
    choices = {"error_feedback": tuple(ERRORS), "proj_type": ONE_SIDED}

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        rank: int | float | str | None = "auto",
        update_proj_gap: int = 1,
        scale: float = 1.0,
        proj_type: str = "std",
        rho: float = 0.908,
        error_feedback: str = "float32",
        moments: str = "rotate",
        stagger: bool = True,
        state_dtype: str = "float32",
        bf16_update: str = "stochastic",
        nonfinite: str = "skip",
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(params, given(locals()), strict=strict)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        beta1, kept = group["betas"][0], ERRORS[group["error_feedback"]]
        residual = ErrorFeedback(kept, beta1 / (1 - beta1)) if kept else Drop()
        basis = PowerIteration(group["rho"], beta1)
        common = {**adam(group), **stores(group)}
        return Recipe(basis=basis, refresh=schedule(group), residual=residual, scale=group["scale"], **common)
