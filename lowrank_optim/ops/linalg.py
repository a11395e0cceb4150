"""Orthonormal bases of gradients: exact, randomized, and what to do when a factorisation fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..distributed.algebra import Algebra


def fix_signs(basis: Tensor) -> Tensor:
    """Makes the largest entry of each column of `basis (m, r)` positive.

    Singular vectors have free signs, and moments outlive a refresh: without a convention the trajectory would depend on
    the backend, on transposition and on batching.
    """
    pivot = basis.gather(-2, basis.abs().argmax(dim=-2, keepdim=True))
    return basis * torch.where(pivot < 0, -1.0, 1.0).to(basis.dtype)


def orthonormalize(y: Tensor) -> Tensor:
    """An orthonormal basis `(m, k)` of the columns of `y (m, k)`, m >= k, completed where y is rank-deficient.

    CholeskyQR2: two passes of `Y <- Y L^-T` with `L L^T = Y^T Y`. It is made of products, so it batches and shards,
    with only the k x k Gram matrix reduced, where Householder QR does neither; which is faster depends on the machine.
    The Gram matrix is accumulated and factored in float64; in float32 it already fails on a spectrum of 1/k. Where
    Cholesky meets a zero pivot all the same, Householder QR takes over.
    """
    q = cholesky_qr2(y, lambda x: x.mT @ x)
    return householder(y) if q is None or not bool(torch.isfinite(q).all()) else q


def cholesky_qr2(y: Tensor, gram: Callable[[Tensor], Tensor]) -> Tensor | None:
    """`orthonormalize` without its fallback: None at a zero pivot. `gram`: `Y^T Y` of all rows, of which y is some."""
    q = y
    for _ in range(2):
        wide = q.double()
        factor, info = torch.linalg.cholesky_ex(gram(wide))
        if bool(info.any()):
            return None
        eye = torch.eye(y.shape[-1], dtype=torch.float64, device=y.device)
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        if not bool(torch.isfinite(inverse).all()):
            return None
        q = (wide @ inverse.mT).to(y.dtype)
    return q


def householder(y: Tensor) -> Tensor:
    """The same by reflections, which complete a basis where y lacks rank."""
    q: Tensor = torch.linalg.qr(y)[0]
    return q.contiguous()  # LAPACK's result is column-major, which collectives would misread


def leading_left_vectors(g: Tensor, rank: int) -> Tensor:
    """The `rank` leading left singular vectors `(m, rank)` of a finite `g (m, n)`, signs fixed.

    Falls back from SVD to the eigenvectors of the float64 Gram matrix, so that a factorisation that does not converge
    costs accuracy in the tail of the spectrum and never the run.
    """
    try:
        vectors = torch.linalg.svd(g, full_matrices=False)[0]
    except torch.linalg.LinAlgError:
        wide = g.double()
        vectors = torch.linalg.eigh(wide @ wide.mT)[1].flip(-1).to(g.dtype)
    return fix_signs(vectors[..., :rank])


def subspace_iteration(algebra: Algebra, g: Tensor, start: Tensor, rank: int, rounds: int) -> Tensor:
    """Approximate leading left singular vectors `(m, rank)` of `g (m, n)`, ordered, signs fixed.

    Args:
        start: `(m, k)`, k >= rank columns that span a first guess.
        rounds: each is one product with `g^T` and one with `g`, orthonormalised in between.

    The last product `Y = G Z` with orthonormal Z already holds the singular vectors of `G Z Z^T` (Rayleigh-Ritz), so
    ordering and truncating costs one small k x k SVD and no further pass over g.

    Reference: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011, algorithm 4.4.
    """
    y = start
    for _ in range(rounds):
        z = algebra.orthonormal(algebra.project(algebra.orthonormal(y, -2), g).mT, -1)
        y = algebra.sketch(g, z)
    q = algebra.orthonormal(y, -2)
    small = torch.linalg.svd(algebra.project(q, y).double())[0].to(q.dtype)
    return algebra.signed(q @ small[..., :rank])
