"""Sparse spectral training. Zhao et al., https://arxiv.org/abs/2405.15481"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from ..distributed.lockstep import together
from ..layers.linear import ReparameterizedLinear
from ..layers.spectral import SEGMENT, SpectralLinear
from ..weight_space import WeightSpaceOptimizer
from .options import WEIGHT_OPTIONS, given


class SST(WeightSpaceOptimizer):
    __doc__ = (
        r"""AdamW on all singular values of the weights and on a few of their singular vectors at a time.

        W = sum_i sigma_i u_i v_i^T     i = 1 ... k = min(m, n)
        each update:                    sigma <- max(sigma - step, 0);  u_i, v_i <- unit(u_i - step), unit(v_i - step)
                                        for i in S, with gradients G v_i and G^T u_i that have no factor sigma_i
        every `iteration_steps`:        S = r indices drawn by p_i = 1/2 (1/k + sigma_i / sum sigma); moments of the
                                        active vectors reset
        every `iterations` of these:    a round ends: W decomposed anew, all moments of the layer reset

    Every direction trains at some time, so updates have full rank. Ramp lr up after each draw, over some 20 updates:
    `JaggedCosine(optimizer, restart_every=iteration_steps, restart_warmup=20)`. Call `merge` for inference.

    Memory per weight: `k (m + n)` frozen, up to twice the weight itself; `4 r (m + n)`: active vectors, their gradients
    and two moments; `4 k` of the singular values, in float32. The end of a round takes some `2 m n + k (m + n)` more
    for one layer at a time, and the time of one SVD.

    Args:
        rank: r, directions that train at a time, or a fraction of min(m, n). The paper: a twelfth to a sixteenth.
        iteration_steps: updates between draws (the paper's T3).
        iterations: of a round (T2); None: k / r rounded up, so that a round draws each direction once on average.

    Example::

        opt = lowrank_optim.SST(model, lr=1e-3, rank=64)
        schedule = lowrank_optim.JaggedCosine(opt, total_steps=20_000, restart_every=200, restart_warmup=20)

    bfloat16: vectors are kept rounded, so the first decomposition and that of each round change W by 0.24 % of its norm
    (rounding W itself: 0.17 %). Vectors are brought to unit length in float32 and rounded to nearest, which lets
    lengths be off by 0.2 %. Singular values are float32.

    Under `fully_shard` all of this is sharded. An update sends the active vectors, `r (m + n)`; the end of a round
    gathers all vectors of one layer at a time, as its forward pass does, and each rank decomposes W.

    Differences from the paper (its code could not be had): bias correction starts anew with the moments, so the next
    update is not longer than lr; singular values keep their moments until the round ends; active vectors are kept
    beside the stored ones, `r (m + n)` more; weight decay shrinks singular values, for it is nothing to unit vectors.
    """
        + WEIGHT_OPTIONS
    )
    layer = SpectralLinear
    irreplaceable = ""
    unpartitionable = "after each update it writes to some of all singular vectors, which are frozen weights"

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
        rank: int | float = 0.0625,
        iteration_steps: int = 200,
        iterations: int | None = None,
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

    def updated(self, layers: Sequence[ReparameterizedLinear]) -> None:
        """Vectors back to unit length, and to where all of them are kept."""
        works = [partial(self._retract, cast(SpectralLinear, layer)) for layer in layers]
        if self.table.sharded and self.table.common().groups:
            together(works)
        else:
            for work in works:
                work()

    def _retract(self, layer: SpectralLinear) -> None:
        with self.trained(layer, *layer.factors):
            layer.retract_()

    def restart(self, name: str, layer: ReparameterizedLinear, count: int, group: dict[str, Any]) -> bool:
        spectral, (draws, rest) = cast(SpectralLinear, layer), divmod(count, group["iteration_steps"])
        if rest:
            return False
        draws_per_round = group["iterations"] or -(-len(spectral.sigma) // spectral.rank)
        with self.trained(spectral, *spectral.factors):
            anew = draws % draws_per_round == 0 and spectral.orthogonalize_()
            spectral.activate_(draws)
        changed = spectral.factors if anew else SEGMENT
        self.settle(spectral, changed)
        self.reset(spectral, only=changed)
        return True

    def restarts(self, count: int, group: dict[str, Any]) -> int:
        return count // int(group["iteration_steps"])
