"""What fitting a basis is given, and bases of equal matrices fitted as one stack where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from .. import ops
from ..recipe.algebra import Algebra
from ..recipe.plan import Plan
from ..recipe.recipe import Draw, State, Time
from .chunk import CHUNK_BYTES, Chunk
from .open_state import OfMatrix

# A plan, its state, the number of a matrix within its parameter and within its chunk, the counters of its schedule.
Due = tuple[Plan, dict[str, Tensor], int, int, dict[str, Tensor]]


def fits(chunk: Chunk, algebra: Algebra, due: list[Due], g: Tensor, st: State) -> Iterator[dict[str, Tensor] | None]:
    """The new tensors of each basis that is due, or None for all where they are to be fitted one by one.

    Small factorisations are latency on an accelerator, and take about the same time for one matrix and for many. On a
    CPU a loop is as fast, and holds the workspace of one matrix; elsewhere that of a stack stays within a chunk.
    """
    basis, plan = chunk.recipe.basis, chunk.plans[0]
    if not (basis.stacks and stacking(g)):
        yield from [None] * len(due)
        return
    (m, n), rank = plan.matrix, cast(int, plan.rank)
    most = max(1, CHUNK_BYTES // (basis.fit_workspace(m, n, rank) * g.element_size()))
    for run in _runs(due, most):
        _, state, inner, outer, _ = run[0]
        together = slice(outer, outer + len(run))
        old = OfMatrix(st, together) if _count(run[0]) else None
        drawn = _stacked([draws(algebra, one[0], chunk.first + one[2], g)(_count(one)) for one in run])
        at = time_of(chunk, state["refreshed_at"].view(-1), inner)
        fitted = basis.fit(algebra, g[together], old, rank, drawn, at)
        yield from ({key: x[i] for key, x in fitted.items()} for i in range(len(run)))


def stacking(g: Tensor) -> bool:
    """Are the matrices of `g (b, m, n)` better worked on together?"""
    return g.dim() > 2 and g.device.type != "cpu"


def _runs(due: list[Due], most: int) -> Iterator[list[Due]]:
    """Neighbours in the chunk that all have a basis, or all have none."""
    run: list[Due] = []
    for one in due:
        if run and (len(run) == most or one[3] != run[-1][3] + 1 or bool(_count(one)) != bool(_count(run[0]))):
            yield run
            run = []
        run.append(one)
    if run:
        yield run


def _count(one: Due) -> int:
    """Of its refreshes so far."""
    return int(one[1]["refreshes"].view(-1)[one[2]])


def _stacked(draws: list[Draw]) -> Draw:
    def draw(shape: tuple[int, ...], purpose: str = "sketch", some: slice | None = None) -> Tensor:
        return torch.stack([one(shape, purpose, some) for one in draws])

    return draw


def time_of(chunk: Chunk, last: Tensor, inner: int) -> Time:
    """When matrix `inner` of its parameter is fitted; `last`: when its parameter's were before."""
    since = max(0, int(last[inner])) if chunk.recipe.refresh.restarts else 0
    return Time(chunk.step - 1, float(chunk.step - 1 - since))


def draws(algebra: Algebra, plan: Plan, expert: int, g: Tensor) -> Callable[[int | Tensor], Draw]:
    """The random numbers of one matrix, for refresh number `count`."""

    def of(count: int | Tensor) -> Draw:
        def draw(shape: tuple[int, ...], purpose: str = "sketch", some: slice | None = None) -> Tensor:
            stream = ops.stream_of(f"{purpose} {expert}", count)
            here, start = algebra.own(shape)
            return ops.normal(here, plan.key, stream, g.device, start, some).to(g.dtype)

        return draw

    return of
