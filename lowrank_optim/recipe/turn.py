"""What a refresh of the basis does to coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.schema import kernel


@dataclass(frozen=True)
class Turn:
    """The change of coordinates at a refresh: `x -> left x right^T` with `left = P_new^T P_old`."""

    left: Tensor
    right: Tensor | None = None
    mixes: ClassVar[bool] = True  # an old coordinate enters several new ones

    def __call__(self, x: Tensor) -> Tensor:
        """Coordinates (first moments) in the new basis."""
        y = self.left @ x
        return y if self.right is None else y @ self.right.mT

    def variances(self, x: Tensor) -> Tensor:
        """Variances of independent coordinates in the new basis: the entries of the matrices enter squared."""
        y = self.left.square() @ x
        return y if self.right is None else y @ self.right.square().mT

    def move_(self, x: Tensor) -> None:
        """Coordinates in the new basis, in the place of the old ones."""
        x.copy_(self(x))

    def overlap(self) -> Tensor:
        """Mean squared cosine of the angles between the two subspaces: 1 where they agree, 0 where orthogonal."""
        both = self.left.square().sum() / self.left.shape[-1]
        return both if self.right is None else both * self.right.square().sum() / self.right.shape[-1]


@dataclass(frozen=True)
class Reindex(Turn):
    """The turn between two selections of fixed vectors: coordinates move to another slot, or begin at zero.

    Args:
        left: `(r,)`, the old slot of each new slot, -1 for none; the others ascend.
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
