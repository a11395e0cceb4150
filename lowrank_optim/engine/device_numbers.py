"""What changes from step to step, on the device of the weights: captured graphs read it, and replay nothing stale."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Numbers:
    """Of one chunk. Their memory stays the same from step to step, only its content changes.

    Attributes:
        lr, step: `()`, in float64 where the device has it; the step is counted 1, 2, ...
        time: `()`, int64, the step once more, for random streams.
        t: `()`, or `(b, 1, 1)` where matrices restart at times of their own: the steps that moments have seen.
        counts: `(b,)`, int64, the refreshes of each matrix, for random streams.
    """

    lr: Tensor
    step: Tensor
    time: Tensor
    t: Tensor
    counts: Tensor

    @staticmethod
    def zeros(matrices: int, restarts: bool, device: torch.device, working: torch.dtype) -> Numbers:
        real = torch.float32 if device.type == "mps" else torch.float64
        lr, step = torch.zeros(2, dtype=real, device=device)
        # one number does not decide the dtype of what it meets, several would
        t = torch.zeros((matrices, 1, 1) if restarts else (), dtype=working if restarts else real, device=device)
        time = torch.zeros((), dtype=torch.int64, device=device)
        return Numbers(lr, step, time, t, torch.zeros(matrices, dtype=torch.int64, device=device))

    def tell_(self, lr: float | Tensor, step: int, ages: Tensor, counts: Tensor) -> None:
        """Writes the numbers of the step that comes next, and does not wait for the device to have them."""
        self.lr.copy_(lr, non_blocking=True) if isinstance(lr, Tensor) else self.lr.fill_(lr)
        self.step.fill_(step)
        self.time.fill_(step)
        self.t.copy_(ages.view(self.t.shape) if self.t.dim() else ages.max(), non_blocking=True)
        self.counts.copy_(counts, non_blocking=True)

    def some(self, matrices: slice) -> Numbers:
        """Those of some of the matrices, in the same memory."""
        t = self.t[matrices] if self.t.dim() else self.t
        return replace(self, t=t, counts=self.counts[matrices])
