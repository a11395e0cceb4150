"""Implement the algebra of a matrix that is cut over ranks: thin partial results, completed by sums over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..ops.degenerate import settle_
from ..ops.reference.bases import leading_entries
from ..recipe.algebra import WHOLE, Algebra, Drawn, side_by_side, subspace_iteration
from ..recipe.store import Side
from . import lockstep
from .lockstep import Peers
from .pieces import Piece

_MOST_ROUNDS = 30  # of subspace iteration in `leading`


@dataclass
class Meter:
    """Counters of what one parameter has handed to collectives.

    Attributes:
        steps, refreshes: how many of each were counted.
        between: bytes sent in steps, without those of refreshes.
        refreshing: bytes sent in refreshes.
        messages_between, messages_refreshing: the numbers of sums behind these bytes.
    """

    steps: int = 0
    refreshes: int = 0
    between: float = 0.0
    refreshing: float = 0.0
    messages_between: int = 0
    messages_refreshing: int = 0

    @property
    def sent(self) -> tuple[float | None, float | None]:
        """Average bytes per step and per refresh; None before the first one."""
        per_step = self.between / self.steps if self.steps else None
        return per_step, self.refreshing / self.refreshes if self.refreshes else None


class Traffic:
    """The sums that the matrices of one chunk send in one step, counted on their meters."""

    def __init__(self, meters: Sequence[Meter]) -> None:
        """Begin a step of the parameters with these meters."""
        self.meters = meters
        self._in_refresh, self._refreshed = False, False
        for meter in meters:
            meter.steps += 1

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        """Count the sums inside the context as those of a refresh. A step has one refresh per meter at most."""
        # A chunk may come here several times in a step, which is one refresh all the same.
        for meter in self.meters:
            meter.refreshes += not self._refreshed
        self._in_refresh = self._refreshed = True
        yield
        self._in_refresh = False

    def total(self, x: Tensor, peers: Peers, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Return the sum of x over the peers, and count it."""
        self.note(x)
        return lockstep.total(x, peers, op)

    def note(self, x: Tensor) -> None:
        """Count a sum. The bytes of a stack (b, ...) are shared evenly by the parameters of the chunk."""
        # Each parameter is charged its share of the bytes, but a whole message: alone, it would send one as well.
        for meter in self.meters:
            if self._in_refresh:
                meter.refreshing += x.nbytes / len(self.meters)
                meter.messages_refreshing += 1
            else:
                meter.between += x.nbytes / len(self.meters)
                meter.messages_between += 1


