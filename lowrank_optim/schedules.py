"""Schedule learning rates for methods that restart: lr must rise again after each restart."""

from __future__ import annotations

import math
from typing import Any, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def jagged_cosine(
    step: int,
    total_steps: int,
    *,
    warmup: int = 0,
    restart_every: int | None = None,
    restart_warmup: int = 100,
    restart_from: float = 0.0,
    min_ratio: float = 0.1,
) -> float:
    """Return the factor of lr at update `step` (0, 1, ...): one cosine over the run, with a ramp after each restart.

    The arguments are those of `JaggedCosine`.
    """
    if step < warmup:
        return step / warmup
    # `phase` counts updates since the last restart. Before the first restart there is no ramp.
    phase = step % restart_every if restart_every is not None and step >= restart_every else restart_warmup
    if phase >= restart_warmup:
        return _cosine(step, total_steps, warmup, min_ratio)
    # The ramp is linear, and ends on the cosine at the step where it ends.
    target = _cosine(step - phase + restart_warmup, total_steps, warmup, min_ratio)
    return (restart_from + (1 - restart_from) * phase / restart_warmup) * target


def _cosine(step: int, total_steps: int, warmup: int, min_ratio: float) -> float:
    """Return the cosine from 1 at the end of the warm-up to `min_ratio` at the end of the run."""
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class JaggedCosine(LRScheduler):
    """A schedule of lr: linear warm-up, one cosine over the whole run, and a linear ramp after each restart.

    The cosine does not restart: each ramp rises to the value that the cosine has at the end of the ramp. Call `step()`
    once per update.

    Args:
        optimizer: any optimizer.
        total_steps: number of updates of the run.
        warmup: number of updates of the first ramp, which begins at 0.
        restart_every: number of updates between restarts, equal to the optimizer's own period (`merge_every`,
            `reset_every`). It must divide `total_steps`. None means no ramps.
        restart_warmup: number of updates of a ramp after a restart: 50 to 100 for ReLoRA, 10 for LowRankAdamW.
        restart_from: the value at which a ramp begins, as a fraction of the value at which it ends.
        min_ratio: the value at which the cosine ends, as a fraction of lr.
        last_epoch: as for the schedulers of torch.

    Example::

        opt = lowrank_optim.ReLoRA(model, lr=1e-3, rank=128, merge_every=5000)
        schedule = lowrank_optim.JaggedCosine(opt, total_steps=20_000, warmup=500, restart_every=5000)

    Reference: the scheduler of ReLoRA (Lialin et al., ICLR 2024).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        *,
        warmup: int = 0,
        restart_every: int | None = None,
        restart_warmup: int = 100,
        restart_from: float = 0.0,
        min_ratio: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        for name, value, low in (
            ("total_steps", total_steps, 1), ("warmup", warmup, 0), ("restart_warmup", restart_warmup, 1),
        ):  # fmt: skip
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be an int >= {low}, got {value!r}")
        for name, share in (("restart_from", restart_from), ("min_ratio", min_ratio)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be a fraction in [0, 1], got {share!r}")
        if restart_every is not None and (restart_every < 1 or total_steps % restart_every):
            raise ValueError(
                f"restart_every must divide total_steps, so that the run does not end within a ramp: {total_steps} is "
                f"not a multiple of {restart_every!r}"
            )
        if restart_every is not None and restart_warmup >= restart_every:
            raise ValueError(
                f"restart_warmup must be below restart_every, or lr never rises: {restart_warmup} >= {restart_every}"
            )
        self.total_steps = total_steps
        self.shape: dict[str, Any] = {
            "warmup": warmup, "restart_every": restart_every, "restart_warmup": restart_warmup,
            "restart_from": restart_from, "min_ratio": min_ratio,
        }  # fmt: skip
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """Return lr of each group at this step."""
        factor = jagged_cosine(self.last_epoch, self.total_steps, **self.shape)
        return [cast(Any, base) * factor for base in self.base_lrs]
