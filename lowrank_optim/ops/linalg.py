"""Orthonormal bases of gradients: exact and randomized, for one matrix or a stack of matrices.

Choices that depend on the values of a tensor are a `torch.where`, so that the host does not wait for an accelerator.
Only factorizations make it wait, because torch reads their error flag and `settle_` reads singular values. On CPU,
where reading a value costs nothing, needless work is skipped.
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

Total = Callable[
    ..., Tensor
]  # (sum, *thin): a sum over the rows of thin matrices, completed over the ranks that share the rows

# A column minus its projection on earlier columns is rounding error where its squared length is below this.
_FADE = {torch.float32: 1e-10, torch.float64: 1e-14}
_STEEP = 8.0  # up to this growth of rounding errors, a second pass is not worth its time
_NOISE = 2.0**-20  # the length of the noise added to a column of length 1 where a matrix lacks rank


def _alone(summed: Callable[..., Tensor], *thin: Tensor) -> Tensor:
    """Return the sum over rows that are all on this rank."""
    return summed(*thin)


def _looks(x: Tensor) -> bool:
    """Whether reading values of this tensor costs nothing, so that needless work can be skipped."""
    return x.device.type == "cpu"


def fix_signs(basis: Tensor) -> Tensor:
    """Return basis (..., m, r) with the largest entry of each column made positive.

    The first entry counts among those whose magnitudes differ by no more than rounding errors. Singular vectors have
    free signs, and moments survive a refresh. Without a convention the trajectory would depend on the backend, on
    transposition and on batching.
    """
    fixed = basis.clone(memory_format=torch.contiguous_format)
    kernel("fix_signs_")(fixed)
    return fixed


def orthonormalize(y: Tensor, total: Total = _alone, first: int = 0) -> Tensor:
    """Return an orthonormal basis (m, k) of the columns of y (m, k), m >= k, completed at random where y lacks rank.

    CholeskyQR2: two passes of `Y <- Y L^-T` with `L L^T = Y^T Y`. It consists of products, so it batches and shards:
    only the k x k Gram matrix is reduced over ranks. Householder QR does neither. The Gram matrix is accumulated and
    factored in float64, because in float32 a spectrum of 1/k already fails. Where a column minus its projection on
    earlier columns is rounding error, y is factored again with noise.

    Args:
        total: completes sums over rows that ranks share.
        first: the global number of the first local row.
    """
    q, eps = torch.empty_like(y), TIE * torch.finfo(y.dtype).eps
    fits, _ = _pass(y, total, q, least=max(eps**2, TIE * torch.finfo(torch.float64).eps))
    again, _ = _pass(q, total, q)
    fits = fits & again
    if _looks(y) and bool(fits.all()):
        return q
    return torch.where(fits[..., None, None], q, _completed(y, total, first))


def whiten_(y: Tensor, total: Total = _alone) -> Tensor:
    """Replace the columns of y (m, k) in place by nearly orthonormal columns with the same span.

    This is enough between the products of an iteration. It takes one pass, or a second one where rounding errors would
    grow. Directions that are rounding errors compared with other columns fade out instead of growing to length 1. So a
    y that lacks rank, or is zero, is no special case.
    """
    _, smooth = _pass(y, total, y, _FADE[y.dtype])
    if not (_looks(y) and bool(smooth.all())):
        _pass(y, total, y, _FADE[y.dtype])
    return y


def principal(y: Tensor, rank: int, total: Total = _alone, first: int = 0) -> tuple[Tensor, Tensor]:
    """Return the `rank` leading left singular vectors (m, rank) of a thin y (m, k), and whether it has any: ().

    They come from the eigenvectors of the k x k Gram matrix in float64, which holds all digits of a product in float32.
    Where y lacks rank they are completed at random. A y that is zero or not finite has none.
    """
    if y.dtype == torch.float64:  # a Gram matrix in float64 would halve its digits
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
    # Column i of q is a sum of columns of y that cancel. Its rounding error has grown with the length of the summands.
    lengths = squares.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) @ vectors.square_()
    steep = lengths * gain.square() > _STEEP**2 * largest.unsqueeze(-1)
    if _looks(y) and bool(there.all()) and not bool(steep.any()):
        return q, found
    q = torch.where(there.unsqueeze(-2) & finite, q, noise(q, total, first))
    return orthonormalize(q, total, first), found


def _principal64(y: Tensor, rank: int, total: Total, first: int) -> tuple[Tensor, Tensor]:
    """Return `principal` of y in float64, by a second product and the singular vectors of a small matrix."""
    size = total(lambda y: y.square().sum((-2, -1), keepdim=True), y)
    finite = torch.isfinite(size)
    q = orthonormalize(y, total, first)
    small = torch.where(finite, total(lambda q, y: q.mT @ y, q, y), 0.0)
    vectors, values, _ = torch.linalg.svd(small)
    k = small.shape[-1]
    for u, s in zip(vectors.view(-1, k, k), values.view(-1, k), strict=True):
        settle_(u, s, keep=rank)
    found, there = finite & (size > 0), values[..., None, :rank] > 0
    q = q @ vectors[..., :rank]
    if _looks(y) and bool(there.all()):
        return q, found
    return orthonormalize(torch.where(there, q, noise(q, total, first)), total, first), found


def gram(y: Tensor) -> Tensor:
    """Return `Y^T Y` (k, k) of y (m, k) in float64."""
    if y.dtype != torch.float32:
        wide = y.double()
        return wide.mT @ wide
    across = y.mT.is_contiguous() and not y.is_contiguous()
    squares = y.new_empty(*y.shape[:-2], y.shape[-1], y.shape[-1], dtype=torch.float64)
    kernel("gram_")(squares, y.mT if across else y.contiguous(), across)
    return squares


def noise(like: Tensor, total: Total, first: int) -> Tensor:
    """Return random columns (m, k) of length 1 on average, the same ones for all matrices of a stack.

    Args:
        like: (..., m, k), the local rows.
        total, first: as for `orthonormalize`, so that ranks draw the rows of one global matrix.
    """
    rows, columns = like.shape[-2:]
    drawn = normal((rows, columns), 0, stream_of("completion", 0), like.device, first * columns)
    return (drawn * total(_count, drawn).rsqrt()).to(like.dtype)


def _count(x: Tensor) -> Tensor:
    """Return the number of local rows of x (m, k), as a tensor that can be reduced over ranks."""
    return torch.full((), float(x.shape[-2]), dtype=torch.float64, device=x.device)


def _pass(y: Tensor, total: Total, out: Tensor, shift: float = 0.0, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Write `Y L^-T` with `L L^T = Y^T Y` into `out`, which is y or like y.

    Returns:
        Whether there is such an L, and whether it lets rounding errors grow by less than `_STEEP`: both ().
    """
    mix, largest, fits, smooth = _mixing(total(gram, y), shift, least)
    mix, largest = mix.to(y.dtype), largest.to(y.dtype)
    for rows in blocks(y.mT.shape, y.device.type):
        torch.div(_times(rows.of(y.mT).mT, mix), largest, out=rows.of(out.mT).mT)
    return fits, smooth


