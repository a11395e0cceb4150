"""LTE: training from scratch with parallel low-rank adapters. Huh et al., 2024, https://arxiv.org/abs/2402.16828"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import checks, hyperparameters
from ..distributed import heads as processes
from ..engine.member import Member
from ..engine.stepper import Stepper
from ..engine.table import ParameterTable
from ..engine.watch import Watch
from ..layers import checks as layer_checks
from ..layers.convert import leave_to_ranks
from ..layers.linear import ReparameterizedLinear
from ..layers.multihead import INITS, MERGED, MultiHeadLinear
from ..weight_space import WeightSpaceOptimizer
from .options import WEIGHT_OPTIONS, given


class LTE(WeightSpaceOptimizer):
    __doc__ = (
        r"""AdamW on H low-rank heads next to frozen weights, each on its part of the batch, with regular averaging.

        head h, of H equal parts of the batch:  y = x (W + s (B_h A_h - B'_h A'_h))^T,    s = alpha / r
        every `merge_every` updates:            W <- W + (s / H) sum_h (B_h A_h - B'_h A'_h),   A', B' <- A, B
        evaluation:                             y = x (W + (s / H) sum_h (B_h A_h - B'_h A'_h))^T

    A (H, r, n), B (H, m, r) and their moments continue unchanged over merges, because each head subtracts its own share
    of W. W is therefore always the first weight plus the mean of `s B' A'`. The sum of heads has rank up to H r.

    Memory per weight: `m n` frozen elements, and `5 (m + n) r H` for the factors, their gradients, two moments, and the
    factors of the last merge. With heads="ranks" H is 1 in every process.

    Args:
        rank: of each head, or a fraction of min(m, n). H r should reach the longer side, or at least the shorter.
        heads: H, which must divide every training batch; or "ranks": one head in each process of torch.distributed,
            see below.
        merge_every: updates between merges.
        alpha: s times the rank. None: twice the rank, as the authors' 16 at rank 8. As A begins with rows of norm
            sqrt(n / r), an update of lr moves the entries of a head's product by s lr at any rank. The mean over H
            heads that do not agree is smaller by up to sqrt(H): at s = 2 four heads move W as AdamW would at this lr.
            The paper combines alpha=4096 at rank 64, s = 64, with 32 heads and 0.05 to 0.1 of the dense lr.
        base: how the frozen weight is kept: "dense" in its dtype, "int8" or "nf4" in blocks. Merges into a quantized
            base round stochastically, which is right on average but noisy: choose a longer `merge_every`.
        init: A begins semi-orthogonal, B zero. "code" multiplies A by sqrt(n / r), "paper" by sqrt(m / n).
        reset: what a merge does to the moments of the factors: "keep", as published, or "drop".

    Example::

        opt = lowrank_optim.LTE(model, lr=1e-3, rank=64, heads=4)  # batches of a multiple of 4

    One head per process, `heads="ranks"`: every process trains its head on its whole batch. Convert before wrapping::

        torch.distributed.init_process_group("nccl")
        opt = lowrank_optim.LTE(model, lr=1e-3, rank=64, heads="ranks")
        ddp = DistributedDataParallel(model)  # for parameters that are not converted; omit it if they are not trained

    Factors are never averaged. A merge sends the factors to all processes, 2 r (m + n) elements from each, or sums the
    dense product, 2 m n, whichever is less. Between merges no process knows what the other heads learned, so
    `model.eval()` uses W as of the last merge, which is equal on all processes. `merge_now()`, called on all of them,
    brings it up to date. Each process saves and loads its own model and optimizer. Gradients of factors differ between
    ranks, so nonfinite="raise" stops the rank with the bad gradient, and a GradScaler is refused (use bfloat16). Clip
    factors and other parameters separately: one norm over both would differ between processes, and so would then the
    parameters that DDP keeps equal.

    Under DistributedDataParallel and `fully_shard`, several heads in one process split the batch of each rank.

    Differences from the paper and from its authors' code: evaluation includes the updates since the last merge (the
    code: W alone); W is float32 while it is summed, and rounded once; the factors of all heads are one parameter, which
    is skipped as a whole if its gradient is not finite; adapters have no biases. A mean over the batch makes the
    gradients of heads in one process H times smaller than those of heads on ranks. Adam is invariant to that, but for
    `eps`.
    """
        + WEIGHT_OPTIONS
    )
    layer = MultiHeadLinear
    irreplaceable = ""
    unpartitionable = "its merges keep copies of the factors next to the weights, and read all of both"
    layer_options = ("heads", "ranks", "alpha", "base", "init")
    choices = {"base": ("dense", "int8", "nf4"), "init": INITS, "reset": ("keep", "drop")}

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
        heads: int | str = 4,
        merge_every: int = 10,
        alpha: float | None = None,
        base: str = "dense",
        init: str = "code",
        reset: str = "keep",
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        rest_lr: float | None = None,
        state_dtype: str = "float32",
        bf16_update: str = "stochastic",
        nonfinite: str = "skip",
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        options = given(locals())
        options["heads"], options["ranks"] = hyperparameters.heads(heads)
        super().__init__(model, options, strict=strict)
        if self._apart:
            self.irreplaceable = "heads that differ between processes would be averaged"
            own = (*MultiHeadLinear.factors, *MERGED)
            leave_to_ranks(model, [getattr(layer, key) for layer in self.conversion.layers.values() for key in own])

    def check(self, group: dict[str, Any]) -> None:
        """Refuse a captured step with heads on ranks, whose first step and merges run collectives."""
        if group["capturable"] and hasattr(self, "conversion") and self._apart:
            raise ValueError(
                'capturable=True with heads="ranks": a captured step cannot wait for other processes; leave it out'
            )

    def merge_now(self) -> None:
        """Merge all layers before a merge is due, so that evaluation, saving and `lowrank_optim.merge` use all updates.

        With heads="ranks" every process must call it after the same update. Training continues from there, and each
        head sees the updates of the others earlier than without the call.
        """
        for name, layer in self.conversion.layers.items():
            self._merge(layer, self._counted[name])

    def restart(self, name: str, layer: ReparameterizedLinear, count: int, group: dict[str, Any]) -> bool:
        if count % group["merge_every"]:
            return False
        self._merge(layer, count)
        if group["reset"] == "drop":
            self.reset(layer)
        return True

    def restarts(self, count: int, group: dict[str, Any]) -> int:
        return count // int(group["merge_every"])

    def _merge(self, layer: ReparameterizedLinear, count: int) -> None:
        """Add the mean of a layer's heads to its weight."""
        # Merges are many and small. Rounding to nearest would lose changes below the last bit of W, and heads would
        # subtract a share that W never got.
        stochastic = self.param_groups[0]["bf16_update"] != "none"
        with self.trained(layer, *layer.factors):
            cast(MultiHeadLinear, layer).merge_(count, stochastic)

    # -- heads on ranks: counts must stay equal, also where the gradients of one head are skipped ----------------------

    @property
    def _apart(self) -> bool:
        """Whether heads are in different processes."""
        return any(cast(MultiHeadLinear, layer).world > 1 for layer in self.conversion.layers.values())

    @torch._disable_dynamo
    def _step(self) -> None:
        if not self._apart:
            super()._step()
            return
        checks.no_grad_scaler(self)
        with self._all_gradients():
            super()._step()

    @contextmanager
    def _all_gradients(self) -> Iterator[None]:
        """Give layers that this rank's batch did not reach a gradient of zero, as heads in one process would have."""
        params = [getattr(layer, key) for layer in self.conversion.layers.values() for key in layer.factors]
        missing = [p for p in params if p.grad is None and p.requires_grad]
        for p in missing:
            p.grad = torch.zeros_like(p)
        try:
            yield
        finally:
            for p in missing:
                p.grad = None

    def _make_stepper(self, table: ParameterTable, watch: Watch) -> Stepper:
        return _StepperOfHeads(table, watch)

    def agreed(self, dry: bool) -> bool:
        """Whether a step is dry for all heads. Ranks exchange this before the first update only.

        Args:
            dry: whether the step is dry on this rank: all its gradients are zero.
        """
        if not self._apart or any(self._counted.values()):
            return dry
        layer = next(iter(self.conversion.layers.values()))
        layer_checks.own_heads(processes.same_everywhere(cast(MultiHeadLinear, layer).A.sum(dtype=torch.float64)))
        return not processes.anywhere(not dry, layer.leader.device)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler must call the step even after an overflow.

        Otherwise it would skip the step on the rank with the overflow only, before the step can refuse the scaler.
        """
        return self._apart or super()._step_supports_amp_scaling


class _StepperOfHeads(Stepper):
    """A stepper for heads on ranks, which must agree on whether the first step is a dry run."""

    def dry_run(self, members: list[Member]) -> bool:
        return cast(LTE, self.table.method).agreed(super().dry_run(members))
