"""Fill the slot "which subspace?" with the best vectors of a fixed orthonormal dictionary."""

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

_WIDE = 512  # from this width on an FFT beats a product with the dictionary: on CPU by 3 at 1024, by 20 at 2048


@dataclass(frozen=True)
class Dictionary(OneSided):
    """The r vectors of a dictionary D (m, m) with the largest coefficients `D^T G` (DCT-AdamW).

    The state keeps their indices `(r,)` only.

    Args:
        kind: "dct2" or "dct3" (cosines; the second is the transpose of the first), "hadamard", or "random".
        power: 2 ranks vectors by the sum of squares of their coefficients, which minimizes the projection error;
            1 ranks them by the sum of absolute values, as published.
        fast: whether coefficients of the cosines come from an FFT. Then no m x m dictionary exists, and on CPU, in
            widths that the kernels transform, no vectors of it either. The numbers agree to rounding. None: from width
            512 on, where the FFT takes less time.
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
        # A shard holds some columns of G: it adds up the scores of its own columns, each counted on one rank only.
        here = scores(self.kind, algebra.once(g, -1), self.power, self._by_fft(g.shape[0]))
        return {"index": strongest(algebra.total(here, -1), rank)}

    def derive(self, algebra: Algebra, g: Tensor, kept: State, rank: int, draw: Draw) -> dict[str, Tensor]:
        """Return the chosen vectors P `(m, r)`, or nothing where a fast transform beats a product with them."""
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
        return 3 * shape[0] * rank + (32 * shape[0] if self._by_fft(shape[0]) else 0)  # indices, a table in 64 bits

    def fit_workspace(self, m: int, n: int, rank: int) -> int:
        return (min(m * n, 4 * PIECE) if self._by_fft(m) else m * n) + 20 * m

    def shared(self, shape: Shape) -> dict[str, int]:
        return {} if self._by_fft(shape[0]) else {f"{self.kind} {shape[0]}": shape[0] ** 2}

    def sharing(self, shape: Shape, like: Tensor) -> dict[str, Tensor]:
        return {key: dictionary(self.kind, shape[0], like.dtype, like.device) for key in self.shared(shape)}

    def _by_fft(self, width: int) -> bool:
        """Whether coefficients in this width come from an FFT."""
        return self.kind in COSINES and (width >= _WIDE if self.fast is None else self.fast)