def _mixing(squares: Tensor, shift: float, least: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `L^-T` (k, k) times the largest length of a column, that length (1, 1), and the two answers of `_pass`.

    Args:
        squares: the Gram matrix (k, k). Its columns are scaled to length 1.
        shift: is added to the diagonal after scaling.
        least: the limit of rounding errors for the squared length of a column minus its projection on earlier columns.
    """
    size = squares.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse_size = torch.where(size > 0, 1 / size, 0.0)
    unit = (squares * inverse_size.unsqueeze(-1)).mul_(inverse_size.unsqueeze(-2))
    unit.diagonal(dim1=-2, dim2=-1).add_(shift)
    factor, info = torch.linalg.cholesky_ex(unit)
    eye = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    smooth = (torch.linalg.vector_norm(inverse, dim=-1) <= _STEEP).all(-1)
    # Where y is small, the inverse may overflow float32; the inverse times the largest length does not.
    largest = torch.where(size > 0, size, 1.0).amax(-1)[..., None, None]
    fits = (info == 0) & torch.isfinite(size).all(-1) & (factor.diagonal(dim1=-2, dim2=-1).square() > least).all(-1)
    return inverse.mT.mul_(inverse_size.unsqueeze(-1) * largest), largest, fits, smooth


def _times(y: Tensor, mix: Tensor) -> Tensor:
    """Return `Y M` in the memory layout of y."""
    return product(y, mix) if y.stride(-1) == 1 else product(mix.mT, y.mT).mT


def _completed(y: Tensor, total: Total, first: int) -> Tensor:
    """Return `orthonormalize` of a y that may lack rank.

    Noise supplies missing directions. A shift lets Cholesky succeed where the noise is nearly in the span of y.
    """
    y = torch.where(torch.isfinite(y), y, 0.0)
    size = total(lambda y: y.double().square().sum(-2, keepdim=True), y).sqrt()
    q = (y / torch.where(size > 0, size, 1.0)).to(y.dtype) + _NOISE * noise(y, total, first)
    for shift in (1e-13, 1e-13, 0.0, 0.0):
        _pass(q, total, q, shift)
    return q


def leading_left_vectors(g: Tensor, rank: int) -> Tensor:
    """Return the `rank` leading left singular vectors (m, rank) of a finite g (m, n), signs fixed.

    `degenerate.settle_` picks the vectors of equal values and of zero. Where the SVD does not converge, the
    eigenvectors of the Gram matrix in float64 replace it. That costs accuracy in the tail of the spectrum and never the
    run.
    """
    try:
        vectors, values, _ = torch.linalg.svd(g, full_matrices=False)
    except torch.linalg.LinAlgError:
        squares, vectors = (x.flip(-1).to(g.dtype) for x in torch.linalg.eigh(gram(g.mT)))
        values = squares.clamp(min=0).sqrt()
    settle_(vectors, values, keep=rank)
    return fix_signs(vectors[..., :rank])
