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
        r"""AdamW on all singular values of the weights, and on a few of their singular vectors at a time.

        W = sum_i sigma_i u_i v_i^T     i = 1 ... k = min(m, n)
        each update:                    sigma <- max(sigma - step, 0);  u_i, v_i <- unit(u_i - step), unit(v_i - step)
                                        for i in S, with gradients G v_i and G^T u_i that have no factor sigma_i
        every `iteration_steps`:        S = r indices drawn by p_i = 1/2 (1/k + sigma_i / sum sigma); moments of the
                                        active vectors reset
        every `iterations` draws:       a round ends: W decomposed again, all moments of the layer reset

    Every direction trains at some time, so updates have full rank. Ramp lr up after each draw, over some 20 updates:
    `JaggedCosine(optimizer, restart_every=iteration_steps, restart_warmup=20)`. Call `merge` for inference.

    Memory per weight: `k (m + n)` frozen elements, up to twice the weight itself; `4 r (m + n)` for the active vectors,
    their gradients and two moments; `4 k` for the singular values, in float32. The end of a round takes about
    `2 m n + k (m + n)` more elements for one layer at a time, and the time of one SVD.

    Args:
        rank: r, the number of directions that train at a time, or a fraction of min(m, n). In the paper a twelfth to a
            sixteenth.
        iteration_steps: updates between draws (the paper's T3).
        iterations: draws in a round (T2); None: k / r rounded up, so that a round draws each direction once on average.

    Example::

        opt = lowrank_optim.SST(model, lr=1e-3, rank=64)
        schedule = lowrank_optim.JaggedCosine(opt, total_steps=20_000, restart_every=200, restart_warmup=20)

    With bfloat16 weights the vectors are rounded too, so the first decomposition and that of each round change W by
    0.24 % of its norm (rounding W itself: 0.17 %). Vectors are normalized in float32 and rounded to nearest, so their
    lengths deviate from 1 by up to 0.2 %. Singular values are float32.

    Under `fully_shard` all of this is sharded. An update sends the active vectors, `r (m + n)`; the end of a round
    gathers all vectors of one layer at a time, as its forward pass does, and each rank decomposes W.

    Differences from the paper (its code was not available): bias correction restarts with the moments, so that the next
    update is not longer than lr; singular values keep their moments until the round ends; active vectors are kept in
    addition to the stored vectors, `r (m + n)` more elements; weight decay shrinks the singular values only, because it
    has no effect on unit vectors.
    """
        + WEIGHT_OPTIONS
    )
    layer = SpectralLinear
    irreplaceable = ""
    unpartitionable = "after each update it writes to the frozen weights that keep all singular vectors"

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
        """Bring the layers back to singular values >= 0 and unit vectors, all in one message where they are sharded."""
        works = [partial(self._retract, cast(SpectralLinear, layer)) for layer in layers]
        if self.table.decides_with_others():
            together(works)
        else:
            for work in works:
                work()

    def _retract(self, layer: SpectralLinear) -> None:
        """Clamp the singular values, normalize the active vectors, and write these to the stored vectors."""
        with self.trained(layer, *layer.factors):
            layer.retract_()

    def restart(self, name: str, layer: ReparameterizedLinear, count: int, group: dict[str, Any]) -> bool:
        spectral, (draws, rest) = cast(SpectralLinear, layer), divmod(count, group["iteration_steps"])
        if rest:
            return False
        draws_per_round = group["iterations"] or -(-len(spectral.sigma) // spectral.rank)
        with self.trained(spectral, *spectral.factors):
            decomposed = draws % draws_per_round == 0 and spectral.orthogonalize_()
            spectral.activate_(draws)
        changed = spectral.factors if decomposed else SEGMENT
        self.settle(spectral, changed)
        self.reset(spectral, only=changed)
        return True

    def restarts(self, count: int, group: dict[str, Any]) -> int:
        return count // int(group["iteration_steps"])
