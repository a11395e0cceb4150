"""Which subspace? The vectors of a fixed orthonormal dictionary that the gradient agrees with most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.blocks import Columns
from ..ops.cosines import PIECE
from ..ops.dictionary import COSINES, add_combination_, atoms, coefficients, dictionary, scores, transforms
from ..recipe.algebra import Algebra
from ..recipe.recipe import Draw, State, Time
from ..recipe.store import Exact, Shape, Spec
from ..recipe.turn import Turn
from .basis import OneSided
from .random import reindex, strongest

_WIDE = 512  # from here on an FFT is faster than a product with the dictionary, on CPU by 3 at 1024 and by 20 at 2048


@dataclass(frozen=True)
class Dictionary(OneSided):
    """The r vectors with the largest coefficients `D^T G` (DCT-AdamW). Only their indices are kept.

    Args:
        kind: `"dct2"`, `"dct3"` (cosines; the second is the transpose of the first), `"hadamard"`, `"random"`.
        power: coefficients are ranked by their sum of squares (2), which minimises the projection error, or of absolute
            values (1), as published.
        fast: by FFT, for the cosines; then no n x n dictionary exists, and on CPU, in widths that kernels transform, no
            vectors of it either. The same numbers to rounding. None: from width 512 on, where that takes less time.
    """

    kind: str = "dct2"
    power: int = 2
    fast: bool | None = None
    indexed: ClassVar[bool] = True
    derives: bool = True

    def uncut(self) -> Mapping[int, str]:
        return {-2: "a coefficient is a sum along that side, and all of them together are as large as the gradient"}

    def spec(self, shape: Shape, rank: int) -> dict[str, Spec]:
        return {"index": Spec((rank,), steady=True, store=Exact(torch.int32))}

    def fit(self, algebra: Algebra, g: Tensor, old: State | None, rank: int, draw: Draw, at: Time) -> dict[str, Tensor]:
        here = scores(self.kind, algebra.once(g, -1), self.power, self._by_fft(g.shape[0]))
        return {"index": strongest(algebra.total(here, -1), rank)}

    def derive(self, algebra: Algebra, g: Tensor, kept: State, rank: int, draw: Draw) -> dict[str, Tensor]:
        """The chosen vectors, where a transform does not take less time than a product with them."""
        m = g.shape[-2]
        if transforms(self.kind, g, self._by_fft(m)):
            return {}
        return {"basis": atoms(self.kind, m, kept["index"], g.dtype, self._by_fft(m))}

    def down(self, algebra: Algebra, g: Tensor, st: State) -> Tensor:
        return super().down(algebra, g, st) if "basis" in st else coefficients(self.kind, g, st["index"])

    def add_up_(
        self, w: Tensor, d: Tensor, st: State, alpha: float, beta: float, columns: Columns | None = None
    ) -> None:
        if "basis" in st:
            super().add_up_(w, d, st, alpha, beta, columns)
        else:
            add_combination_(self.kind, w, d, st["index"], alpha, beta, columns)

    def turn(self, algebra: Algebra, old: State, new: State) -> Turn:
        return reindex(old["index"], new["index"])

    def derived(self, shape: Shape, rank: int) -> int:
        return shape[0] * rank

    def derive_workspace(self, shape: Shape, rank: int) -> int:
        return 3 * shape[0] * rank + (32 * shape[0] if self._by_fft(shape[0]) else 0)  # indices, and a table in 64 bits

    def fit_workspace(self, m: int, n: int, rank: int) -> int:
        return (min(m * n, 4 * PIECE) if self._by_fft(m) else m * n) + 20 * m

    def shared(self, shape: Shape) -> dict[str, int]:
        return {} if self._by_fft(shape[0]) else {f"{self.kind} {shape[0]}": shape[0] ** 2}

    def sharing(self, shape: Shape, like: Tensor) -> dict[str, Tensor]:
        return {key: dictionary(self.kind, shape[0], like.dtype, like.device) for key in self.shared(shape)}

    def _by_fft(self, width: int) -> bool:
        return self.kind in COSINES and (width >= _WIDE if self.fast is None else self.fast)
