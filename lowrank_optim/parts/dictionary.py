"""Which subspace? The vectors of a fixed orthonormal dictionary that the gradient agrees with most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..distributed.algebra import Algebra
from ..kept import Exact, Shape, Spec
from ..ops.dictionary import atoms, coefficients, dictionary
from ..recipe import Draw, State, Time
from ..turns import Turn
from .basis import OneSided
from .random import reindex, top


@dataclass(frozen=True)
class Dictionary(OneSided):
    """The r vectors with the largest coefficients `D^T G` (DCT-AdamW). Only their indices are kept.

    Args:
        kind: `"dct2"`, `"dct3"` (cosines; the second is the transpose of the first), `"hadamard"`, `"random"`.
        power: coefficients are ranked by their sum of squares (2), which minimises the projection error, or of absolute
            values (1), as published.
        fast: by FFT, for the cosines; then no n x n dictionary exists. The same numbers to rounding.
    """

    kind: str = "dct2"
    power: int = 2
    fast: bool = False
    indexed: ClassVar[bool] = True
    derives: bool = True

    def uncut(self) -> Mapping[int, str]:
        return {-2: "a coefficient is a sum along that side, and all of them together are as large as the gradient"}

    def spec(self, shape: Shape, rank: int) -> dict[str, Spec]:
        return {"index": Spec((rank,), steady=True, store=Exact(torch.int32))}

    def fit(self, algebra: Algebra, g: Tensor, old: State | None, rank: int, draw: Draw, at: Time) -> dict[str, Tensor]:
        return {"index": top(algebra.energy(coefficients(self.kind, g, self.fast), -1, self.power), rank)}

    def derive(self, algebra: Algebra, g: Tensor, kept: State, rank: int, draw: Draw) -> dict[str, Tensor]:
        return {"basis": atoms(self.kind, g.shape[-2], kept["index"], g.dtype, self.fast)}

    def turn(self, algebra: Algebra, old: State, new: State) -> Turn:
        return reindex(old["index"], new["index"])

    def derived(self, shape: Shape, rank: int) -> int:
        return shape[0] * rank

    def derive_workspace(self, shape: Shape, rank: int) -> int:
        return (9 if self.fast else 3) * shape[0] * rank  # computed in 64 bits, or read through 64-bit indices

    def fit_workspace(self, m: int, n: int, rank: int) -> int:
        return (8 if self.fast else 2) * m * n

    def shared(self, shape: Shape) -> dict[str, int]:
        whole = not self.fast or self.kind not in ("dct2", "dct3")
        return {f"{self.kind} {shape[0]}": shape[0] ** 2} if whole else {}

    def sharing(self, shape: Shape, like: Tensor) -> dict[str, Tensor]:
        return {key: dictionary(self.kind, shape[0], like.dtype, like.device) for key in self.shared(shape)}
