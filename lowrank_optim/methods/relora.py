"""ReLoRA: high-rank training by merging low-rank updates. Lialin et al., ICLR 2024, https://arxiv.org/abs/2307.05695"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from ..layers.linear import LowRankLinear, ReparameterizedLinear
from ..weight_space import WeightSpaceOptimizer
from .options import WEIGHT_OPTIONS, given


class ReLoRA(WeightSpaceOptimizer):
    __doc__ = (
        r"""AdamW on low-rank factors next to frozen weights, with regular merges into these weights.

        y = x W^T + s (x A^T) B^T          W (m, n) frozen, A (r, n) and B (m, r) trained, s = alpha / r
        every `merge_every` updates:  W <- W + s B A,   A drawn again,  B <- 0,  moments of A and B reset

    Each merge adds an update of rank r to W, so the sum of k merges has rank up to k r. Train the model densely for the
    first quarter or third of the run (with any optimizer), then create this optimizer. Ramp lr up again after each
    merge with `JaggedCosine(optimizer, restart_every=merge_every)`. The customary lr is twice that of dense training.

    Memory per weight: `m n` frozen elements (0.56 bytes per element with base="nf4"), and `4 (m + n) r` for the
    factors, their gradients and two moments.

    Args:
        rank: of the factors, or a fraction of min(m, n).
        merge_every: updates between merges.
        alpha: s times the rank.
        base: how the frozen weight is kept: "dense" in its dtype, "int8" or "nf4" in blocks. Merges into a quantized
            base round stochastically, which is right on average but noisy. With `fully_shard` such a base is converted
            with `by_rows=True`.
        exact_base: with a quantized base, merge into an exact copy in main memory and quantize that copy.
        reset: what a merge does to the moments of the factors: "drop" resets all entries; "magnitude" all but those
            with the largest first moments; "random" a random share. Entries that are reset have their own clock, so
            that their next update is not longer than lr.
        reset_ratio: share of the entries that a partial reset ("magnitude", "random") takes.

    Example::

        opt = lowrank_optim.ReLoRA(model, lr=1e-3, rank=128, merge_every=1000)
        schedule = lowrank_optim.JaggedCosine(opt, total_steps=20_000, warmup=500, restart_every=1000)

    Differences from the paper and from its authors' code: only B starts at zero (the code zeroes A as well, so that the
    first cycle trains neither); resets and merges have the same period; a partial reset takes m, v and the age at the
    same entries (the code draws two masks and keeps the step count, so that updates reach 31.6 lr); merges are computed
    in float32 and rounded once; there is no dropout and no trainable scale.
    """
        + WEIGHT_OPTIONS
    )
    layer = LowRankLinear
    irreplaceable = unpartitionable = ""
    layer_options = ("alpha", "base", "exact_base")
    choices = {"base": ("dense", "int8", "nf4")}

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
        merge_every: int = 1000,
        alpha: float = 32.0,
        base: str = "dense",
        exact_base: bool = False,
        reset: str = "drop",
        reset_ratio: float = 0.99,
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
        merges, due = divmod(count, group["merge_every"])
        if due:
            return False
        with self.trained(layer, "B", "A"):
            cast(LowRankLinear, layer).merge_(merges, stochastic=group["bf16_update"] != "none")
        self.settle(layer, layer.factors)
        self.reset(layer, group["reset"], group["reset_ratio"])
        return True

    def restarts(self, count: int, group: dict[str, Any]) -> int:
        return count // int(group["merge_every"])
