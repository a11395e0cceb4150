"""One step of equal matrices: the lines of `recipe.py`, run on a chunk. Nothing here asks which part it holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from ..recipe.algebra import WHOLE, Algebra
from ..recipe.plan import Plan
from ..recipe.recipe import AGE, Clock, Draw, Recipe, State, Time, Update
from ..recipe.store import Store
from ..recipe.turn import Turn
from . import fused
from .chunk import Chunk
from .open_state import OfMatrix
from .refresh import Due, draws, fits, time_of
from .write import apply_, apply_narrow_

Note = Callable[[Tensor, Tensor], None]  # takes G and R after a refresh
Move = Callable[..., "Update | None"]  # has the arguments of `move_`
Derived = dict[int, dict[str, Tensor]]  # by number within the chunk


def update_(chunk: Chunk, algebra: Algebra = WHOLE, move: Move | None = None) -> None:
    """Weights and state of a chunk, one step further.

    `move` stands in for `move_`. A chunk that has numbers was refreshed before.
    """
    recipe, group, narrow = chunk.recipe, chunk.group, chunk.narrow
    st = chunk.open()
    new: Derived = {}
    g = r = None
    if chunk.projected:
        r = chunk.coordinates()
    else:
        due = list(_due(chunk)) if chunk.numbers is None else []
        g = recipe.residual.before(chunk.gradient(as_kept=narrow and recipe.thin and not due), st)
        new = _refresh(chunk, algebra, due, g, st)
    refreshed = bool(new)
    t, like = chunk.clock(st), chunk.blank() if narrow else chunk.weights()
    w = chunk.weights(as_kept=True) if narrow and recipe.step_size.reads_weights else like
    _derive(chunk, algebra, like, st, new)
    note = functools.partial(_note_captured, chunk, algebra) if refreshed and recipe.basis.orthonormal else None
    lr, decay, ascend = chunk.lr, group["weight_decay"], group["maximize"]
    change = (move or move_)(recipe, algebra, w, g, r, st, lr, decay, ascend, t, chunk.now, note, narrow)
    if change is None:
        chunk.write_weights(w)
    else:
        apply_narrow_(recipe, chunk, like, st, change, 1 - lr * decay if decay else 1.0)
    chunk.leave_()
    chunk.close(st, refreshed)


def move_(
    recipe: Recipe,
    algebra: Algebra,
    w: Tensor,
    g: Tensor | None,
    r: Tensor | None,
    st: State,
    lr: Clock,
    decay: float,
    ascend: bool,
    t: Clock,
    step: Clock,
    note: Note | None,
    narrow: bool = False,
    d: Tensor | None = None,
) -> Update | None:
    """The arithmetic of one step: nothing here depends on the values of tensors, so it compiles to one graph.

    Moments have seen t steps, those in full space `step`. Numbers are floats, or tensors on the device. To ascend is to
    turn the sign of the step: every rule is odd in G. `d`: the direction of r, where a kernel for lists has found it.

    Returns:
        None, w having been moved; or where it is `narrow` what remains to be taken from it.
    """
    if r is None and not narrow and not ascend and fused.step_(recipe, algebra, w, cast(Tensor, g), st, lr, decay, t):
        return None
    change = _change(recipe, algebra, g, r, d, st, t, step, note)
    length = recipe.step_size(algebra, lr, w, step) * (-recipe.scale if ascend else recipe.scale)
    if narrow:
        return change.times(length)
    apply_(recipe, w, st, change.times(length), 1 - lr * decay if decay else 1.0)
    return None


def project(chunk: Chunk, algebra: Algebra = WHOLE) -> Tensor:
    """R of the gradients in the bases that there are, in memory of its own; nothing is changed."""
    plan, g = chunk.plans[0], chunk.gradient(as_kept=True)
    st = chunk.open(chunk.recipe.basis.spec(plan.matrix, cast(int, plan.rank)))
    _derive(chunk, algebra, chunk.blank(), st, {})
    return chunk.recipe.basis.down(algebra, g, st)


def refresh_(chunk: Chunk, algebra: Algebra = WHOLE) -> None:
    """Only the refreshes that are due before this step; for recipes whose gradient is used as it comes."""
    st, g = chunk.open(), chunk.gradient()
    new = _refresh(chunk, algebra, list(_due(chunk)), g, st)
    refreshed = bool(new)
    if refreshed and chunk.recipe.basis.orthonormal:
        _derive(chunk, algebra, g, st, new)
        _note_captured(chunk, algebra, g, chunk.recipe.basis.down(algebra, g, st))
    chunk.close(st, refreshed, "refresh ")


def refresh_due(chunk: Chunk) -> bool:
    """Is any of the matrices due for a refresh before this step?"""
    return next(_due(chunk), None) is not None


def _note_captured(chunk: Chunk, algebra: Algebra, g: Tensor, r: Tensor) -> None:
    """The share of the energy of each matrix that its new subspace captures."""
    both, inside = (-2, -1), chunk.recipe.basis.inside(algebra)
    with algebra.refreshing():
        part, whole = inside.norm(r, both), algebra.norm(g, both)
    share = part / whole.clamp(min=torch.finfo(g.dtype).tiny)
    chunk.watch.note_captured(chunk.plans, chunk.first, share.square().view(-1))


def _change(
    recipe: Recipe,
    algebra: Algebra,
    g: Tensor | None,
    r: Tensor | None,
    d: Tensor | None,
    st: State,
    t: Clock,
    step: Clock,
    note: Note | None,
) -> Update:
    """What is subtracted from W, as a multiple of lr. A thin recipe is content with r; any other needs g."""
    scaling = recipe.scaling
    if r is None:
        g = cast(Tensor, g)
        g = scaling(algebra, st, g, g, step) if recipe.scales_first else g
        r = recipe.basis.down(algebra, g, st)
        if note is not None:
            note(g, r)
    d, gain = (d, 1.0) if d is not None else _direction(recipe, algebra, g, r, st, t)
    change = recipe.residual.after(algebra, recipe, st, cast(Tensor, g), r, d, gain)
    if recipe.scaling_in == "full" and not recipe.scales_first:
        g = cast(Tensor, g)
        if scaling.per_column(algebra.shape(g)):
            return change.times(scaling.gains(algebra, st, g, step))
        change = Update(None, rest=scaling(algebra, st, change.whole(recipe, st, g), g, step))
    return change


def _direction(
    recipe: Recipe, algebra: Algebra, g: Tensor | None, r: Tensor, st: State, t: Clock
) -> tuple[Tensor, Clock]:
    """(D, gain): the direction in the subspace is their product."""
    if recipe.scaling_in == "full":
        return recipe.momentum(st, r, t)
    inside = recipe.basis.inside(algebra)
    if recipe.momentum_of == "update":
        return recipe.momentum(st, recipe.scaling(inside, st, r, r, t), t)
    if (found := fused.direction(recipe, st, r, t, g)) is not None:
        return found
    numerator, gain = recipe.momentum(st, r, t)
    return recipe.scaling(inside, st, numerator, r, t), gain


def _refresh(chunk: Chunk, algebra: Algebra, due: list[Due], g: Tensor, st: State) -> Derived:
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


def _due(chunk: Chunk) -> Iterator[Due]:
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


def _derive(chunk: Chunk, algebra: Algebra, g: Tensor, st: State, new: Derived) -> None:
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
