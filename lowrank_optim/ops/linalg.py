"""Orthonormal bases of gradients: exact and randomized, for one matrix or a stack of them.

Nothing here waits for an accelerator but factorisations, whose error flag torch reads, and the values they give: what
depends on the values of a tensor is a `torch.where`. On a CPU, where looking costs nothing, needless work is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .blocks import blocks
from .degenerate import TIE, settle_
from .philox import normal, stream_of
from .products import product
from .schema import kernel

Total = Callable[..., Tensor]  # (sum, *thin): of thin matrices, of whose rows this process may have some only

# Squared lengths of what is left of a column without its neighbours: below them it is rounding.
_FADE = {torch.float32: 1e-10, torch.float64: 1e-14}
_STEEP = 8.0  # growth of rounding errors that is not worth a second pass
_NOISE = 2.0**-20  # per column of a matrix that lacks rank


def _alone(summed: Callable[..., Tensor], *thin: Tensor) -> Tensor:
    return summed(*thin)


def _looks(x: Tensor) -> bool:
    """Does it cost nothing to read numbers of this tensor, so that needless work can be left out?"""
    return x.device.type == "cpu"


def fix_signs(basis: Tensor) -> Tensor:
    """Makes the largest entry of each column of `basis (m, r)` positive, the first of those that rounding makes equal.

    Singular vectors have free signs, and moments outlive a refresh: without a convention the trajectory would depend on
    the backend, on transposition and on batching.
    """
    fixed = basis.clone(memory_format=torch.contiguous_format)
    kernel("fix_signs_")(fixed)
    return fixed


def orthonormalize(y: Tensor, total: Total = _alone, first: int = 0) -> Tensor:
    """An orthonormal basis `(m, k)` of the columns of `y (m, k)`, m >= k, completed at random where y lacks rank.

    CholeskyQR2: two passes of `Y <- Y L^-T` with `L L^T = Y^T Y`. It is made of products, so it batches and shards,
    with only the k x k Gram matrix reduced, where Householder QR does neither. The Gram matrix is accumulated and
    factored in float64; in float32 it already fails on a spectrum of 1/k. Where what is left of a column without those
    before it is zero but for rounding errors, y is factored again with noise.

    Args:
        total: completes sums over rows, where this process has some of them only.
        first: the number of the first row that is here.
    """
    q, eps = torch.empty_like(y), TIE * torch.finfo(y.dtype).eps
    fits, _ = _pass(y, total, q, least=max(eps**2, TIE * torch.finfo(torch.float64).eps))
    again, _ = _pass(q, total, q)
    fits = fits & again
    if _looks(y) and bool(fits.all()):
        return q
    return torch.where(fits[..., None, None], q, _completed(y, total, first))


def whiten_(y: Tensor, total: Total = _alone) -> Tensor:
    """Nearly orthonormal columns that span those of `y (m, k)`, in its place: what an iteration needs in between.

    One pass, or a second where rounding errors would grow. Directions that are rounding errors beside their neighbours
    fade out instead of being blown up, so that a y that lacks rank, or is zero, needs no exception.
    """
    _, smooth = _pass(y, total, y, _FADE[y.dtype])
    if not (_looks(y) and bool(smooth.all())):
        _pass(y, total, y, _FADE[y.dtype])
    return y


def principal(y: Tensor, rank: int, total: Total = _alone, first: int = 0) -> tuple[Tensor, Tensor]:
    """The `rank` leading left singular vectors `(m, rank)` of a thin `y (m, k)`, and whether there are any: `()`.

    From the eigenvectors of the k x k Gram matrix in float64, which holds all digits that a product in float32 has.
    Where y lacks rank they are completed at random; a y that is zero or not finite has none.
    """
    if y.dtype == torch.float64:  # whose digits a Gram matrix in float64 would halve
        return _principal64(y, rank, total, first)
    squares = total(gram, y)
    finite = torch.isfinite(squares.diagonal(dim1=-2, dim2=-1)).all(-1)[..., None, None]  # no other entry is larger
    squares = torch.where(finite, squares, 0.0)
    values, vectors = torch.linalg.eigh(squares)
    values, vectors = values[..., -rank:].flip(-1), vectors[..., -rank:].flip(-1)
    largest = values[..., :1].clamp(min=0)
    least = (32 * torch.finfo(y.dtype).eps) ** 2
    there = (values > least * largest) & (values > 0)
    gain = torch.where(there, (largest / values).sqrt(), 0.0).unsqueeze(-2)
    size = torch.where(largest > 0, largest.sqrt(), 1.0).unsqueeze(-1).to(y.dtype)
    q = _times(y, (vectors * gain).to(y.dtype)).div_(size)
    found = finite & (largest > 0).unsqueeze(-1)
    # Column i is a sum of columns of y that cancel: its rounding error has grown by the length of the summands.
    lengths = squares.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) @ vectors.square_()
    steep = lengths * gain.square() > _STEEP**2 * largest.unsqueeze(-1)
    if _looks(y) and bool(there.all()) and not bool(steep.any()):
        return q, found
    q = torch.where(there.unsqueeze(-2) & finite, q, noise(q, total, first))
    return orthonormalize(q, total, first), found


def _principal64(y: Tensor, rank: int, total: Total, first: int) -> tuple[Tensor, Tensor]:
    """`principal` by a second set of products and the singular vectors of a small matrix."""
    size = total(lambda y: y.square().sum((-2, -1), keepdim=True), y)
    finite = torch.isfinite(size)
    q = orthonormalize(y, total, first)
    small = torch.where(finite, total(lambda q, y: q.mT @ y, q, y), 0.0)
    vectors, values, _ = torch.linalg.svd(small)
    k = small.shape[-1]
    for one, s in zip(vectors.view(-1, k, k), values.view(-1, k), strict=True):
        settle_(one, s, keep=rank)
    found, there = finite & (size > 0), values[..., None, :rank] > 0
    q = q @ vectors[..., :rank]
    if _looks(y) and bool(there.all()):
        return q, found
    return orthonormalize(torch.where(there, q, noise(q, total, first)), total, first), found


def gram(y: Tensor) -> Tensor:
    """`Y^T Y` in float64: `(m, k)` -> `(k, k)`."""
    if y.dtype != torch.float32:
        wide = y.double()
        return wide.mT @ wide
    across = y.mT.is_contiguous() and not y.is_contiguous()
    squares = y.new_empty(*y.shape[:-2], y.shape[-1], y.shape[-1], dtype=torch.float64)
    kernel("gram_")(squares, y.mT if across else y.contiguous(), across)
    return squares


def noise(like: Tensor, total: Total, first: int) -> Tensor:
    """Random columns of length 1 on average, of the shape `(m, k)` of `like`; the same for all matrices of a stack."""
    rows, columns = like.shape[-2:]
    drawn = normal((rows, columns), 0, stream_of("completion", 0), like.device, first * columns)
    return (drawn * total(_count, drawn).rsqrt()).to(like.dtype)


def _count(x: Tensor) -> Tensor:
    return torch.full((), float(x.shape[-2]), dtype=torch.float64, device=x.device)


def _pass(y: Tensor, total: Total, out: Tensor, shift: float = 0.0, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """`out = Y L^-T` with `L L^T = Y^T Y`, `out` being y or like it. Returns whether there is such an L, and whether it
    lets rounding errors be, both `()`."""
    mix, largest, fits, smooth = _mixing(total(gram, y), shift, least)
    mix, largest = mix.to(y.dtype), largest.to(y.dtype)
    for rows in blocks(y.mT.shape, y.device.type):
        torch.div(_times(rows.of(y.mT).mT, mix), largest, out=rows.of(out.mT).mT)
    return fits, smooth


def _mixing(squares: Tensor, shift: float, least: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`L^-T` times the largest length of a column, that length `(1, 1)`, and the two answers of `_pass`.

    shift: added to the squares of columns of length 1.
    least: of such a column, the square of what is left without those before it that is no rounding error.
    """
    size = squares.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse_size = torch.where(size > 0, 1 / size, 0.0)
    unit = (squares * inverse_size.unsqueeze(-1)).mul_(inverse_size.unsqueeze(-2))
    unit.diagonal(dim1=-2, dim2=-1).add_(shift)
    factor, info = torch.linalg.cholesky_ex(unit)
    eye = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    smooth = (torch.linalg.vector_norm(inverse, dim=-1) <= _STEEP).all(-1)
    # The inverse may be beyond float32 where y is small; what it is divided by is not.
    largest = torch.where(size > 0, size, 1.0).amax(-1)[..., None, None]
    fits = (info == 0) & torch.isfinite(size).all(-1) & (factor.diagonal(dim1=-2, dim2=-1).square() > least).all(-1)
    return inverse.mT.mul_(inverse_size.unsqueeze(-1) * largest), largest, fits, smooth