class Shards(Algebra):
    """The algebra of a matrix of which every rank has a block of rows, a block of columns, or a block of both.

    Let m' and n' be the local lengths of the turned matrix G (m, n). Where rows (-2) are cut, the basis (m', r) is cut
    in the same way; where columns (-1) are cut, the coordinates R (r, n') are. A tensor with no cut side is the same on
    all ranks, and every rank computes on it for itself, from the same bits.

    Each method computes on the local part and then sums over the side that the product runs along. For example
    `P^T G` runs along rows, so `project` adds up (r, n') over the ranks that have the other rows.

    Args:
        pieces: the local piece of each side that is cut, by side.
        both: the ranks that have parts of the matrix if both sides are cut; else None.
        traffic: counts the sums.
    """

    def __init__(self, pieces: Mapping[int, Piece], both: Peers | None, traffic: Traffic) -> None:
        self.pieces, self.both, self.traffic = pieces, both, traffic

    # -- products ------------------------------------------------------------------------------------------------------

    def project(self, basis: Tensor, g: Tensor) -> Tensor:
        # (m', r) and (m', n') -> (r, n'): the product runs along rows.
        return self._completed(super().project(basis, g), -2)

    def sketch(self, g: Tensor, thin: Tensor) -> Tensor:
        # (m', n') and (n', k) -> (m', k): this product and the next two run along columns.
        return self._completed(super().sketch(g, thin), -1)

    def random_sketch(self, g: Tensor, width: int, drawn: Drawn) -> Tensor:
        return self._completed(super().random_sketch(g, width, drawn), -1)

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return self._completed(super().inner(x, y), -1)

    # -- sums ----------------------------------------------------------------------------------------------------------

    def largest(self, g: Tensor) -> Tensor:
        # A rank without elements takes part, with the neutral element of a maximum of absolute values.
        largest = super().largest(g) if g.numel() else g.new_zeros(g.shape[:-2])
        return self._completed(largest, -2, -1, op=dist.ReduceOp.MAX)

    def size(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        # The root mean square divides by the number of elements of the whole matrix, not of the local part.
        both = (-2, -1) if x.dim() > 1 else (-1,)
        return self.norm(x, both, factors) / math.sqrt(self._count(x, both))

    def energy(self, x: Tensor, dim: int, power: int = 2) -> Tensor:
        return self.total(super().energy(x, dim, power), dim)

    def total(self, sums: Tensor, dim: int) -> Tensor:
        return self._completed(sums, dim)

    def norm(self, x: Tensor, dim: int | tuple[int, ...], factors: Tensor | None = None) -> Tensor:
        norm = super().norm(x, dim, factors)
        if not self.pieces.keys() & dims(dim):
            return norm
        # Norms are added up as squares, in float64, because the square of a float32 norm may overflow float32.
        return self._completed(norm.double().square(), *dims(dim)).sqrt().to(norm.dtype)

    def mean(self, x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        if not self.pieces.keys() & dims(dim):
            return super().mean(x, dim)
        # Means of pieces of unequal length cannot be averaged; sums can be added up.
        return self._completed(x.sum(dim=dim, keepdim=True), *dims(dim)) / self._count(x, dims(dim))

    def mean_squares(self, x: Tensor) -> tuple[Tensor, Tensor]:
        squares = x.square()
        return self.mean(squares, -1), self.mean(squares, -2)

    # -- shapes --------------------------------------------------------------------------------------------------------

    def shape(self, g: Tensor) -> tuple[int, int]:
        # A cut side carries its piece, so that `own` can tell which part of a random matrix is local.
        m, n = (
            g.shape[side] if piece is None else Side(piece.whole, side, piece)
            for side, piece in ((side, self.pieces.get(side)) for side in (-2, -1))
        )
        return m, n

    def own(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        # Random matrices have the cut side first, as (m, k) or (n, k): local rows are contiguous, from this index on.
        first, *rest = shape
        if not isinstance(first, Side):
            return shape, 0
        piece = first.piece
        return (piece.length, *map(int, rest)), piece.start * math.prod(rest)

    def projected(self) -> Algebra:
        # R (r, n') has no side of length m, so of the cuts only that of columns remains.
        columns = {d: piece for d, piece in self.pieces.items() if d == -1}
        return type(self)(columns, None, self.traffic) if columns else WHOLE

    def columns(self, g: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Algebra, Tensor]:
        if -1 not in self.pieces:
            return self, super().columns(g, spans)[1]
        # The chosen columns, put together, are a matrix of their own, with a piece of its own on this rank:
        # `before` chosen columns are on ranks before it.
        piece = self.pieces[-1]
        here = [piece.within(*span) for span in spans]
        whole = sum(last - first for first, last in spans)
        before = sum(min(last, piece.start) - min(first, piece.start) for first, last in spans)
        length = sum(last - first for first, last in here)
        chosen = {-1: replace(piece, whole=whole, start=before, length=length, most=whole)}
        return type(self)({**self.pieces, **chosen}, self.both, self.traffic), side_by_side(
            [g[..., a:b] for a, b in here]
        )

    # -- lines ---------------------------------------------------------------------------------------------------------

    def every(self, x: Tensor) -> Tensor:
        return self._joined(x.unsqueeze(-1), -2).squeeze(-1) if -2 in self.pieces else x

    def places(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        if -2 not in self.pieces:
            return super().places(index)
        piece = self.pieces[-2]
        # Rows of other ranks get a valid local index all the same; the mask `mine` marks them as absent.
        here = index.long() - piece.start
        mine = (here >= 0) & (here < piece.length)
        return here.clamp(0, max(0, piece.length - 1)), mine

    def completed(self, r: Tensor, rows: Tensor) -> Tensor:
        # Each row of R is a row of G on one rank and zero on the others.
        return self._completed(r, -2)

    # -- bases ---------------------------------------------------------------------------------------------------------
    # The operators of `ops` on a thin matrix (m', k) need nothing of other ranks but sums over rows, such as the Gram
    # matrix (k, k). They take a function that completes such a sum (see `_lines`).

    def orthonormal(self, y: Tensor, side: int) -> Tensor:
        return ops.orthonormalize(y, *self._lines(side))

    def whiten_(self, y: Tensor, side: int) -> Tensor:
        return ops.whiten_(y, *self._lines(side)[:1])

    def principal(self, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        return ops.principal(y, rank, *self._lines(-2))

    def signed(self, basis: Tensor, side: int = -2) -> Tensor:
        if side not in self.pieces:
            return ops.fix_signs(basis)
        # Each rank finds, for each column, the first entry of (nearly) largest magnitude in its rows: (..., r). A table
        # (..., count, r) with one row per piece collects these entries. Its rows are in the order of the pieces. Among
        # (nearly) equal entries, the first one of the whole matrix decides, as without a cut.
        piece = self.pieces[side]
        peaks = basis.new_zeros(*basis.shape[:-2], piece.count, basis.shape[-1])
        if piece.length:
            peaks[..., piece.place, :] = leading_entries(basis).squeeze(-2)
        pivot = leading_entries(self._completed(peaks, side))
        return basis * torch.where(pivot < 0, -1.0, 1.0).to(basis.dtype)

    def leading(self, g: Tensor, rank: int) -> Tensor:
        """Return the leading left singular vectors, (m', n') -> (m', rank), by subspace iteration until it converges.

        A factorization would need all of G, or its Gram matrix, on one rank. The iteration sends many thin messages
        instead; where singular values hardly differ, they add up to more bytes than G has.
        """
        m, n = self.shape(g)
        width = int(min(rank + 8, m, n))  # a few columns more than the rank make the iteration converge faster
        shape, start = self.own((n, width))

        def drawn(rows: slice) -> Tensor:
            # Some rows of a Gaussian matrix (n, width), a function of their global indices.
            return ops.normal(shape, 0, ops.stream_of("leading", 0), g.device, start, rows).to(g.dtype)

        basis = subspace_iteration(self, g, self.random_sketch(g, width, drawn), width, 2)
        # Below this angle, two rounds differ by rounding errors only. All ranks compute the same angle, and stop
        # together.
        enough = 8 * math.sqrt(rank) * torch.finfo(g.dtype).eps
        # The additional columns help to converge; only the first `rank` ones have to.
        for _ in range(_MOST_ROUNDS):
            old, basis = basis, subspace_iteration(self, g, basis, width, 2)
            if float(self._angle(old[:, :rank], basis[:, :rank])) <= enough:
                break
        return basis[:, :rank].contiguous()

    def right(self, r: Tensor, rank: int) -> Tensor:
        """Return the leading right singular vectors of R (r, n'), (n', rank), by a QR factorization of R^T."""
        if -1 not in self.pieces:
            return super().right(r, rank)
        # R^T = Q T with Q (n', r) and T (r, r). The singular vectors of the small T, the same on all ranks, give those
        # of R^T when multiplied by Q.
        q = self.orthonormal(r.mT.contiguous(), -1)
        small, values, _ = torch.linalg.svd(self.inner(r, q).mT.double())
        # Vectors of equal values follow fixed rules, in the precision of R, so that rounding does not pick them.
        settle_(small, values, eps=torch.finfo(q.dtype).eps, keep=rank)
        return self.signed(q @ small[..., :rank].to(q.dtype), -1)

    def _angle(self, old: Tensor, new: Tensor) -> Tensor:
        """Return the Frobenius norm of the part of `new` (m', k) outside the span of `old`: a sine of their angle."""
        lost, _ = self._lines(-2)
        return lost(lambda rest: rest.double().square().sum(), new - old @ self.project(old, new)).sqrt()

    # -- collectives ---------------------------------------------------------------------------------------------------

    def refreshing(self) -> Any:
        return self.traffic.refreshing()

    def each(self, work: Callable[..., None], items: Iterable[Any]) -> None:
        # The sums of all items are sent together.
        lockstep.together([partial(work, item) for item in items])

    def _completed(self, x: Tensor, *sides: int, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Return the sum of x over the ranks that have the other pieces of some sides; x itself if none is cut."""
        # A rank that differs in an uncut side has the same x, and must not be counted again.
        cut = [side for side in sides if side in self.pieces]
        if not cut:
            return x
        peers = self.pieces[cut[0]].peers if len(cut) == 1 else self.both
        assert peers is not None
        return self.traffic.total(x, peers, op)

    def _lines(self, side: int) -> tuple[Callable[..., Tensor], int]:
        """Return how the operators of `ops` reach over a cut: a sum over rows (-2) or columns (-1), and an index.

        Returns:
            A function that is given a local reduction and its thin arguments, and returns its value over all ranks;
            and the global index of the first local row or column.
        """

        def total(summed: Callable[..., Tensor], *thin: Tensor) -> Tensor:
            return self._completed(summed(*thin), side)

        return total, self.pieces[side].start if side in self.pieces else 0

    def _joined(self, y: Tensor, side: int) -> Tensor:
        """Return all rows of a thin matrix, (..., m', k) -> (..., m, k), on every rank."""
        # Each rank sends its rows within zeros. A sum of those is a gather that can share a collective with other sums.
        piece = self.pieces[side]
        whole = y.new_zeros(*y.shape[:-2], piece.whole, y.shape[-1])
        whole[..., piece.start : piece.start + piece.length, :] = y
        return self._completed(whole, side)

    def _count(self, x: Tensor, dims: tuple[int, ...]) -> int:
        """Return the number of elements of the whole matrix along some dimensions of its local part x."""
        return math.prod([self.pieces[dim].whole if dim in self.pieces else x.shape[dim] for dim in dims])


def dims(dim: int | tuple[int, ...]) -> tuple[int, ...]:
    """Return one dimension or several as a tuple."""
    return (dim,) if isinstance(dim, int) else dim
