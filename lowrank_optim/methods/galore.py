"""GaLore: Gradient Low-Rank Projection. Zhao et al., ICML 2024, https://arxiv.org/abs/2403.03507"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..optimizer import LowRankOptimizer
from ..parts.recipes import adam, subspace
from ..recipe.recipe import Recipe
from .options import OPTIONS, given


class GaLoreAdamW(LowRankOptimizer):
    r"""AdamW on the coordinates of each gradient in a subspace that is refitted every so often.

    With G turned so that its projected side m comes first:

        every update_proj_gap steps:  P (m, r) <- leading left singular vectors of G
        R = P^T G                                                                             (r, n)
        M <- beta1 M + (1 - beta1) R        V <- beta2 V + (1 - beta2) R^2                    (r, n)
        D = M / (1 - beta1^t) / (sqrt(V / (1 - beta2^t)) + eps)
        W <- (1 - lr weight_decay) W - lr scale P D

    Memory: `m r + 2 n r` elements per matrix and a few counters, against `2 m n` of AdamW. `report()` shows the bytes.

    Args:
        params: parameters, `model.named_parameters()` (embeddings and heads are then recognized), or groups, for
            example from `lowrank_optim.param_groups(model)`.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW, for all parameters.
        rank: r, below the shorter side: an int, or a fraction of that side. "auto": 0.25; but if any group sets a rank,
            groups without one are not projected, as in the original package. None in a group: not projected.
        update_proj_gap: steps between refreshes of P.
        scale: factor on projected updates only: the lr of projected matrices relative to that of other parameters.
        proj_type: the side that is projected. "std": the shorter side; "reverse_std": the longer side; "left": rows;
            "right": columns; "full": both. With "full", R is diagonal at each refresh. Adam then scales the rounding
            noise off the diagonal up to its own step size, unless eps exceeds the noise. The paper's method has this
            weakness, and it is kept.
        basis: "rsvd", randomized subspace iteration that starts from the previous basis, or "svd", exact.
        moments: what a refresh does to M and V: "keep" leaves them as they are (the paper), "rotate" brings them into
            the new basis, "reset" sets them to zero and restarts their clock.
        stagger: spread the refreshes of different matrices over the steps; False: refresh all in the same step.

    Example::

        opt = lowrank_optim.GaLoreAdamW(model.named_parameters(), lr=1e-3, rank=0.25)
        loss.backward()
        opt.step()

    Differences from the paper and from its authors' code: eps is added after bias correction and defaults to 1e-8 (the
    code: before, 1e-6); weight decay comes before the update (the code: after); signs of singular vectors are fixed;
    scale defaults to 1 (the code: 0.25 in all recipes); refreshes are staggered and randomized by default; the basis
    is a compact copy (the code keeps the whole U or V alive). `tests/reference/galore.py` is the algorithm as a loop.
    """

    __doc__ = (__doc__ or "") + OPTIONS
    choices = {"basis": ("rsvd", "svd")}

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
        return Recipe(**adam(group), **subspace(group))


class GaLoreAdamW8bit(GaLoreAdamW):
    """`GaLoreAdamW` with moments in int8, under the name that galore-torch gives it."""

    __init__ = functools.partialmethod(GaLoreAdamW.__init__, state_dtype="int8")