def _times(y: Tensor, mix: Tensor) -> Tensor:
    """`Y M`, in the memory layout of y."""
    return product(y, mix) if y.stride(-1) == 1 else product(mix.mT, y.mT).mT


def _completed(y: Tensor, total: Total, first: int) -> Tensor:
    """`orthonormalize` of a y that may lack rank: noise makes up for it, and a shift for noise that is nearly in y."""
    y = torch.where(torch.isfinite(y), y, 0.0)
    size = total(lambda y: y.double().square().sum(-2, keepdim=True), y).sqrt()
    q = (y / torch.where(size > 0, size, 1.0)).to(y.dtype) + _NOISE * noise(y, total, first)
    for shift in (1e-13, 1e-13, 0.0, 0.0):
        _pass(q, total, q, shift)
    return q


def leading_left_vectors(g: Tensor, rank: int) -> Tensor:
    """The `rank` leading left singular vectors `(m, rank)` of a finite `g (m, n)`, signs fixed.

    Vectors of equal values, and of zero, are those that `degenerate.settle_` picks.

    Falls back from SVD to the eigenvectors of the float64 Gram matrix, so that a factorisation that does not converge
    costs accuracy in the tail of the spectrum and never the run.
    """
    try:
        vectors, values, _ = torch.linalg.svd(g, full_matrices=False)
    except torch.linalg.LinAlgError:
        squares, vectors = (x.flip(-1).to(g.dtype) for x in torch.linalg.eigh(gram(g.mT)))
        values = squares.clamp(min=0).sqrt()
    settle_(vectors, values, keep=rank)
    return fix_signs(vectors[..., :rank])
