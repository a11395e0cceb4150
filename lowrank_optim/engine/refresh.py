"""What fitting a basis is given, and bases of equal matrices fitted as one stack where that is faster."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from .. import ops
from ..recipe.algebra import WHOLE, Algebra
from ..recipe.plan import Plan
from ..recipe.recipe import AGE, Draw, Recipe, State, Time
from ..recipe.store import Store
from ..recipe.turn import Turn
from . import limits
from .chunk import Chunk
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
    most = max(1, limits.CHUNK_BYTES // (basis.fit_workspace(m, n, rank) * g.element_size()))
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


Derived = dict[int, dict[str, Tensor]]  # by number within the chunk


Note = Callable[[Tensor, Tensor], None]  # takes G and R after a refresh


def refresh_(chunk: Chunk, algebra: Algebra = WHOLE) -> None:
    """Only the refreshes that are due before this step; for recipes whose gradient is used as it comes."""
    st, g = chunk.open(), chunk.gradient()
    new = refit_due(chunk, algebra, list(due_matrices(chunk)), g, st)
    refreshed = bool(new)
    if refreshed and chunk.recipe.basis.orthonormal:
        derive_(chunk, algebra, g, st, new)
        note_captured(chunk, algebra, g, chunk.recipe.basis.down(algebra, g, st))
    chunk.close(st, refreshed, "refresh ")


def refresh_due(chunk: Chunk) -> bool:
    """Is any of the matrices due for a refresh before this step?"""
    return next(due_matrices(chunk), None) is not None


def note_captured(chunk: Chunk, algebra: Algebra, g: Tensor, r: Tensor) -> None:
    """The share of the energy of each matrix that its new subspace captures."""
    both, inside = (-2, -1), chunk.recipe.basis.inside(algebra)
    with algebra.refreshing():
        part, whole = inside.norm(r, both), algebra.norm(g, both)
    share = part / whole.clamp(min=torch.finfo(g.dtype).tiny)
    chunk.watch.note_captured(chunk.plans, chunk.first, share.square().view(-1))


def refit_due(chunk: Chunk, algebra: Algebra, due: list[Due], g: Tensor, st: State) -> Derived:
    """Refits the bases that are due, matrix by matrix. One with a zero gradient keeps its own and stays due."""
    new: Derived = {}
    if not due:
        return new
    with algebra.refreshing():
        largest = algebra.told(algebra.largest(g).view(-1))  # finite: the norms were; one synchronisation for all
        due = [one for one in due if largest[one[3]] > 0]
        with chunk.watch.refreshing():
            fitted = fits(chunk, algebra, due, g, st)
            algebra.each(functools.partial(_refresh_one, chunk, algebra, g, st, new), zip(due, fitted, strict=True))
    return new


def _refresh_one(
    chunk: Chunk, algebra: Algebra, g: Tensor, st: State, new: Derived, due: tuple[Due, dict[str, Tensor] | None]
) -> None:
    """One matrix, and its new basis if there is one already."""
    refresh = chunk.recipe.refresh
    (plan, state, inner, outer, counters), fitted = due
    count, last = state["refreshes"].view(-1), state["refreshed_at"].view(-1)
    matrix = g if g.dim() == 2 else g[outer]
    view = st if g.dim() == 2 else OfMatrix(st, outer)
    draw, at = draws(algebra, plan, chunk.first + inner, matrix), time_of(chunk, last, inner)
    if fitted is None:
        old = view if count[inner] else None
        fitted = chunk.recipe.basis.fit(algebra, matrix, old, cast(int, plan.rank), draw(int(count[inner])), at)
    turn, new[outer] = _refit(chunk, algebra, plan, int(count[inner]), at, matrix, view, draw, fitted)
    if turn is not None:
        refresh.note_(counters, turn)
    count[inner] += 1
    last[inner] = at.step


def due_matrices(chunk: Chunk) -> Iterator[Due]:
    """Each matrix that is due for a refresh before this step."""
    if chunk.plans[0].projected:
        last = [at for state in chunk.states for at in state["refreshed_at"].view(-1).tolist()]
        for plan, state, inner, outer in chunk.matrices():
            counters = _counters(chunk, plan, state, inner)
            if chunk.recipe.refresh.due(chunk.step - 1, last[outer], plan.place + chunk.first + inner, counters):
                yield plan, state, inner, outer, counters


def _counters(chunk: Chunk, plan: Plan, state: dict[str, Tensor], inner: int) -> dict[str, Tensor]:
    """What the schedule remembers of one matrix; views that write through."""
    keys = chunk.recipe.refresh.counters()
    return {key: state[key].view(plan.count, *state[key].shape[len(plan.batch) :])[inner] for key in keys}


def _refit(
    chunk: Chunk,
    algebra: Algebra,
    plan: Plan,
    count: int,
    at: Time,
    g: Tensor,
    st: State,
    draw: Callable[[int | Tensor], Draw],
    fitted: dict[str, Tensor],
) -> tuple[Turn | None, dict[str, Tensor]]:
    """One matrix: its new basis, and the moments brought along. `st` are views that write through.

    Returns:
        The turn, if there was a basis before, and what the new one derives.
    """
    recipe, basis, rank = chunk.recipe, chunk.recipe.basis, cast(int, plan.rank)
    keys = basis.spec(plan.matrix, rank)
    new = {key: cast(Store, chunk.spec[key].store).rounded(x, chunk.working) for key, x in fitted.items()}
    turn, derived = None, basis.derive(algebra, g, new, rank, draw(count))
    whole = {**new, **derived}
    if count:
        old = {key: st[key] for key in keys}
        old |= basis.derive(algebra, g, old, rank, draw(count - 1))
        turn = basis.turn(algebra, old, whole)
        recipe.residual.turning_(recipe, st, old, 1.0)
        recipe.refresh.carry_(basis.inside(algebra), recipe, st, turn, at.seen)
        recipe.residual.turning_(recipe, st, whole, -1.0)
    else:
        recipe.residual.begin_(algebra, recipe, st, whole, g)
        if AGE in st:
            st[AGE].zero_()  # the steps before there was a basis have taught it nothing
    for key, tensor in new.items():
        st[key].copy_(tensor)
    return turn, derived


def derived(
    recipe: Recipe, algebra: Algebra, plan: Plan, expert: int, g: Tensor, kept: State, count: int | Tensor
) -> dict[str, Tensor]:
    """What the basis of one matrix needs and nobody keeps, `count` refreshes having been.

    `g`: the gradient, or anything of its shape and dtype."""
    last = count.sub(1).clamp(min=0) if isinstance(count, Tensor) else max(0, count - 1)
    return recipe.basis.derive(algebra, g, kept, cast(int, plan.rank), draws(algebra, plan, expert, g)(last))


def derive_(chunk: Chunk, algebra: Algebra, g: Tensor, st: State, new: Derived) -> None:
    """Adds to `st` what its bases need and nobody keeps. `new`: what there is already of it; it is used up."""
    basis = chunk.recipe.basis
    if not (basis.derives and chunk.plans[0].projected):
        return
    matrices = list(chunk.matrices())
    parts: list[dict[str, Tensor]] = [{} for _ in matrices]

    def derive(one: tuple[Plan, dict[str, Tensor], int, int]) -> None:
        plan, state, inner, outer = one
        if outer in new:
            parts[outer] = new.pop(outer)
            return
        matrix = g if g.dim() == 2 else g[outer]
        kept = {key: st[key] if g.dim() == 2 else st[key][outer] for key in basis.spec(plan.matrix, plan.rank or 0)}
        count = chunk.numbers.counts[outer] if chunk.numbers is not None else int(state["refreshes"].view(-1)[inner])
        parts[outer] = derived(chunk.recipe, algebra, plan, chunk.first + inner, matrix, kept, count)

    algebra.each(derive, matrices)
    for key in parts[0]:
        st[key] = parts[0][key] if g.dim() == 2 else torch.stack([part[key] for part in parts])
