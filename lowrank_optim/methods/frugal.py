"""FRUGAL: memory-efficient optimization by reducing state overhead. Zmushko et al., ICML 2025, 2411.07837"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..optimizer import LowRankOptimizer
from ..parts import Sign
from ..parts.recipes import BASES, adam, subspace
from ..recipe.recipe import Recipe
from .options import ONE_SIDED, OPTIONS, given


class FRUGAL(LowRankOptimizer):
    r"""AdamW on a part of each gradient, and sign steps on the rest: full-rank updates with the state of a part.

    With G turned so that its projected side m comes first:

        every update_proj_gap steps:  P (m, r) <- r rows of the identity, drawn at random;  moments restart
        R = P^T G;   D = Adam(R)                                      (r, n)
        W <- (1 - lr weight_decay) W - lr scale (P D + sign_scale sign(G - P R))

    Memory: `2 n r` elements per matrix and r indices (2 r with moments="rotate"). A dense P takes `m r` elements
    instead of the indices.

    Args:
        params, lr, betas, eps, weight_decay, update_proj_gap, scale, moments, stagger: see `GaLoreAdamW`.
        rank: number of rows with state; as a fraction, the paper's density.
        sign_scale: size of the sign step relative to Adam's: in the paper 1 for pretraining, 0.1 for fine-tuning.
        basis: "rows", random rows; "topk", the rows of largest norm; "random", "svd" and "rsvd": dense subspaces.
        proj_type: the side that is projected: "std", "reverse_std", "left" or "right".

    Example::

        opt = lowrank_optim.FRUGAL(model.named_parameters(), lr=1e-3, rank=0.25)

    Differences from the paper and from its authors' code: a part of every matrix has state at any time (in the code's
    default "block" mode whole matrices have it in turn, so state would be created and freed during training); restarted
    moments have their own clock for bias correction. `tests/reference/frugal.py` is the algorithm as a loop.
    """

    __doc__ = (__doc__ or "") + OPTIONS
    choices = {"basis": tuple(BASES), "proj_type": ONE_SIDED}

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
        sign_scale: float = 1.0,
        basis: str = "rows",
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
        return Recipe(**{**adam(group), **subspace(group), "residual": Sign(group["sign_scale"])})
