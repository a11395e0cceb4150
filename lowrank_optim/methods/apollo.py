"""APOLLO: SGD-like memory, AdamW-level performance. Zhu et al. 2024, https://arxiv.org/abs/2412.05270"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..optimizer import LowRankOptimizer
from ..parts import Random, Rescaled
from ..parts.recipes import adam, schedule, stores
from ..recipe.recipe import Recipe
from .options import ONE_SIDED, OPTIONS, given


class APOLLO(LowRankOptimizer):
    r"""The gradient itself, each column scaled as Adam scales its projection to a small random subspace.

    With G turned so that its projected side m comes first, and P (m, r) of entries N(0, 1/r):

        every update_proj_gap steps:  P <- random numbers, drawn again
        R = P^T G;  D = Adam(R), bias-corrected                       (r, n)
        S_j = G_j |D_j| / (|R_j| + 1e-8)                              for each column j
        S <- S min(1, limit size(S_previous) / size(S))               size: root mean square
        W <- (1 - lr weight_decay) W - lr sqrt(scale) S

    Memory: `2 n r` elements per matrix and two numbers. P is not kept: each step draws it again, from the seed and the
    number of refreshes.

    Args:
        params, lr, betas, eps, weight_decay, rank, update_proj_gap, stagger: see `GaLoreAdamW`.
        scale: the update is multiplied by its square root, as published. The right scale grows with m / rank.
        proj_type: the side that is projected: "std", the shorter, "reverse_std", "left" or "right".
        moments: "keep" or "reset". "rotate" would enlarge them at each refresh, because P is not orthonormal.
        granularity: "channel", one factor per column of the turned matrix, or "tensor", one for the whole matrix.
        scale_front: multiply by sqrt(scale) before the limiter instead of after it.
        limit: the most that S may grow from one step to the next; None: no limit.
        store_projection: keep P, for `m r` more elements, instead of drawing it at each step, which costs time.

    Example::

        opt = lowrank_optim.APOLLO(lowrank_optim.param_groups(model, rank=256), lr=1e-2)

    Differences from the paper and from its authors' code: P is not kept (the code keeps it, the paper counts a seed)
    and is the same on every device; bias correction is inside the factor (the code: in lr, which differs only for the
    limiter); decay comes before the update (the code: after); eps comes after bias correction and is 1e-8 (the code:
    1e-6); the limiter does not remember sizes below 1e-3, see `FiraAdamW`. `tests/reference/apollo.py` is the algorithm
    as a loop.
    """

    __doc__ = (__doc__ or "") + OPTIONS
    choices = {"granularity": ("channel", "tensor"), "proj_type": ONE_SIDED, "moments": ("keep", "reset")}

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
        granularity: str = "channel",
        scale_front: bool = False,
        limit: float | None = 1.01,
        store_projection: bool = False,
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
        root = group["scale"] ** 0.5
        front, scale = (root, 1.0) if group["scale_front"] else (1.0, root)
        residual = Rescaled(granularity=group["granularity"], limit=group["limit"], front=front)
        basis = Random(kept=group["store_projection"])
        common = {**adam(group), **stores(group)}
        return Recipe(basis=basis, refresh=schedule(group), residual=residual, scale=scale, **common)
