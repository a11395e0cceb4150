"""The algebra of a matrix of which others have the rest: thin partial results, completed over ranks."""

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
from ..ops.reference import leading_entries
from ..recipe.algebra import WHOLE, Algebra, Drawn, beside, subspace_iteration
from ..recipe.store import Side
from . import lockstep
from .lockstep import Peers
from .pieces import Piece

_MOST_ROUNDS = 30  # of `leading`


@dataclass
class Meter:
    """What one parameter has handed to collectives: bytes, and in how many messages. `between` leaves refreshes out."""

    steps: int = 0
    refreshes: int = 0
    between: float = 0.0
    refreshing: float = 0.0
    messages_between: int = 0
    messages_refreshing: int = 0

    @property
    def sent(self) -> tuple[float | None, float | None]:
        """Per step and per refresh, on average; None where there was none yet."""
        per_step = self.between / self.steps if self.steps else None
        return per_step, self.refreshing / self.refreshes if self.refreshes else None


class Traffic:
    """What the matrices of one chunk send in one step, for their meters."""

    def __init__(self, meters: Sequence[Meter]) -> None:
        self.meters = meters
        self._in_refresh, self._refreshed = False, False
        for meter in meters:
            meter.steps += 1

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        for meter in self.meters:
            meter.refreshes += not self._refreshed
        self._in_refresh = self._refreshed = True
        yield
        self._in_refresh = False

    def total(self, x: Tensor, peers: Peers, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        self.note(x)
        return lockstep.total(x, peers, op)

    def note(self, x: Tensor) -> None:
        for meter in self.meters:
            if self._in_refresh:
                meter.refreshing += x.nbytes / len(self.meters)
                meter.messages_refreshing += 1
            else:
                meter.between += x.nbytes / len(self.meters)
                meter.messages_between += 1


class Shards(Algebra):
    """Every rank has some rows (-2) of the turned matrix, or some columns (-1), or some columns of some rows.

    Where rows are cut, so are the rows of a basis. Where columns are cut, so are those of R. What is not cut is the
    same on all ranks, and what is computed from it is computed everywhere, from the same bits.

    Args:
        pieces: of the sides that are cut.
        both: who has the other parts, where both are.
    """

    def __init__(self, pieces: Mapping[int, Piece], both: Peers | None, traffic: Traffic) -> None:
        self.pieces, self.both, self.traffic = pieces, both, traffic

    # -- products ------------------------------------------------------------------------------------------------------

    def project(self, basis: Tensor, g: Tensor) -> Tensor:
        return self._completed(super().project(basis, g), -2)

    def sketch(self, g: Tensor, thin: Tensor) -> Tensor:
        return self._completed(super().sketch(g, thin), -1)

    def random_sketch(self, g: Tensor, width: int, drawn: Drawn) -> Tensor:
        return self._completed(super().random_sketch(g, width, drawn), -1)

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return self._completed(super().inner(x, y), -1)

    # -- sums ----------------------------------------------------------------------------------------------------------

    def largest(self, g: Tensor) -> Tensor:
        largest = super().largest(g) if g.numel() else g.new_zeros(g.shape[:-2])
        return self._completed(largest, -2, -1, op=dist.ReduceOp.MAX)

    def size(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
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
        return self._completed(norm.double().square(), *dims(dim)).sqrt().to(norm.dtype)  # whose squares may not fit

    def mean(self, x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        if not self.pieces.keys() & dims(dim):
            return super().mean(x, dim)
        return self._completed(x.sum(dim=dim, keepdim=True), *dims(dim)) / self._count(x, dims(dim))

    def mean_squares(self, x: Tensor) -> tuple[Tensor, Tensor]:
        squares = x.square()
        return self.mean(squares, -1), self.mean(squares, -2)

    # -- shapes --------------------------------------------------------------------------------------------------------

    def shape(self, g: Tensor) -> tuple[int, int]:
        m, n = (
            g.shape[side] if piece is None else Side(piece.whole, side, piece)
            for side, piece in ((side, self.pieces.get(side)) for side in (-2, -1))
        )
        return m, n

    def own(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        first, *rest = shape
        if not isinstance(first, Side):
            return shape, 0
        piece = first.piece
        return (piece.length, *map(int, rest)), piece.start * math.prod(rest)

    def projected(self) -> Algebra:
        columns = {d: piece for d, piece in self.pieces.items() if d == -1}
        return type(self)(columns, None, self.traffic) if columns else WHOLE

    def columns(self, g: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Algebra, Tensor]:
        if -1 not in self.pieces:
            return self, super().columns(g, spans)[1]
        piece = self.pieces[-1]
        here = [piece.within(*span) for span in spans]
        whole = sum(last - first for first, last in spans)
        before = sum(min(last, piece.start) - min(first, piece.start) for first, last in spans)
        length = sum(last - first for first, last in here)
        some = {-1: replace(piece, whole=whole, start=before, length=length, most=whole)}
        return type(self)({**self.pieces, **some}, self.both, self.traffic), beside([g[..., a:b] for a, b in here])

    # -- lines ---------------------------------------------------------------------------------------------------------

    def every(self, x: Tensor) -> Tensor:
        return self._joined(x.unsqueeze(-1), -2).squeeze(-1) if -2 in self.pieces else x

    def places(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        if -2 not in self.pieces:
            return super().places(index)
        piece = self.pieces[-2]
        here = index.long() - piece.start
        mine = (here >= 0) & (here < piece.length)
        return here.clamp(0, max(0, piece.length - 1)), mine

    def completed(self, r: Tensor, rows: Tensor) -> Tensor:
        return self._completed(r, -2)

    # -- bases ---------------------------------------------------------------------------------------------------------

    def orthonormal(self, y: Tensor, side: int) -> Tensor:
        return ops.orthonormalize(y, *self._lines(side))

    def whiten_(self, y: Tensor, side: int) -> Tensor:
        return ops.whiten_(y, *self._lines(side)[:1])

    def principal(self, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        return ops.principal(y, rank, *self._lines(-2))

    def signed(self, basis: Tensor, side: int = -2) -> Tensor:
        if side not in self.pieces:
            return ops.fix_signs(basis)
        piece = self.pieces[side]
        peaks = basis.new_zeros(*basis.shape[:-2], piece.count, basis.shape[-1])
        if piece.length:  # its own row, in the order of the pieces, so that the first of equal entries decides
            peaks[..., piece.place, :] = leading_entries(basis).squeeze(-2)
        pivot = leading_entries(self._completed(peaks, side))
        return basis * torch.where(pivot < 0, -1.0, 1.0).to(basis.dtype)

    def leading(self, g: Tensor, rank: int) -> Tensor:
        """Subspace iteration until it stays: a factorisation would need all of G in one place, or its Gram matrix.

        Many thin messages, together more than G where singular values hardly differ.
        """
        m, n = self.shape(g)
        width = int(min(rank + 8, m, n))
        shape, start = self.own((n, width))

        def drawn(some: slice) -> Tensor:
            return ops.normal(shape, 0, ops.stream_of("leading", 0), g.device, start, some).to(g.dtype)

        basis = subspace_iteration(self, g, self.random_sketch(g, width, drawn), width, 2)
        enough = 8 * math.sqrt(rank) * torch.finfo(g.dtype).eps
        for _ in range(_MOST_ROUNDS):
            old, basis = basis, subspace_iteration(self, g, basis, width, 2)
            if float(self._angle(old[:, :rank], basis[:, :rank])) <= enough:
                break
        return basis[:, :rank].contiguous()

    def right(self, r: Tensor, rank: int) -> Tensor:
        """Of the triangle that a QR factorisation leaves."""
        if -1 not in self.pieces:
            return super().right(r, rank)
        q = self.orthonormal(r.mT.contiguous(), -1)
        small, values, _ = torch.linalg.svd(self.inner(r, q).mT.double())
        settle_(small, values, eps=torch.finfo(q.dtype).eps, keep=rank)
        return self.signed(q @ small[..., :rank].to(q.dtype), -1)

    def _angle(self, old: Tensor, new: Tensor) -> Tensor:
        """Sine of the angle between two subspaces."""
        lost, _ = self._lines(-2)
        return lost(lambda rest: rest.double().square().sum(), new - old @ self.project(old, new)).sqrt()

    # -- collectives ---------------------------------------------------------------------------------------------------

    def refreshing(self) -> Any:
        return self.traffic.refreshing()

    def each(self, work: Callable[..., None], items: Iterable[Any]) -> None:
        lockstep.together([partial(work, item) for item in items])

    def _completed(self, x: Tensor, *sides: int, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """The sum over the ranks that have other parts of some sides."""
        cut = [side for side in sides if side in self.pieces]
        if not cut:
            return x
        peers = self.pieces[cut[0]].peers if len(cut) == 1 else self.both
        assert peers is not None
        return self.traffic.total(x, peers, op)

    def _lines(self, side: int) -> tuple[Callable[..., Tensor], int]:
        """What sums over the rows (-2) or columns (-1), and the number of the first one here."""

        def total(summed: Callable[..., Tensor], *thin: Tensor) -> Tensor:
            return self._completed(summed(*thin), side)

        return total, self.pieces[side].start if side in self.pieces else 0

    def _joined(self, y: Tensor, side: int) -> Tensor:
        """All rows of a thin matrix, on every rank."""
        piece = self.pieces[side]
        whole = y.new_zeros(*y.shape[:-2], piece.whole, y.shape[-1])
        whole[..., piece.start : piece.start + piece.length, :] = y
        return self._completed(whole, side)

    def _count(self, x: Tensor, dims: tuple[int, ...]) -> int:
        return math.prod([self.pieces[dim].whole if dim in self.pieces else x.shape[dim] for dim in dims])


def dims(dim: int | tuple[int, ...]) -> tuple[int, ...]:
    return (dim,) if isinstance(dim, int) else dim
