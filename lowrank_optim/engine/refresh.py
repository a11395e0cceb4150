"""Refreshes: fitting the bases that are due before a step, and bringing the moments into the new coordinates.

A refresh of one matrix has three parts. `basis.fit` finds a new subspace from the gradient. `basis.turn` is the change
of coordinates from the old subspace to the new one. `refresh.carry_` applies that turn to the moments, or resets them.
Whether a matrix is due follows from counters on the CPU, so a step without a refresh reads nothing from the device.
"""

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

# One matrix that is due: its plan, the state of its parameter, its number within the parameter and within the chunk,
# and the counters of its schedule.
Due = tuple[Plan, dict[str, Tensor], int, int, dict[str, Tensor]]


def fits(chunk: Chunk, algebra: Algebra, due: list[Due], g: Tensor, st: State) -> Iterator[dict[str, Tensor] | None]:
    """Yield the new tensors of each basis that is due, or None for each if they are to be fitted one at a time.

    Args:
        g: the gradients `(b, m, n)` of the chunk, or `(m, n)`.
    """
    # A small factorization is latency on an accelerator, and takes about the same time for one matrix as for many. On a
    # CPU a loop is as fast, and holds the workspace of one matrix.
    basis, plan = chunk.recipe.basis, chunk.plans[0]
    if not (basis.stacks and stacking(g)):
        yield from [None] * len(due)
        return
    (m, n), rank = plan.matrix, cast(int, plan.rank)
    # The workspace of a stack obeys the limit that holds for chunks.
    most = max(1, limits.CHUNK_BYTES // (basis.fit_workspace(m, n, rank) * g.element_size()))
    for run in _runs(due, most):
        _, state, inner, outer, _ = run[0]
        together = slice(outer, outer + len(run))
        # All matrices of a run have a basis to start from, or none has. Each draws the random numbers
        # that it would draw if it were fitted alone.
        old = OfMatrix(st, together) if _refreshes(run[0]) else None
        drawn = _stacked([draws(algebra, item[0], chunk.first + item[2], g)(_refreshes(item)) for item in run])
        # Bases that accept stacks do not read the time, so that of the first matrix serves all.
        at = time_of(chunk, state["refreshed_at"].view(-1), inner)
        fitted = basis.fit(algebra, g[together], old, rank, drawn, at)
        yield from ({key: x[i] for key, x in fitted.items()} for i in range(len(run)))


def stacking(g: Tensor) -> bool:
    """Whether the matrices of `g (b, m, n)` are better fitted together, and not one after another."""
    return g.dim() > 2 and g.device.type != "cpu"


def _runs(due: list[Due], most: int) -> Iterator[list[Due]]:
    """Yield runs of at most `most` neighbors in the chunk that all have a basis, or that all lack one.

    A run of neighbors is a slice of the stack, which is a view; any other selection would copy gradients.
    """
    run: list[Due] = []
    for item in due:
        if run and (
            len(run) == most or item[3] != run[-1][3] + 1 or bool(_refreshes(item)) != bool(_refreshes(run[0]))
        ):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def _refreshes(item: Due) -> int:
    """Return the number of refreshes that a matrix has had."""
    return int(item[1]["refreshes"].view(-1)[item[2]])


def _stacked(draws: list[Draw]) -> Draw:
    """Return the draws of several matrices as one, whose result is stacked: `(b, *shape)`."""

    def draw(shape: tuple[int, ...], purpose: str = "sketch", some: slice | None = None) -> Tensor:
        return torch.stack([matrix_draw(shape, purpose, some) for matrix_draw in draws])

    return draw


def time_of(chunk: Chunk, last: Tensor, inner: int) -> Time:
    """Return the time of a fit of matrix `inner` of its parameter.

    Args:
        last: the step of the last refresh of each matrix of the parameter, -1 for none.
    """
    # Refreshes count steps from 0, updates from 1. Moments that restart have seen the steps since the last refresh.
    since = max(0, int(last[inner])) if chunk.recipe.refresh.restarts else 0
    return Time(chunk.step - 1, float(chunk.step - 1 - since))


def draws(algebra: Algebra, plan: Plan, expert: int, g: Tensor) -> Callable[[int | Tensor], Draw]:
    """Return a function from the number of a refresh to the random numbers of one matrix in that refresh.

    The numbers depend on seed and name of the parameter, the number of the matrix within it and the refresh alone, so a
    stack, a shard or a resumed run draws the same ones.
    """

    def of(count: int | Tensor) -> Draw:
        def draw(shape: tuple[int, ...], purpose: str = "sketch", some: slice | None = None) -> Tensor:
            stream = ops.stream_of(f"{purpose} {expert}", count)
            # A shard draws only the rows that it has.
            here, start = algebra.own(shape)
            return ops.normal(here, plan.key, stream, g.device, start, some).to(g.dtype)

        return draw

    return of


Derived = dict[int, dict[str, Tensor]]  # tensors that bases derive, by the number of the matrix within the chunk

Note = Callable[[Tensor, Tensor], None]  # takes G and R after a refresh


def refresh_(chunk: Chunk, algebra: Algebra = WHOLE) -> None:
    """Do the refreshes that are due before this step, and nothing else of it.

    It serves captured steps, whose update runs later, and accumulation, whose basis must exist before the window ends.
    Both exclude recipes whose residual changes the gradient.
    """
    st, g = chunk.open(), chunk.gradient()
    new = refit_due(chunk, algebra, list(due_matrices(chunk)), g, st)
    refreshed = bool(new)
    # R measures a share of the energy of G only if the basis is orthonormal.
    if refreshed and chunk.recipe.basis.orthonormal:
        derive_(chunk, algebra, g, st, new)
        note_captured(chunk, algebra, g, chunk.recipe.basis.down(algebra, g, st))
    # The update of the same step closes this state again, with other random numbers.
    chunk.close(st, refreshed, "refresh ")


def refresh_due(chunk: Chunk) -> bool:
    """Whether any matrix of the chunk is due for a refresh before this step."""
    return next(due_matrices(chunk), None) is not None


def note_captured(chunk: Chunk, algebra: Algebra, g: Tensor, r: Tensor) -> None:
    """Note which share of the energy of each matrix its new subspace captures: `|R|^2 / |G|^2`."""
    both, inside = (-2, -1), chunk.recipe.basis.inside(algebra)
    with algebra.refreshing():
        # (b, 1, 1) each: norms over whole matrices, also where ranks share one.
        part, whole = inside.norm(r, both), algebra.norm(g, both)
    share = part / whole.clamp(min=torch.finfo(g.dtype).tiny)
    chunk.watch.note_captured(chunk.plans, chunk.first, share.square().view(-1))


def refit_due(chunk: Chunk, algebra: Algebra, due: list[Due], g: Tensor, st: State) -> Derived:
    """Refit the bases that are due, matrix by matrix; return what the new ones derive.

    A matrix with a zero gradient keeps its basis and stays due: such a basis would be arbitrary, and used for a whole
    interval.
    """
    new: Derived = {}
    if not due:
        return new
    with algebra.refreshing():
        # The norms were finite, so the entries are. One read for all matrices: the device is waited for once.
        largest = algebra.numbers(algebra.largest(g).view(-1))
        due = [item for item in due if largest[item[3]] > 0]
        with chunk.watch.refreshing():
            fitted = fits(chunk, algebra, due, g, st)
            # Over shards the matrices take turns: while one waits for a sum over ranks, the next one works.
            algebra.each(functools.partial(_refresh_matrix, chunk, algebra, g, st, new), zip(due, fitted, strict=True))
    return new


def _refresh_matrix(
    chunk: Chunk, algebra: Algebra, g: Tensor, st: State, new: Derived, due: tuple[Due, dict[str, Tensor] | None]
) -> None:
    """Refresh one matrix: fit its basis unless `due` brings it, carry its moments and advance its counters."""
    refresh = chunk.recipe.refresh
    (plan, state, inner, outer, counters), fitted = due
    count, last = state["refreshes"].view(-1), state["refreshed_at"].view(-1)
    # For a stack, views of matrix `outer`: what is written to them is written to the open state (b, ...).
    matrix = g if g.dim() == 2 else g[outer]
    view = st if g.dim() == 2 else OfMatrix(st, outer)
    draw, at = draws(algebra, plan, chunk.first + inner, matrix), time_of(chunk, last, inner)
    if fitted is None:
        old = view if count[inner] else None
        fitted = chunk.recipe.basis.fit(algebra, matrix, old, cast(int, plan.rank), draw(int(count[inner])), at)
    turn, new[outer] = _refit(chunk, algebra, plan, int(count[inner]), at, matrix, view, draw, fitted)
    # Only a refresh that had a basis before has a turn that a schedule can learn from.
    if turn is not None:
        refresh.note_(counters, turn)
    count[inner] += 1
    last[inner] = at.step


def due_matrices(chunk: Chunk) -> Iterator[Due]:
    """Yield each matrix that is due for a refresh before this step. Only counters on the CPU are read."""
    if chunk.plans[0].projected:
        last = [at for state in chunk.states for at in state["refreshed_at"].view(-1).tolist()]
        # In a staggered schedule each matrix of the optimizer has its own place, those of a stack included.
        for plan, state, inner, outer in chunk.matrices():
            counters = _counters(chunk, plan, state, inner)
            if chunk.recipe.refresh.due(chunk.step - 1, last[outer], plan.place + chunk.first + inner, counters):
                yield plan, state, inner, outer, counters


def _counters(chunk: Chunk, plan: Plan, state: dict[str, Tensor], inner: int) -> dict[str, Tensor]:
    """Return what the schedule remembers of one matrix, as views that write through."""
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
    """Replace the basis of one matrix `(m, n)` by `fitted` in refresh number `count`, and bring its moments along.

    `st` is the open state of the matrix, as views that write through.

    Returns:
        The turn, if there was a basis before, and the tensors that the new basis derives.
    """
    recipe, basis, rank = chunk.recipe, chunk.recipe.basis, cast(int, plan.rank)
    keys = basis.spec(plan.matrix, rank)
    # A stored basis is rounded. Turn and moments must be those of the basis that later steps will read.
    new = {key: cast(Store, chunk.spec[key].store).rounded(x, chunk.working) for key, x in fitted.items()}
    turn, derived = None, basis.derive(algebra, g, new, rank, draw(count))
    whole = {**new, **derived}
    if count:
        # Tensors that the old basis derived were not stored, so they are made again from its own refresh number.
        old = {key: st[key] for key in keys}
        old |= basis.derive(algebra, g, old, rank, draw(count - 1))
        turn = basis.turn(algebra, old, whole)
        # Error feedback keeps what the turn loses of the moments: it adds what they were, and subtracts what they are.
        recipe.residual.turning_(recipe, st, old, 1.0)
        recipe.refresh.carry_(basis.inside(algebra), recipe, st, turn, at.seen)
        recipe.residual.turning_(recipe, st, whole, -1.0)
    else:
        recipe.residual.begin_(algebra, recipe, st, whole, g)
        if AGE in st:
            st[AGE].zero_()  # steps before there was a basis have taught the moments nothing
    for key, tensor in new.items():
        st[key].copy_(tensor)
    return turn, derived


def derived(
    recipe: Recipe, algebra: Algebra, plan: Plan, expert: int, g: Tensor, kept: State, count: int | Tensor
) -> dict[str, Tensor]:
    """Return the tensors that the basis of one matrix derives in each step and that are not stored.

    Args:
        expert: the number of the matrix within its parameter.
        g: the gradient `(m, n)`, or any tensor of its shape and dtype.
        kept: the stored tensors of the basis.
        count: refreshes so far; in a captured step a tensor on the device.
    """
    # Refresh number k (0, 1, ...) drew from stream k, so the current basis belongs to stream count - 1.
    last = count.sub(1).clamp(min=0) if isinstance(count, Tensor) else max(0, count - 1)
    return recipe.basis.derive(algebra, g, kept, cast(int, plan.rank), draws(algebra, plan, expert, g)(last))


def derive_(chunk: Chunk, algebra: Algebra, g: Tensor, st: State, new: Derived) -> None:
    """Add to `st` the tensors that the bases of the chunk derive.

    Args:
        g: the gradients `(b, m, n)` or `(m, n)`, or any tensor of that shape and dtype.
        new: tensors that a refresh of this step has derived already; they are moved out of it.
    """
    basis = chunk.recipe.basis
    if not (basis.derives and chunk.plans[0].projected):
        return
    matrices = list(chunk.matrices())
    parts: list[dict[str, Tensor]] = [{} for _ in matrices]

    def derive(item: tuple[Plan, dict[str, Tensor], int, int]) -> None:
        plan, state, inner, outer = item
        if outer in new:
            parts[outer] = new.pop(outer)
            return
        matrix = g if g.dim() == 2 else g[outer]
        # Per matrix, and not as one stack: a basis derives for a single matrix (m, n).
        kept = {key: st[key] if g.dim() == 2 else st[key][outer] for key in basis.spec(plan.matrix, plan.rank or 0)}
        count = chunk.numbers.counts[outer] if chunk.numbers is not None else int(state["refreshes"].view(-1)[inner])
        parts[outer] = derived(chunk.recipe, algebra, plan, chunk.first + inner, matrix, kept, count)

    algebra.each(derive, matrices)
    for key in parts[0]:
        st[key] = parts[0][key] if g.dim() == 2 else torch.stack([part[key] for part in parts])
