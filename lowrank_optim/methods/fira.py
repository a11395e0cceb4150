"""Fira: full-rank training under a low-rank constraint. Chen et al. 2024, https://arxiv.org/abs/2410.01623"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..optimizer import LowRankOptimizer
from ..parts import NormScaled
from ..parts.recipes import adam, subspace
from ..recipe.recipe import Recipe
from .options import ONE_SIDED, OPTIONS, given


class FiraAdamW(LowRankOptimizer):
    r"""GaLore plus the complement that it drops, scaled as Adam scales the part of the gradient in the subspace.

    With P, R and D as in `GaLoreAdamW`:

        S = G - P R                                                   (m, n)
        S_j <- S_j |D_j| / (|R_j| + 1e-8)                             for each column j
        S <- S min(1, limit size(S_previous) / size(S))               size: root mean square
        W <- (1 - lr weight_decay) W - lr scale (P D + S)

    Memory: that of `GaLoreAdamW`, `m r + 2 n r` elements per matrix, and two numbers. S is not formed: its length
    follows from those of G and R if P is orthonormal (in bfloat16 P is orthonormal to about 1e-3).

    Args:
        params, lr, betas, eps, weight_decay, rank, update_proj_gap, scale, basis, moments, stagger: see `GaLoreAdamW`.
        proj_type: the side that is projected: "std", "reverse_std", "left" or "right".
        limit: the most that S may grow from one step to the next; None: no limit.
        form: "paper", as above, or "code", as in the published code: `S = G - scale P R`, not multiplied by scale.

    Example::

        opt = lowrank_optim.FiraAdamW(lowrank_optim.param_groups(model, rank=128), lr=1e-2, scale=0.25)

    Differences from the paper and from its authors' code: the limiter does not remember a size below 1e-3 (as
    published, a zero gradient caps S at 1 % of growth per step from zero, for two thousand steps); sizes and ratios are
    taken after bias correction (the code: before); and the differences of `GaLoreAdamW`. The published perplexities
    presumably come from the code's form, whose S is 1 / scale times as long. `tests/reference/fira.py` is the algorithm
    as a loop.
    """

    __doc__ = (__doc__ or "") + OPTIONS
    choices = {"basis": ("rsvd", "svd"), "form": ("paper", "code"), "proj_type": ONE_SIDED}

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
        limit: float | None = 1.01,
        form: str = "paper",
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
        code_scale = group["scale"] if group["form"] == "code" else None
        residual = NormScaled(limit=group["limit"], code_scale=code_scale)
        return Recipe(**{**adam(group), **subspace(group), "residual": residual})
