"""A linear layer with a quantized weight, of which one thin factor trains in a quantized subspace (LoQT)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import checks
from ..chunk import is_packed, unpacked, working_dtype
from .base import kind_of
from .linear import BASES, ReparameterizedLinear


class QuantizedLinear(ReparameterizedLinear):
    r"""`W = Q + s B P` with a quantized base Q, a quantized orthonormal P that is fitted to gradients, and B trained.

    P belongs to the shorter side of W, as in GaLore: `P (r, n)`, `B (m, r)` where n <= m; else `W = Q + s P B` with
    `P (m, r)`, `B (r, n)`. B and P are zero at first, so the function is that of the quantized weight.

    Args:
        plain, rank, name, seed: see `ReparameterizedLinear`.
        scale: s itself, not divided by the rank.
        base: how Q and P are kept: "nf4" (0.56 bytes per element), "int8" (1.03) or "dense".
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
        checks.hyperparameters({"scale": scale, "base": base}, {"base": ("nf4", "int8", "dense")})
        w, (m, n, r) = plain.weight.detach(), (self.out_features, self.in_features, self.rank)
        self.scale, self.right_singular, self.quantize = scale, n <= m, BASES[base]
        self.base = nn.Parameter(self.quantize(w), requires_grad=False)
        thin, trained = ((r, n), (m, r)) if self.right_singular else ((m, r), (r, n))
        self.P = nn.Parameter(self.quantize(w.new_zeros(thin)), requires_grad=False)
        self.B = nn.Parameter(w.new_zeros(trained))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        first, second = (self.P, self.B) if self.right_singular else (self.B, self.P)
        return linear(x, self.base, self.bias) + linear(linear(x, first) * self.scale, second)

    def dense(self) -> Tensor:
        working = working_dtype(self.B)
        b, p = self.B.to(working), unpacked(self.P, working)
        product = b @ p if self.right_singular else p @ b
        base = cast(Any, self.base).read(working) if is_packed(self.base) else self.base.to(working)
        return cast(Tensor, base + self.scale * product)

    @torch.no_grad()
    def refit_(self, fit: Callable[[Tensor], Tensor], g: Tensor, iterations: int) -> Tensor:
        """Moves the product into the base and takes a new subspace; the function stays up to what rounding leaves.

        Args:
            fit: gives the leading left singular vectors `(k, r)` of a matrix with k rows.
            g: gradient of W (m, n), finite and not zero.
            iterations: of error compensation, see `compensate`.

        Returns:
            The gradient of the new B: the coordinates of g.
        """
        w, g = self.dense(), g.to(working_dtype(self.B))
        self.P.copy_(fit(g.mT).mT if self.right_singular else fit(g))
        p = self.scale * self._turned(unpacked(self.P, w.dtype))
        target, b = compensate(self._turned(w), p, self._rounded, iterations)
        self.base.copy_(self._turned(target))
        self.B.copy_(self._turned(b))
        return self._turned(self._turned(g) @ p.mT).to(self.B.dtype)

    def restart_workspace(self) -> int:
        """W and its gradient in the working dtype, what quantizing leaves, one iteration more of both, and the SVD."""
        return 8 * self.out_features * self.in_features

    def describe(self) -> str:
        return f"{kind_of(self.base)} base and basis"

    def _turned(self, x: Tensor) -> Tensor:
        """As if P were always on the right: `W = Q + s B P` with P (r, k)."""
        return x if self.right_singular else x.mT

    def _rounded(self, x: Tensor) -> Tensor:
        """A turned weight as the base would keep it."""
        w = self._turned(x).to(self.B.dtype)
        return self._turned(unpacked(self.quantize(w), x.dtype))


def compensate(w: Tensor, p: Tensor, rounded: Callable[[Tensor], Tensor], iterations: int) -> tuple[Tensor, Tensor]:
    """(T, B) with `rounded(T) + B P` close to w (m, n), for P (r, n): B makes up for what rounding loses, in part.

    Alternates `B = (w - rounded(T)) P^+` and `T = w - B P` from T = w, and keeps the best pair. The error of the first
    pair is that of rounding times about sqrt(1 - r / n). With 0 iterations B is zero.
    """
    inverse = _pseudo_inverse(p)
    target, best = w, (w, w.new_zeros(len(w), len(p)))
    least = torch.linalg.vector_norm(w - rounded(w))
    for _ in range(iterations):
        rest = w - rounded(target)
        b = rest @ inverse
        product = b @ p
        error = torch.linalg.vector_norm(rest - product)
        if error < least:
            best, least = (target, b), error
        target = w - product
    return best


def _pseudo_inverse(p: Tensor) -> Tensor:
    """`P^T (P P^T)^-1` for P (r, n); by its singular values where quantizing has taken its full rank."""
    wide = p.double()
    factor, info = torch.linalg.cholesky_ex(wide @ wide.mT)
    if bool(info):
        return cast(Tensor, torch.linalg.pinv(wide)).to(p.dtype)
    return torch.cholesky_solve(wide, factor).mT.to(p.dtype)
