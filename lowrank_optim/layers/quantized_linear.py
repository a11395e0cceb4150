"""Provide a linear layer with a quantized weight, of which a thin factor trains in a quantized subspace (LoQT)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import hyperparameters
from ..distributed.dtensors import laid_out, local, part, whole
from ..ops.degenerate import TIE
from ..recipe.algebra import WHOLE, Algebra
from ..recipe.weights import is_packed, unpacked, working_dtype
from . import checks as layer_checks
from .linear import BASES, ReparameterizedLinear


class QuantizedLinear(ReparameterizedLinear):
    r"""A layer `W = Q + s B P` with a quantized base Q, a quantized orthonormal P fitted to gradients, and trained B.

    P belongs to the shorter side of W, as in GaLore: `P (r, n)` and `B (m, r)` if n <= m. Otherwise it is on the left,
    `W = Q + s P B` with `P (m, r)` and `B (r, n)`. B and P are zero at first, so the function is that of the quantized
    weight.

    Args:
        plain, rank, name, seed: see `ReparameterizedLinear`.
        scale: s itself, not divided by the rank.
        base: how Q and P are stored: "nf4" (0.56 bytes per element), "int8" (1.03) or "dense".
    """

    factors = ("B",)

    def __init__(
        self,
        plain: nn.Linear,
        rank: int | float,
        *,
        scale: float = 0.5,
        base: str = "nf4",
        name: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__(plain, rank, name=name, seed=seed)
        hyperparameters.check({"scale": scale, "base": base}, {"base": ("nf4", "int8", "dense")})
        w, (m, n, r) = plain.weight.detach(), (self.out_features, self.in_features, self.rank)
        self.scale, self.right_singular, self.kind, self.quantize = scale, n <= m, base, BASES[base]
        self.base = nn.Parameter(self.quantize(w), requires_grad=False)
        thin, trained = ((r, n), (m, r)) if self.right_singular else ((m, r), (r, n))
        self.P = nn.Parameter(self.quantize(w.new_zeros(thin)), requires_grad=False)
        self.B = nn.Parameter(w.new_zeros(trained))

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., m) for x (..., n)."""
        first, second = (self.P, self.B) if self.right_singular else (self.B, self.P)
        return linear(x, self.base, self.bias) + linear(linear(x, first) * self.scale, second)

    def dense(self) -> Tensor:
        return self._composed(self.base, self.B, self.P)

    @torch.no_grad()
    def refit_(self, fit: Callable[[Tensor], Tensor], g: Tensor, iterations: int, algebra: Algebra = WHOLE) -> Tensor:
        """Add the product to the base and fit a new subspace; the function stays the same up to rounding.

        Args:
            fit: returns the leading left singular vectors `(k, r)` of a matrix with k rows.
            g: gradient of W (m, n), finite and not zero; for a sharded layer, its local rows.
            iterations: number of rounds of error compensation, see `compensate`.
            algebra: of the matrices that `fit` is given.

        Returns:
            The gradient of the new B: the coordinates of g.
        """
        # A sharded W has local rows. On the left of the product, the factor (m, r) has the same rows and stays local;
        # on the right, the factor (r, n) is needed whole.
        old = (self.B, whole(self.P)) if self.right_singular else (whole(self.B), self.P)
        w, g = self._composed(local(self.base), *map(local, old)), g.to(working_dtype(self.B))
        # P (r, n) is the same on all ranks, and each stores its part. P (m, r) of a wide W has the local rows of W.
        basis = fit(g.mT).mT if self.right_singular else fit(g)
        local(self.P).copy_(part(basis, self.P) if self.right_singular else basis)
        p = self.scale * self._turned(unpacked(whole(self.P) if self.right_singular else local(self.P), w.dtype))
        target, b = compensate(self._turned(w), p, self._rounded, iterations, algebra)
        local(self.base).copy_(self._turned(target))
        local(self.B).copy_(self._own(b))
        return laid_out(self._own(algebra.total(self._turned(g) @ p.mT, -2)).to(self.B.dtype), self.B)

    def made_with(self) -> dict[str, Any]:
        return {**super().made_with(), "scale": self.scale, "base": self.kind}

    def refuse_shards(self) -> None:
        layer_checks.gradients_of_codes(QuantizedLinear.__name__, self.kind)
        layer_checks.shards_of_rows(QuantizedLinear.__name__, "", False, [self.base, self.P, self.B])

    def restart_workspace(self) -> int:
        """Return the number of elements that a refit holds at once.

        These are W and its gradient in the working dtype, the error of quantizing, the same matrices again in an
        iteration of `compensate`, and the SVD.
        """
        return 8 * self.out_features * self.in_features

    def describe(self) -> str:
        return f"{self.kind} base and basis"

    def _composed(self, base: Tensor, b: Tensor, p: Tensor) -> Tensor:
        """Return W, or its local rows, in the working dtype; differentiable."""
        working = working_dtype(b)
        b, p = b.to(working), unpacked(p, working)
        product = b @ p if self.right_singular else p @ b
        base = cast(Any, base).read(working) if is_packed(base) else base.to(working)
        return cast(Tensor, base + self.scale * product)

    def _own(self, b: Tensor) -> Tensor:
        """Return the local part of B, given the result of a computation on turned matrices.

        B (m, r) has the local rows of W already. B (r, n), from a turned computation, is a sum over ranks, the same on
        all of them, and each takes its part.
        """
        return b if self.right_singular else part(b.mT, self.B)

    def _turned(self, x: Tensor) -> Tensor:
        """Return x transposed if P is on the left, so that turned matrices have P (r, k) on the right: `Q + s B P`."""
        return x if self.right_singular else x.mT

    def _rounded(self, x: Tensor) -> Tensor:
        """Return a turned weight rounded as the base would store it."""
        w = self._turned(x).to(self.B.dtype)
        return self._turned(unpacked(self.quantize(w), x.dtype))


