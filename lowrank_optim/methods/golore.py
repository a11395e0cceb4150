"""GoLore: GaLore that converges. He et al., ICML 2025, https://arxiv.org/abs/2410.11289"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..optimizer import LowRankOptimizer
from ..parts import Later, Random
from ..parts.recipes import BASES, adam, subspace
from ..recipe.recipe import Recipe
from .options import ONE_SIDED, OPTIONS, given


class GoLoreAdamW(LowRankOptimizer):
    r"""GaLore before step `random_after`, and the same method in random subspaces from that step on.

    Late in training the leading singular vectors of a gradient are those of its noise, and GaLore may stand still; a
    uniformly random orthonormal P sees every direction in turn.

        refresh before step s:  P (m, r) <- leading left singular vectors of G      s < random_after
                                P <- orth(Gaussian (m, r))                          else

    The step itself is that of `GaLoreAdamW`. Memory: `m r + 2 n r` elements per matrix.

    Args:
        params, lr, betas, eps, weight_decay, rank, update_proj_gap, scale, basis, stagger: see `GaLoreAdamW`.
        random_after: the step from which bases are random; in the paper 80 % of all steps.
        moments: what a refresh does to the moments, see `GaLoreAdamW`; the paper rotates them.
        proj_type: the side that is projected: "std", "reverse_std", "left" or "right".

    Example::

        opt = lowrank_optim.GoLoreAdamW(model.named_parameters(), lr=1e-3, random_after=int(0.8 * steps))

    Differences from the paper and from its authors' code: rotated moments are kept (the code rotates a local copy, and
    loses it together with the gradient of that step); second moments are rotated by their variance around the mean; and
    the differences of `GaLoreAdamW`. `tests/reference/golore.py` is the algorithm as a loop.
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
        random_after: int,
        basis: str = "rsvd",
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
        later = Later(BASES[group["basis"]], Random(orthonormal=True, kept=True), group["random_after"])
        return Recipe(**{**adam(group), **subspace(group), "basis": later})
