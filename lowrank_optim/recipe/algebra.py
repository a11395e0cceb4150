"""Provide the few operations that parts need of a gradient, so that no part ever sees a layout or a collective.

Everything that a low-rank method asks of `G` is linear in G or a sum of its squares. `Algebra` is the plain version,
for a matrix that this process holds whole. The version for shards (`distributed/shards.py`) answers the same calls by
adding thin partial results over ranks, so every part works on a shard unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.blocks import Columns, blocks, widened

Drawn = Callable[[slice], Tensor]  # returns the requested rows of a random matrix


class Algebra:
    """The operations on whole matrices, each a matrix product or a reduction over the last two dimensions.

    Shapes below are those of the whole matrix: G `(m, n)` with its projected side first, a basis P `(m, r)`,
    coordinates R `(r, n)`, and thin matrices with k columns. Leading dimensions are a batch. The numbers -2 and -1 name
    the two sides of G, of length m and n, also where a thin matrix has one of them.
    """

    def refreshing(self) -> AbstractContextManager[None]:
        """Return a context for the work of a refresh, so that shards can count its traffic separately."""
        return nullcontext()

    def each(self, work: Callable[..., None], items: Iterable[Any]) -> None:
        """Do the same work for several independent matrices. Shards combine the messages of all of them."""
        for item in items:
            work(item)

    def project(self, basis: Tensor, g: Tensor) -> Tensor:
        """Return `P^T G`: (m, k), (m, n) -> (k, n)."""
        if g.dtype == basis.dtype:
            return ops.product(basis.mT, g)
        # A G in 16 bits is converted to the dtype of P one block of columns at a time, never as a whole.
        cut = list(blocks(g.shape, g.device.type))
        if len(cut) < 2:
            return ops.product(basis.mT, g.to(basis.dtype))
        r = basis.new_empty(*g.shape[:-2], basis.shape[-1], g.shape[-1])
        for columns in cut:
            columns.of(r).copy_(ops.product(basis.mT, columns.of(g).to(basis.dtype)))
        return r

    def sketch(self, g: Tensor, thin: Tensor) -> Tensor:
        """Return `G Q`: (m, n), (n, k) -> (m, k)."""
        return ops.product(g, thin)

    def random_sketch(self, g: Tensor, width: int, drawn: Drawn) -> Tensor:
        """Return `G Omega`: (m, n) -> (m, k), for a random Omega (n, k) of which only a block of rows exists at a time.

        Args:
            g: `(..., m, n)`.
            width: k.
            drawn: returns the requested rows of Omega.
        """
        cut = blocks((*g.shape[:-2], width, g.shape[-1]), g.device.type)
        first, *rest = list(cut) or [Columns(0, 0, 0)]
        y = ops.product(first.of(g), drawn(slice(first.first, first.stop)))
        for columns in rest:
            ops.add_product_(y, columns.of(g), drawn(slice(columns.first, columns.stop)), 1.0, 1.0)
        return y

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `X Y`, a sum over the side that is not projected: (r, n), (n, k) -> (r, k)."""
        return ops.product(x, y)

    def shape(self, g: Tensor) -> tuple[int, int]:
        """Return (m, n) of the whole matrix. A sharded side is a `Side`, which `draw` and `Spec` understand."""
        return g.shape[-2], g.shape[-1]

    def own(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """Return the shape of the local part of a tensor of `shape`, and the global index of its first element."""
        return shape, 0

    def projected(self) -> Algebra:
        """Return the algebra of R and of every tensor of its shape, in which the projected side is gone."""
        return self

    def columns(self, g: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Algebra, Tensor]:
        """Return a submatrix of G and its algebra.

        Args:
            g: `(..., m, n)`.
            spans: ranges of columns, (first, last + 1), in ascending order. The submatrix has them next to each other.
        """
        return self, side_by_side([g[..., first:last] for first, last in spans])

    def every(self, x: Tensor) -> Tensor:
        """Return one number per row of the whole G, `(..., m)`, from x, the numbers of the local rows."""
        return x

    def places(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Locate rows of the whole G in the local part.

        Args:
            index: global numbers of rows, `(..., r)`.

        Returns:
            (rows, mine): the local number of each row, and whether it is local at all; `mine` is None if all rows are.
        """
        return index.long(), None

    def completed(self, r: Tensor, rows: Tensor) -> Tensor:
        """Complete R `(..., r, n)`, whose rows are rows of G: a row that another process holds is zero here.

        Args:
            r: the local rows, zero where a row is not local.
            rows: local numbers of the rows, from `places`.
        """
        return r

    def orthonormal(self, y: Tensor, side: int) -> Tensor:
        """Return an orthonormal basis of the columns of a thin y.

        Args:
            y: `(..., m, k)`, or `(..., n, k)` where `side` is -1.
            side: the side of G that the rows of y run along.
        """
        return ops.orthonormalize(y)

    def whiten_(self, y: Tensor, side: int) -> Tensor:
        """Make the columns of y nearly orthonormal, in place; see `orthonormal` for the arguments.

        This is cheaper and suffices between two products of a subspace iteration.
        """
        return ops.whiten_(y)

    def principal(self, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return the leading left singular vectors of a thin matrix, (m, k) -> (m, rank), and whether there are any.

        A y that is zero or not finite has none; the second result is a boolean tensor `(..., 1, 1)`.
        """
        return ops.principal(y, rank)

    def signed(self, basis: Tensor) -> Tensor:
        """Return the basis `(m, r)` with the largest entry of each column made positive."""
        return ops.fix_signs(basis)

    def leading(self, g: Tensor, rank: int) -> Tensor:
        """Return the leading left singular vectors of G, (m, n) -> (m, rank), with fixed signs."""
        return ops.leading_left_vectors(g, rank)

    def right(self, r: Tensor, rank: int) -> Tensor:
        """Return the leading right singular vectors of R, (r, n) -> (n, rank), with fixed signs."""
        return ops.leading_left_vectors(r.mT, rank)

    def largest(self, g: Tensor) -> Tensor:
        """Return `max |G|`, or NaN if G contains one: (m, n) -> ()."""
        return ops.largest(g)

    def numbers(self, x: Tensor) -> list[Any]:
        """Return the numbers of a small tensor as Python numbers, for decisions of the host."""
        return x.tolist()

    def size(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        """Return the root mean square of each matrix `(..., 1, 1)`, or of a vector `(1,)`. x may be in 16 bits.

        `factors`: see `norm`.
        """
        matrix = (-2, -1) if x.dim() > 1 else (-1,)
        count = math.prod([x.shape[dim] for dim in matrix])
        return self.norm(x, matrix, factors) / math.sqrt(count)

    def energy(self, x: Tensor, dim: int, power: int = 2) -> Tensor:
        """Return the sums of `|x|^power` over whole rows (`dim` -1) or columns (-2), without that dimension."""
        return x.abs().sum(dim) if power == 1 else ops.squares(x, dim)

    def once(self, g: Tensor, dim: int) -> Tensor:
        """Return the local rows (-2) or columns (-1) of G that this rank counts, so that sums count each of them once.

        Where two ranks hold the same row, only one of them counts it.
        """
        return g

    def total(self, sums: Tensor, dim: int) -> Tensor:
        """Return sums over whole rows (`dim` -1) or columns (-2), from such sums over the local part of them."""
        return sums

    def norm(self, x: Tensor, dim: int | tuple[int, ...], factors: Tensor | None = None) -> Tensor:
        """Return the norms of whole columns (`dim` -2), rows (-1) or matrices, with dimensions kept.

        Args:
            x: `(..., m, n)`; may be in 16 bits where `dim` is both sides.
            dim: the side or sides to sum over.
            factors: `(..., 1, n)` or `(..., 1, 1)`, by which x is multiplied first. No tensor of its size is made.
        """
        if factors is not None and factors.shape[-1] != 1:  # a width of 0 belongs to a shard without columns
            x, factors = ops.norm(x, -2) * factors, None  # the row of column norms has the norm of the matrix
        norms = [ops.norm(widened(part), dim) for part in _parts(x)]
        norm: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return norm if factors is None else norm * factors

    def mean(self, x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        """Return the mean of a matrix like R over whole rows, columns or both, with dimensions kept."""
        return x.mean(dim=dim, keepdim=True)

    def mean_squares(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean squares of whole rows `(..., r, 1)` and whole columns `(..., 1, n)` of a matrix like R."""
        return ops.mean_squares(x)


def subspace_iteration(
    algebra: Algebra, g: Tensor, y: Tensor, rank: int, rounds: int, otherwise: Tensor | None = None
) -> Tensor:
    """Return approximate leading left singular vectors `(m, rank)` of `g (m, n)`, in order and with fixed signs.

    Args:
        algebra: of g.
        g: `(..., m, n)`.
        y: `(m, k)`, k >= rank columns that span a first guess, of lengths around 1. Not written to.
        rank: number of vectors that are returned.
        rounds: number of iterations. Each multiplies by `g^T` and then by `g`, and whitens in between.
        otherwise: the result where g is zero or its products are not finite; None: random vectors.

    The last product `Y = G Z` with orthonormal Z already holds the singular vectors of `G Z Z^T` (Rayleigh-Ritz). To
    order and truncate them therefore takes the eigenvectors of one k x k matrix and no further pass over g.

    Reference: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011, algorithm 4.4.
    """
    for i in range(rounds):
        y = algebra.project(algebra.whiten_(y, -2) if i else y, g).mT  # rebinding one name frees the matrix before
        y = algebra.sketch(g, algebra.whiten_(y, -1))
    y, found = algebra.principal(y, rank)
    y = algebra.signed(y)
    return y if otherwise is None else torch.where(found, y, otherwise)


def _parts(x: Tensor) -> list[Tensor]:
    """Return x whole, or in blocks of columns where it is in 16 bits and must be converted to float32."""
    whole = x.dtype.itemsize >= torch.float32.itemsize or not x.numel()
    return [x] if whole else [columns.of(x) for columns in blocks(x.shape, x.device.type)]


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate matrices along their columns. A single matrix is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


WHOLE = Algebra()