def compensate(
    w: Tensor, p: Tensor, rounded: Callable[[Tensor], Tensor], iterations: int, algebra: Algebra = WHOLE
) -> tuple[Tensor, Tensor]:
    """Return (T, B) with `rounded(T) + B P` close to w: B compensates a part of the error of rounding.

    It alternates `B = (w - rounded(T)) P^+` and `T = w - B P`, beginning with T = w, and keeps the best pair. Among
    pairs whose errors differ by rounding only, the first one is kept. The error of the first pair is that of rounding
    times about sqrt(1 - r / n). With 0 iterations B is zero.

    Args:
        w: (m, n).
        p: P (r, n).
        rounded: returns a matrix like w as the base stores it.
        iterations: the number of rounds.
        algebra: of the transpose of w, if w is sharded.
    """
    inverse = _pseudo_inverse(p, algebra)
    target, best = w, (w, w.new_zeros(len(w), len(p)))
    least, less = algebra.norm(w - rounded(w), (-2, -1)), 1 - TIE * torch.finfo(w.dtype).eps
    for _ in range(iterations):
        rest = w - rounded(target)
        b = algebra.total(rest @ inverse, -2)
        product = b @ p
        error = algebra.norm(rest - product, (-2, -1))
        if bool(error < least * less):
            best, least = (target, b), error
        target = w - product
    return best


def _pseudo_inverse(p: Tensor, algebra: Algebra) -> Tensor:
    """Return `P^T (P P^T)^-1` (n, r) for P (r, n)."""
    wide = p.double()
    gram = algebra.total(wide @ wide.mT, -2)
    # Quantizing may have made rows of P dependent. Cholesky then fails, or a pivot is no larger than rounding errors.
    # The pseudo-inverse by singular values is taken instead.
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots, lengths = factor.diagonal().square(), gram.diagonal()
    if bool(info) or not bool((pivots > lengths * (TIE * torch.finfo(gram.dtype).eps)).all()):
        return cast(Tensor, wide.mT @ torch.linalg.pinv(gram, hermitian=True)).to(p.dtype)
    return torch.cholesky_solve(wide, factor).mT.to(p.dtype)
