"""Describe what a refresh of the basis does to coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.schema import kernel


@dataclass(frozen=True)
class Turn:
    """The change of coordinates at a refresh, `x -> left x right^T` for coordinates x `(r, n)`.

    Args:
        left: `P_new^T P_old`, `(r, r)`.
        right: the same for the second basis where both sides are projected and x is `(r, r)`; None: the identity.
    """

    left: Tensor
    right: Tensor | None = None
    mixes: ClassVar[bool] = True  # True: one old coordinate enters several new ones

    def __call__(self, x: Tensor) -> Tensor:
        """Return coordinates (first moments) in the new basis, from those in the old one."""
        y = self.left @ x
        return y if self.right is None else y @ self.right.mT

    def variances(self, x: Tensor) -> Tensor:
        """Return the variances of coordinates in the new basis, from the variances x in the old one.

        Coordinates count as independent, so the entries of the two matrices enter squared.
        """
        y = self.left.square() @ x
        return y if self.right is None else y @ self.right.square().mT

    def move_(self, x: Tensor) -> None:
        """Replace coordinates in the old basis by those in the new one, in place."""
        x.copy_(self(x))

    def overlap(self) -> Tensor:
        """Return the mean squared cosine of the angles between the two subspaces: 1 if equal, 0 if orthogonal."""
        both = self.left.square().sum() / self.left.shape[-1]
        return both if self.right is None else both * self.right.square().sum() / self.right.shape[-1]


@dataclass(frozen=True)
class Reindex(Turn):
    """The turn between two selections of fixed vectors: a coordinate moves to another row, or begins at zero.

    Args:
        left: `(r,)`, the old row of each new row, or -1 for a vector that was not selected before. The old rows ascend.
    """

    mixes: ClassVar[bool] = False

    def __call__(self, x: Tensor) -> Tensor:
        found = (self.left >= 0).view(-1, *[1] * (x.dim() - 1))
        return torch.where(found, x[self.left.clamp(min=0)], torch.zeros_like(x[:1]))

    def variances(self, x: Tensor) -> Tensor:
        return self(x)

    def move_(self, x: Tensor) -> None:
        if x.is_contiguous():
            kernel("move_rows_")(x, self.left)
        else:
            super().move_(x)

    def overlap(self) -> Tensor:
        return (self.left >= 0).double().mean()
