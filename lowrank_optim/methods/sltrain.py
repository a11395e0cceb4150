"""SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining. Han et al., NeurIPS 2024,
https://arxiv.org/abs/2406.02214. Restarts: Glentis et al., https://arxiv.org/abs/2505.22922"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from ..layers.linear import ReparameterizedLinear
from ..layers.sparse import SparseLowRankLinear
from ..weight_space import WeightSpaceOptimizer
from .options import WEIGHT_OPTIONS, given, restarts_due


class SLTrain(WeightSpaceOptimizer):
    __doc__ = (
        r"""AdamW on thin factors and on a few single entries, whose sum is the weight.

        W = s B A + S                           A (r, n), B (m, r), s = alpha / r, S zero outside a fixed support
        y = x W^T                               W is composed in forward and in backward, and never kept
        dB = s g^T (x A^T),  dA = s (g B)^T x,  dS = (g^T x) at the support     or all from g^T x, by rows, if cheaper
        every `refactor_every` updates:         B A = U Z V^T,   B <- U sqrt(Z),  A <- sqrt(Z) V^T
        every `reset_every` updates:            moments of A, B and S restart

    The support is drawn once, uniformly, from the seed and the name of the layer. Loading a state dict of the model
    loads its support too.

    Memory per weight, with `k = density m n`: `4 ((m + n) r + k)` for the trained tensors, their gradients and two
    moments, and 4 bytes for each of the k positions. Temporarily one W exists at a time. The moments of S stay float32
    with any `state_dtype`.

    Args:
        rank: of the product, or a fraction of min(m, n).
        density: share of the entries of each weight that S holds.
        alpha: s times the rank.
        init: "spectral": the product is the best approximation of each weight, and S its error at the support;
            "random": A and S uniform in +-1/sqrt(n), B zero, and the initial weight is discarded.
        refactor_every: updates between refactorizations of the product, which do not change the function of the model;
            None: never.
        reset_every: updates between resets of the moments, after which lr should recover over some 10 steps, as with
            `JaggedCosine(optimizer, restart_every=reset_every, restart_warmup=10, restart_from=0.001)`; None: never.

    Example::

        opt = lowrank_optim.SLTrain(model, lr=3e-3, rank=128, density=0.03)

    Differences from the paper and from its authors' code: the initial weight is approximated, not discarded, unless
    init="random"; the gradient of W is never formed as a whole; the support takes 4 bytes per entry instead of 8, and
    follows from `seed`, not from torch's generator; biases keep their values; there is no dropout and no trainable
    scale. Restarts are as in `LowRankAdamW`, with any period, and off by default as in the paper. The code of Glentis
    et al. computes a dense bfloat16 product and its SVD, and rebuilds the optimizer of all parameters. Weight decay,
    off by default, applies to S as to the factors.
    """
        + WEIGHT_OPTIONS
    )
    layer = SparseLowRankLinear
    irreplaceable = unpartitionable = ""
    layer_options = ("density", "alpha", "init")

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
        density: float = 0.03,
        alpha: float = 32.0,
        init: str = "spectral",
        refactor_every: int | None = None,
        reset_every: int | None = None,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        rest_lr: float | None = None,
        state_dtype: str = "float32",
        bf16_update: str = "stochastic",
        nonfinite: str = "skip",
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(model, given(locals()), strict=strict)

    def restart(self, name: str, layer: ReparameterizedLinear, count: int, group: dict[str, Any]) -> bool:
        refactor, reset = restarts_due(count, group)
        if refactor:
            with self.trained(layer, "B", "A"):
                cast(SparseLowRankLinear, layer).balance_()
            self.settle(layer, ("B", "A"))
        if reset:
            self.reset(layer)
        return refactor or reset

    def restarts(self, count: int, group: dict[str, Any]) -> int:
        return count // int(group["reset_every"] or group["refactor_every"] or count + 1)
