"""Subspace-Momentum. Nguyen and Nguyen, ICML 2025, https://arxiv.org/abs/2411.07120"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..optimizer import LowRankOptimizer
from ..parts import EMA, Constant, NoScaling, Raw
from ..parts.recipes import BASES, subspace
from ..recipe.recipe import Recipe
from .options import ONE_SIDED, OPTIONS, given


class SubspaceMomentum(LowRankOptimizer):
    r"""SGD with momentum inside a subspace, and without momentum outside of it.

    With G turned so that its projected side m comes first:

        every update_proj_gap steps:  P (m, r) <- leading left singular vectors of G;  the momentum restarts
        R = P^T G;    M <- momentum M + (1 - momentum) R              (r, n)
        W <- (1 - lr weight_decay) W - lr scale (P M / (1 - momentum^t) + G - P R)

    Memory: `m r + n r` elements per matrix, or `n r` and r indices with basis "topk" or "rows".

    Args:
        params, rank, update_proj_gap, scale, stagger: see `GaLoreAdamW`.
        lr, weight_decay: for all parameters. lr means what it means for SGD, because gradients are not scaled.
        momentum: weight of the old average.
        basis: "svd", "rsvd", "random"; or rows of the turned matrix: "topk", the rows of largest norm, "rows", random.
        moments: "reset" as published; "rotate" or "keep".
        proj_type: the side that is projected: "std", "reverse_std", "left" or "right".

    Example::

        opt = lowrank_optim.SubspaceMomentum(model.named_parameters(), lr=0.1, rank=0.25)

    Differences from the paper and from its authors' code: the momentum is reset before a refresh step uses it (the
    code: afterwards, so that the step reads old coefficients in the new basis and loses its gradient); bias correction
    has its own clock and does not apply to the complement (the code multiplies the complement by 10 at the first step);
    the published "topk" takes the longer side, which is `proj_type="reverse_std"`. `tests/reference/subset_norm.py` is
    the algorithm as a loop.
    """

    __doc__ = (__doc__ or "") + OPTIONS
    rule = "SGD"
    choices = {"basis": tuple(BASES), "proj_type": ONE_SIDED}

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
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
        rule = {"momentum": EMA(group["momentum"]), "scaling": NoScaling(), "step_size": Constant()}
        return Recipe(**{**rule, **subspace(group), "residual": Raw()})
