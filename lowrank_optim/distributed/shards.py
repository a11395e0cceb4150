"""The algebra of a matrix that is cut along one side: thin partial results, completed over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..kept import Side
from .algebra import WHOLE, Algebra

_MOST_ROUNDS = 30  # of `leading`


@dataclass
class Meter:
    """What one parameter has handed to collectives, in bytes. `between` leaves refreshes out."""

    steps: int = 0
    refreshes: int = 0
    between: float = 0.0
    refreshing: float = 0.0

    @property
    def sent(self) -> tuple[float | None, float | None]:
        """Per step and per refresh, on average; None where there was none yet."""
        per_step = self.between / self.steps if self.steps else None
        return per_step, self.refreshing / self.refreshes if self.refreshes else None


class Shards(Algebra):
    """Every rank has some rows (`cut` -2) or some columns (-1) of the turned matrix, and has whole what is not cut.

    Where rows are cut, so are the rows of a basis, and R is the same everywhere. Where columns are cut, so are those of
    R, and bases are the same everywhere. What is the same everywhere is computed everywhere, from the same bits.
    """

    def __init__(
        self, cut: int, whole: int, start: int, length: int, group: dist.ProcessGroup, meters: Sequence[Meter]
    ) -> None:
        self.cut, self.whole, self.start, self.length = cut, whole, start, length
        self.group, self.meters = group, meters
        self._in_refresh, self._refreshed = False, False
        for meter in meters:
            meter.steps += 1

    # -- products ------------------------------------------------------------------------------------------------------

    def project(self, basis: Tensor, g: Tensor) -> Tensor:
        return self._completed(torch.matmul(basis.mT, g), self.cut == -2)

    def sketch(self, g: Tensor, thin: Tensor) -> Tensor:
        return self._completed(g @ thin, self.cut == -1)

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        return self._completed(x @ y, self.cut == -1)

    # -- sums ----------------------------------------------------------------------------------------------------------

    def largest(self, g: Tensor) -> Tensor:
        largest = super().largest(g) if g.numel() else g.new_zeros(g.shape[:-2])
        return self._sent(largest.contiguous(), dist.ReduceOp.MAX)

    def size(self, x: Tensor) -> Tensor:
        dims = (-2, -1) if x.dim() > 1 else (-1,)
        return self.norm(x, dims) / math.sqrt(self._count(x, dims))

    def energy(self, x: Tensor, dim: int, power: int = 2) -> Tensor:
        return self._completed(super().energy(x, dim, power), dim == self.cut)

    def norm(self, x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        norm = super().norm(x, dim)
        if self.cut not in _dims(dim):
            return norm
        return self._completed(norm.double().square(), True).sqrt().to(x.dtype)  # whose squares may not fit

    def mean(self, x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        if self.cut not in _dims(dim):
            return super().mean(x, dim)
        return self._completed(x.sum(dim=dim, keepdim=True), True) / self._count(x, _dims(dim))

    # -- shapes --------------------------------------------------------------------------------------------------------

    def shape(self, g: Tensor) -> tuple[int, int]:
        m, n = g.shape[-2:]
        return (Side(self.whole, -2), n) if self.cut == -2 else (m, Side(self.whole, -1))

    def own(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        first, *rest = shape
        if not isinstance(first, Side):
            return shape, 0
        return (self.length, *map(int, rest)), self.start * math.prod(rest)

    def projected(self) -> Algebra:
        return WHOLE if self.cut == -2 else self

    # -- bases ---------------------------------------------------------------------------------------------------------

    def orthonormal(self, y: Tensor, side: int) -> Tensor:
        if side != self.cut:
            return ops.orthonormalize(y)
        q = ops.cholesky_qr2(y, lambda gram: self._completed(gram, True))
        return self._rows(ops.householder(self._joined(y))) if q is None else q

    def signed(self, basis: Tensor) -> Tensor:
        if self.cut != -2:
            return ops.fix_signs(basis)
        peaks = basis.new_zeros(1, basis.shape[-1])
        if self.length:
            peaks = basis.gather(-2, basis.abs().argmax(dim=-2, keepdim=True))
        everyone = self._gathered(peaks)  # in the order of rows, so that the first of equal entries decides
        pivot = everyone.gather(-2, everyone.abs().argmax(dim=-2, keepdim=True))
        return basis * torch.where(pivot < 0, -1.0, 1.0).to(basis.dtype)

    def leading(self, g: Tensor, rank: int) -> Tensor:
        """Subspace iteration until it stays: a factorisation would need all of G in one place, or its Gram matrix.

        Many thin messages, together more than G where singular values hardly differ.
        """
        m, n = self.shape(g)
        width = int(min(rank + 8, m, n))
        shape, start = self.own((n, width))
        guess = ops.normal(shape, 0, ops.stream_of("leading", 0), g.device, start).to(g.dtype)
        basis = ops.subspace_iteration(self, g, self.sketch(g, guess), width, 2)
        enough = 8 * math.sqrt(rank) * torch.finfo(g.dtype).eps
        for _ in range(_MOST_ROUNDS):
            old, basis = basis, ops.subspace_iteration(self, g, basis, width, 2)
            if float(self._angle(old[:, :rank], basis[:, :rank])) <= enough:
                break
        return basis[:, :rank].contiguous()

    def _angle(self, old: Tensor, new: Tensor) -> Tensor:
        """Sine of the angle between two subspaces."""
        rest = new - old @ self.project(old, new)
        squares = rest.double().square().sum()
        return (self._completed(squares, True) if self.cut == -2 else squares).sqrt()

    # -- collectives ---------------------------------------------------------------------------------------------------

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        for meter in self.meters:
            meter.refreshes += not self._refreshed  # one of these objects sees one step
        self._in_refresh = self._refreshed = True
        yield
        self._in_refresh = False

    def _completed(self, x: Tensor, partial: bool) -> Tensor:
        """The sum over ranks, of a tensor that nobody else has."""
        return self._sent(x.contiguous(), dist.ReduceOp.SUM) if partial else x

    def _sent(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        self._note(x)
        dist.all_reduce(x, op, group=self.group)
        return x

    def _gathered(self, x: Tensor) -> Tensor:
        """The tensors (k, r) of all ranks, one above the other."""
        self._note(x)
        everyone = x.new_empty(x.shape[0] * self.group.size(), *x.shape[1:])
        dist.all_gather(list(everyone.chunk(self.group.size())), x.contiguous(), group=self.group)
        return everyone

    def _joined(self, y: Tensor) -> Tensor:
        """All rows of a thin matrix, on every rank. Only the last ranks with rows have fewer than the others."""
        most = -(-self.whole // self.group.size())
        padded = y.new_zeros(most, y.shape[-1])
        padded[: self.length] = y
        return self._gathered(padded)[: self.whole]

    def _rows(self, y: Tensor) -> Tensor:
        return y[self.start : self.start + self.length].contiguous()

    def _note(self, x: Tensor) -> None:
        for meter in self.meters:
            if self._in_refresh:
                meter.refreshing += x.nbytes / len(self.meters)
            else:
                meter.between += x.nbytes / len(self.meters)

    def _count(self, x: Tensor, dims: tuple[int, ...]) -> int:
        return math.prod([self.whole if dim == self.cut else x.shape[dim] for dim in dims])


def _dims(dim: int | tuple[int, ...]) -> tuple[int, ...]:
    return (dim,) if isinstance(dim, int) else dim
