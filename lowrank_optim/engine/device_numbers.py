"""Numbers that change from step to step, stored on the device of the weights.

A CUDA graph replays the kernels that were captured, with the arguments that they had then. A Python number would be one
of these arguments, so lr, step and clocks would stay at their values during capture. Tensors in fixed memory do not: a
graph reads their present content.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Numbers:
    """The changing numbers of one chunk. Their memory stays the same from step to step; only the content changes.

    Attributes:
        lr, step: `()`, in float64 where the device has it; the step is counted 1, 2, ...
        time: `()`, int64, the step again, for random streams.
        t: the steps that the moments have seen: `()`, or `(b, 1, 1)` where each matrix restarts at its own time.
        counts: `(b,)`, int64, the number of refreshes of each matrix, for random streams.
    """

    lr: Tensor
    step: Tensor
    time: Tensor
    t: Tensor
    counts: Tensor

    @staticmethod
    def zeros(matrices: int, restarts: bool, device: torch.device, working: torch.dtype) -> Numbers:
        """Return zeros for a chunk of `matrices` matrices, whose arithmetic runs in `working`.

        Args:
            restarts: whether the moments of each matrix restart at its refreshes.
        """
        # float64 has the bits of a Python float, so lr has the value that a normal step uses. MPS has none.
        real = torch.float32 if device.type == "mps" else torch.float64
        lr, step = torch.zeros(2, dtype=real, device=device)
        # A tensor of shape () does not promote the dtype of R (b, r, n) in a product, but one of shape (b, 1, 1) does.
        # So clocks per matrix have the working dtype.
        t = torch.zeros((matrices, 1, 1) if restarts else (), dtype=working if restarts else real, device=device)
        time = torch.zeros((), dtype=torch.int64, device=device)
        return Numbers(lr, step, time, t, torch.zeros(matrices, dtype=torch.int64, device=device))

    def tell_(self, lr: float | Tensor, step: int, ages: Tensor, counts: Tensor) -> None:
        """Write the numbers of the coming step, without waiting for the device to have them.

        Args:
            ages: steps that the moments of each matrix have seen, on the CPU.
            counts: refreshes of each matrix, on the CPU.
        """
        # `fill_` passes its number with the launch, so nothing is copied from the host.
        self.lr.copy_(lr, non_blocking=True) if isinstance(lr, Tensor) else self.lr.fill_(lr)
        self.step.fill_(step)
        self.time.fill_(step)
        # Without restarts there is a single age, common to all matrices.
        self.t.copy_(ages.view(self.t.shape) if self.t.dim() else ages.max(), non_blocking=True)
        self.counts.copy_(counts, non_blocking=True)

    def some(self, matrices: slice) -> Numbers:
        """Return the numbers of a range of matrices, as views of the same memory."""
        t = self.t[matrices] if self.t.dim() else self.t
        return replace(self, t=t, counts=self.counts[matrices])
