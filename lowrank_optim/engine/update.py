"""One step of a chunk of equal matrices: the lines of `recipe.py`, which are the mathematics of every method.

    G = residual.before(G)       (m, n)  error feedback
    P = basis.fit(G)                     where a refresh is due: `refit_due`
    R = basis.down(G)            (r, n)  coordinates of G in the subspace
    D = scaling(momentum(R))     (r, n)  direction: `_direction`
    U = residual.after(G, R, D)          the update, as a direction, a rest and entries: `_change`
    W = (1 - lr wd) W - lr scale U       `write.py`

`update_` opens the state, refreshes and writes back, which depends on values. `move_` is the arithmetic between, which
does not, so it can be compiled or captured. Nothing here asks which part it holds.
"""

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
    """The arguments of `move_`. Numbers are floats, or tensors on the device of w.

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
    """Take one step of a chunk: update its weights and its state.

    Args:
        move: called in place of `move_`, for example a compiled one.
    """
    recipe, group, narrow = chunk.recipe, chunk.group, chunk.narrow
    st = chunk.open()
    new: Derived = {}
    g = r = None
    if chunk.projected:
        r = chunk.coordinates()
    else:
        # A chunk with device numbers is part of a captured step, whose host half has refreshed it before.
        due = list(due_matrices(chunk)) if chunk.due and chunk.numbers is None else []
        # Between refreshes a thin recipe reads only R of G, so a 16-bit gradient stays as it is: no float32 copy.
        g = recipe.residual.before(chunk.gradient(as_kept=narrow and recipe.thin and not due), st)
        new = refit_due(chunk, algebra, due, g, st) if due else {}
    refreshed = bool(new)
    # The clock is read after the refresh, which may have restarted it. A 16-bit W is never whole in 32 bits: `like`
    # then has its shape and the dtype of the arithmetic, but no memory.
    t, like = chunk.clock(st), chunk.blank() if narrow else chunk.weights()
    w = chunk.weights(as_kept=True) if narrow and recipe.step_size.reads_weights else like
    if recipe.basis.derives:
        derive_(chunk, algebra, like, st, new)
    # Captured energy is a statistic of refreshes, and needs R in the new basis, which `move_` computes anyway.
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
    """Run the arithmetic of one step, from the gradient or its coordinates to the weight.

    No branch depends on the value of a tensor, so it compiles to one graph.

    Returns:
        None after w was updated. With `narrow`, the update that remains to be subtracted from w.
    """
    recipe, algebra, w, g, r, st, lr, decay, ascend, t, step, note, narrow, d = args
    # Some plain rules are one kernel from G to W. Such a kernel neither maximizes nor rounds 16-bit weights.
    if r is None and not narrow and not ascend and fused.step_(recipe, algebra, w, cast(Tensor, g), st, lr, decay, t):
        return None
    change = _change(recipe, algebra, g, r, d, st, t, step, note)
    # Every rule is odd in G, so `maximize` only turns the sign of the length.
    length = recipe.step_size(algebra, lr, w, step) * (-recipe.scale if ascend else recipe.scale)
    if narrow:
        return change.times(length)
    apply_(recipe, w, st, change.times(length), 1 - lr * decay if decay else 1.0)
    return None


def project(chunk: Chunk, algebra: Algebra = WHOLE) -> Tensor:
    """Return R `(r, n)` or `(b, r, n)` of the gradients in the present bases, in its own memory; change nothing."""
    # Only the basis is opened: moments stay closed while micro-batches are accumulated.
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
    """Return what is subtracted from W, up to lr and scale, as an `Update`.

    Args:
        g: the gradient `(m, n)` or `(b, m, n)`; None only for a thin recipe, which reads R alone.
        r: the coordinates `(r, n)` or `(b, r, n)`, or None: they are computed from g.
        d: the direction, like r, or None: it is computed from r.
        t: the clock of the moments.
        step: the number of the step, which is the clock of second moments in full space: no refresh resets them.
    """
    scaling = recipe.scaling
    if r is None:
        g = cast(Tensor, g)
        # Flora over Adafactor divides G by its second moments, and projects the result.
        g = scaling(algebra, st, g, g, step) if recipe.scales_first else g
        r = recipe.basis.down(algebra, g, st)
        if note is not None:
            note(g, r)
    d, gain = (d, 1.0) if d is not None else _direction(recipe, algebra, g, r, st, t)
    change = recipe.residual.after(algebra, recipe, st, cast(Tensor, g), r, d, gain)
    # Subspace-Momentum, and Flora over AdamW, divide the whole update by second moments of G, which outlive refreshes.
    if recipe.scaling_in == "full" and not recipe.scales_first:
        g = cast(Tensor, g)
        # One divisor per column becomes a gain (1, n), so no second tensor (m, n) is made.
        if scaling.per_column(algebra.shape(g)):
            return change.times(scaling.gains(algebra, st, g, step))
        change = Update(None, rest=scaling(algebra, st, change.whole(recipe, st, g), g, step))
    return change


def _direction(
    recipe: Recipe, algebra: Algebra, g: Tensor | None, r: Tensor, st: State, t: Clock
) -> tuple[Tensor, Clock]:
    """Return (D, gain); the direction in the subspace is their product. D is like R: `(r, n)` or `(b, r, n)`."""
    # If second moments are in full space, the average of R is the direction.
    if recipe.scaling_in == "full":
        return recipe.momentum(st, r, t)
    # R has an algebra of its own: where ranks have different rows of G (m, n), each rank has all of R (r, n).
    inside = recipe.basis.inside(algebra)
    # Adafactor scales R first, and averages the result; Adam averages R, and scales the average.
    if recipe.momentum_of == "update":
        return recipe.momentum(st, recipe.scaling(inside, st, r, r, t), t)
    # The table of kernels finds the same direction in fewer passes over memory, if it knows this pair of parts.
    if (found := fused.direction(recipe, st, r, t, g)) is not None:
        return found
    numerator, gain = recipe.momentum(st, r, t)
    return recipe.scaling(inside, st, numerator, r, t), gain
