"""One step of equal matrices: the lines of `recipe.py`, run on a chunk. Nothing here asks which part it holds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

from torch import Tensor

from ..recipe.algebra import WHOLE, Algebra
from ..recipe.recipe import Clock, Recipe, State, Update
from . import fused
from .chunk import Chunk
from .refresh import Derived, Note, derive_, due_matrices, note_captured, refit_due
from .write import apply_, apply_narrow_


class MoveArgs(NamedTuple):
    """What `move_` reads and writes. Numbers are floats, or tensors on the device of w.

    Attributes:
        w: the weight `(m, n)` or `(b, m, n)`, turned so that the projected side comes first; updated in place, unless
            `narrow`.
        g: the gradient like w; None where only r is known.
        r: the coordinates `(r, n)` where they are known already, or None.
        st: the state of the matrices, by name.
        decay: the weight decay, to be multiplied by lr.
        ascend: whether to maximize. Every rule is odd in G, so the sign of the step is turned.
        t: how many steps the moments have seen, this one included.
        step: the number of this step: 1, 2, ...
        note: takes G and R after a refresh, or None.
        narrow: w is stored in 16 bits, and is not written here.
        d: the direction `(r, n)` where a kernel for lists has found it already.
    """

    recipe: Recipe
    algebra: Algebra
    w: Tensor
    g: Tensor | None
    r: Tensor | None
    st: State
    lr: Clock
    decay: float
    ascend: bool
    t: Clock
    step: Clock
    note: Note | None = None
    narrow: bool = False
    d: Tensor | None = None


Move = Callable[[MoveArgs], "Update | None"]


def update_(chunk: Chunk, algebra: Algebra = WHOLE, move: Move | None = None) -> None:
    """Take one step of a chunk: its weights and its state.

    Args:
        move: replaces `move_`, or None.
    """
    recipe, group, narrow = chunk.recipe, chunk.group, chunk.narrow
    st = chunk.open()
    new: Derived = {}
    g = r = None
    if chunk.projected:
        r = chunk.coordinates()
    else:
        # A chunk with numbers on the device is part of a captured graph, and was refreshed before.
        due = list(due_matrices(chunk)) if chunk.due and chunk.numbers is None else []
        g = recipe.residual.before(chunk.gradient(as_kept=narrow and recipe.thin and not due), st)
        new = refit_due(chunk, algebra, due, g, st) if due else {}
    refreshed = bool(new)
    # In 16 bits, W is never whole in 32: `like` then has the shape and dtype of the arithmetic, and no memory.
    t, like = chunk.clock(st), chunk.blank() if narrow else chunk.weights()
    w = chunk.weights(as_kept=True) if narrow and recipe.step_size.reads_weights else like
    if recipe.basis.derives:
        derive_(chunk, algebra, like, st, new)
    note = functools.partial(note_captured, chunk, algebra) if refreshed and recipe.basis.orthonormal else None
    lr, decay, ascend = chunk.lr, group["weight_decay"], group["maximize"]
    args = MoveArgs(recipe, algebra, w, g, r, st, lr, decay, ascend, t, chunk.now, note, narrow)
    change = move_(args) if move is None else move(args)
    if change is None:
        chunk.write_weights(w)
    else:
        apply_narrow_(recipe, chunk, like, st, change, 1 - lr * decay if decay else 1.0)
    chunk.leave_()
    chunk.close(st, refreshed)


def move_(args: MoveArgs) -> Update | None:
    """Run the arithmetic of one step. Nothing here depends on the values of tensors, so it compiles to one graph.

    Returns:
        None after w was updated; with `narrow` what remains to be subtracted from w.
    """
    recipe, algebra, w, g, r, st, lr, decay, ascend, t, step, note, narrow, d = args
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
    derive_(chunk, algebra, chunk.blank(), st, {})
    return chunk.recipe.basis.down(algebra, g, st)


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
