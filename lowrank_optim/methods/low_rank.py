"""Low-rank weights with restarts. Glentis et al., "Scalable Parameter and Memory Efficient Pretraining for LLM",
https://arxiv.org/abs/2505.22922"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from ..layers.linear import LowRankLinear, ReparameterizedLinear
from ..weight_space import WeightSpaceOptimizer
from .options import WEIGHT_OPTIONS, given, restarts_due


class LowRankAdamW(WeightSpaceOptimizer):
    __doc__ = (
        r"""AdamW on the factors of `W = s B A`, which are the whole weight, with regular refactorizations and restarts.

        y = s (x A^T) B^T                       A (r, n), B (m, r), s = alpha / r
        every `refactor_every` updates:         B A = U S V^T,   B <- U sqrt(S),  A <- sqrt(S) V^T
        every `reset_every` updates:            moments of A and B restart

    Memory per weight: `4 (m + n) r` for the factors, their gradients and two moments. Each weight always has rank r.

    Args:
        rank: of every converted weight, or a fraction of min(m, n).
        alpha: s times the rank.
        init: "spectral": the best approximation of each weight; "random": both factors are drawn, and the initial
            weight is discarded.
        refactor_every: updates between refactorizations, which do not change the function of the model; None: never.
        reset_every: updates between resets of the moments, after which lr should recover over some 10 steps, as with
            `JaggedCosine(optimizer, restart_every=reset_every, restart_warmup=10, restart_from=0.001)`; None: never.

    Example::

        opt = lowrank_optim.LowRankAdamW(model, lr=1.5e-3, rank=128)

    Differences from the paper and from its authors' code: refactorization takes two QR and an r x r SVD in float64, not
    the SVD of a dense bfloat16 product (for low-rank layers the code has no refactorization); moments of embeddings and
    norms are not reset; the initial weight is approximated, not discarded, unless init="random".
    """
        + WEIGHT_OPTIONS
    )
    layer = LowRankLinear
    irreplaceable = unpartitionable = ""
    layer_options = ("alpha", "base", "init")

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        rank: int | float = 0.25,
        alpha: float = 32.0,
        init: str = "spectral",
        refactor_every: int | None = 200,
        reset_every: int | None = 200,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        rest_lr: float | None = None,
        state_dtype: str = "float32",
        bf16_update: str = "stochastic",
        nonfinite: str = "skip",
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(model, {**given(locals()), "base": "none"}, strict=strict)

    def restart(self, name: str, layer: ReparameterizedLinear, count: int, group: dict[str, Any]) -> bool:
        refactor, reset = restarts_due(count, group)
        if refactor:
            with self.trained(layer, "B", "A"):
                cast(LowRankLinear, layer).balance_()
            self.settle(layer, layer.factors)
        if reset:
            self.reset(layer)
        return refactor or reset

    def restarts(self, count: int, group: dict[str, Any]) -> int:
        return count // int(group["reset_every"] or group["refactor_every"] or count + 1)
