"""The few operations that parts need of a gradient, so that no part ever sees a layout or a collective.

Everything a low-rank method asks of `G` is linear in it, or a sum of its squares. `Algebra` is the plain version for a
matrix that this process holds whole. A version for shards answers the same calls by adding thin partial results over
ranks, and then every part works on it unchanged.
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

Drawn = Callable[[slice], Tensor]  # some rows of a random matrix


class Algebra:
    """Whole matrices: every operation is a matmul or a reduction. All work on the last two dimensions."""

    def refreshing(self) -> AbstractContextManager[None]:
        """Around the work of a refresh, for those who count."""
        return nullcontext()

    def each(self, work: Callable[..., None], items: Iterable[Any]) -> None:
        """Does the same for several matrices, none of which looks at another."""
        for item in items:
            work(item)

    def project(self, basis: Tensor, g: Tensor) -> Tensor:
        """`P^T G`: (m, k), (m, n) -> (k, n). G in fewer bits than P is brought to its dtype block by block."""
        if g.dtype == basis.dtype:
            return ops.product(basis.mT, g)
        cut = list(blocks(g.shape, g.device.type))
        if len(cut) < 2:
            return ops.product(basis.mT, g.to(basis.dtype))
        r = basis.new_empty(*g.shape[:-2], basis.shape[-1], g.shape[-1])
        for columns in cut:
            columns.of(r).copy_(ops.product(basis.mT, columns.of(g).to(basis.dtype)))
        return r

    def sketch(self, g: Tensor, thin: Tensor) -> Tensor:
        """`G Q`: (m, n), (n, k) -> (m, k)."""
        return ops.product(g, thin)

    def random_sketch(self, g: Tensor, width: int, drawn: Drawn) -> Tensor:
        """`G Omega`: (m, n) -> (m, k), with only some rows of Omega (n, k) drawn at a time."""
        cut = blocks((*g.shape[:-2], width, g.shape[-1]), g.device.type)
        first, *rest = list(cut) or [Columns(0, 0, 0)]
        y = ops.product(first.of(g), drawn(slice(first.first, first.stop)))
        for columns in rest:
            ops.add_product_(y, columns.of(g), drawn(slice(columns.first, columns.stop)), 1.0, 1.0)
        return y

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """`X Y` over the long side: (r, n), (n, k) -> (r, k)."""
        return ops.product(x, y)

    def shape(self, g: Tensor) -> tuple[int, int]:
        """(m, n) of the whole matrix. Sides of a matrix that is cut are `Side`, for `draw` and `Spec`."""
        return g.shape[-2], g.shape[-1]

    def own(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """What of a tensor with such sides is here: its shape, and the number of its first element."""
        return shape, 0

    def projected(self) -> Algebra:
        """The algebra of matrices whose projected side is gone: of R, and of all that has its shape."""
        return self

    def columns(self, g: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Algebra, Tensor]:
        """The columns of G in some spans (first, last + 1), ascending, side by side, and the algebra of that."""
        return self, beside([g[..., first:last] for first, last in spans])

    def every(self, x: Tensor) -> Tensor:
        """One number per row of G, (..., m): of all rows."""
        return x

    def places(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where the rows with some numbers are in what is here of G, and which of them are; None: all."""
        return index.long(), None

    def completed(self, r: Tensor, rows: Tensor) -> Tensor:
        """`R` (r, n) of which each row is here, at `rows` of G, or zero and somewhere else."""
        return r

    def orthonormal(self, y: Tensor, side: int) -> Tensor:
        """An orthonormal basis of the columns of y, whose rows are those (-2) or the columns (-1) of G."""
        return ops.orthonormalize(y)

    def whiten_(self, y: Tensor, side: int) -> Tensor:
        """The same, nearly and in place, for what is only iterated on."""
        return ops.whiten_(y)

    def principal(self, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The leading left singular vectors of a thin matrix with the rows of G, (m, k) -> (m, rank), and whether there
        are any."""
        return ops.principal(y, rank)

    def signed(self, basis: Tensor) -> Tensor:
        """(m, r), with the largest entry of each column made positive."""
        return ops.fix_signs(basis)

    def leading(self, g: Tensor, rank: int) -> Tensor:
        """The leading left singular vectors, (m, n) -> (m, rank), signs fixed."""
        return ops.leading_left_vectors(g, rank)

    def right(self, r: Tensor, rank: int) -> Tensor:
        """The leading right singular vectors of R, (r, n) -> (n, rank), signs fixed."""
        return ops.leading_left_vectors(r.mT, rank)

    def largest(self, g: Tensor) -> Tensor:
        """`max |G|`, NaN if there is one: (m, n) -> ()."""
        return ops.largest(g)

    def told(self, x: Tensor) -> list[Any]:
        """The numbers of a small tensor, for decisions of the host."""
        numbers: list[Any] = x.tolist()
        return numbers

    def size(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        """The root mean square of each matrix (of the vector, if x is one), dimensions kept; x may be in 16 bits.

        `factors`: see `norm`.
        """
        matrix = (-2, -1) if x.dim() > 1 else (-1,)
        count = math.prod([x.shape[dim] for dim in matrix])
        return self.norm(x, matrix, factors) / math.sqrt(count)

    def energy(self, x: Tensor, dim: int, power: int = 2) -> Tensor:
        """Sums of `|x|^power` over whole rows (-1) or columns (-2), the dimension dropped."""
        return x.abs().sum(dim) if power == 1 else ops.squares(x, dim)

    def once(self, g: Tensor, dim: int) -> Tensor:
        """Without rows (-2) or columns (-1) that others have, too, and count."""
        return g

    def total(self, sums: Tensor, dim: int) -> Tensor:
        """Sums over rows (-1) or columns (-2) of what of a gradient is here, as such sums over whole ones."""
        return sums

    def norm(self, x: Tensor, dim: int | tuple[int, ...], factors: Tensor | None = None) -> Tensor:
        """Norms of whole columns (-2), rows (-1) or matrices, dimensions kept. Of matrices also in 16 bits.

        `factors`: (..., 1, n) or (..., 1, 1), what x is to be multiplied by first, without a tensor of its size.
        """
        if factors is not None and factors.shape[-1] != 1:  # also none, of a shard without columns
            x, factors = ops.norm(x, -2) * factors, None  # a row of norms has the norm of all rows
        norms = [ops.norm(widened(part), dim) for part in _parts(x)]
        norm: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return norm if factors is None else norm * factors

    def mean(self, x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        """The mean over whole rows, columns or both of a matrix in coordinate space, dimensions kept."""
        return x.mean(dim=dim, keepdim=True)

    def mean_squares(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of whole rows and of whole columns of a matrix in coordinate space, dimensions kept."""
        return ops.mean_squares(x)


def subspace_iteration(
    algebra: Algebra, g: Tensor, y: Tensor, rank: int, rounds: int, otherwise: Tensor | None = None
) -> Tensor:
    """Approximate leading left singular vectors `(m, rank)` of `g (m, n)`, ordered, signs fixed.

    Args:
        y: `(m, k)`, k >= rank columns that span a first guess, of lengths around 1. Not written to.
        rounds: each is one product with `g^T` and one with `g`, whitened in between.
        otherwise: the result where g is zero or its products are not finite; random vectors, if that is None.

    The last product `Y = G Z` with orthonormal Z already holds the singular vectors of `G Z Z^T` (Rayleigh-Ritz), so
    ordering and truncating costs the eigenvectors of one k x k matrix and no further pass over g.

    Reference: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011, algorithm 4.4.
    """
    for i in range(rounds):
        y = algebra.project(algebra.whiten_(y, -2) if i else y, g).mT  # one name: what went before is not kept
        y = algebra.sketch(g, algebra.whiten_(y, -1))
    y, found = algebra.principal(y, rank)
    y = algebra.signed(y)
    return y if otherwise is None else torch.where(found, y, otherwise)


def _parts(x: Tensor) -> list[Tensor]:
    """x, in blocks of columns where it has to be widened."""
    whole = x.dtype.itemsize >= torch.float32.itemsize or not x.numel()
    return [x] if whole else [columns.of(x) for columns in blocks(x.shape, x.device.type)]


def beside(parts: Sequence[Tensor]) -> Tensor:
    """Matrices side by side; one alone stays where it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


WHOLE = Algebra()
