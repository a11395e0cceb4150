"""The update under torch.compile: one graph per recipe, shape and memory layout.

`update.move_` depends on the value of no tensor, so it compiles to a graph without breaks. Skipping, refreshing and
opening state depend on values and stay eager. Steps, refreshes and a changing lr make no further graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..recipe.algebra import Algebra
from ..recipe.recipe import Clock, Recipe, State, Update
from .update import MoveArgs, move_

Graph = Callable[..., "Update | None"]


class CompiledMove:
    """A callable like `update.move_` that compiles each distinct update once and keeps its graph.

    Args:
        options: of torch.compile.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.graphs: dict[Any, Graph] = {}

    def __call__(self, args: MoveArgs) -> Update | None:
        recipe, algebra, w, g, r, st, lr, decay, ascend, t, step, note, narrow, _ = args
        # Only a step that refreshed has a note. A graph that contained it would be a second graph, so R is computed
        # here for the note alone.
        if note is not None and g is not None:
            note(g, recipe.basis.down(algebra, g, st))
        lr, t, step = _tensors(w, lr, t, step)
        # A graph holds the recipe, weight decay and signs as constants, and shapes and strides as assumptions. The key
        # consists of exactly these, so a kept graph never has to check or recompile.
        tensors = [w, g, r, t, *(st[key] for key in sorted(st))]
        key = recipe, decay, ascend, narrow, tuple(sorted(st)), tuple(_layout(x) for x in tensors)
        if key not in self.graphs:
            self.graphs[key] = self._compile(recipe, algebra, decay, ascend, narrow)
        return self.graphs[key](w, g, r, dict(st), lr, t, step)

    def _compile(self, recipe: Recipe, algebra: Algebra, decay: float, ascend: bool, narrow: bool) -> Graph:
        """Return a compiled `move_` in which everything but tensors is a constant."""

        def graph(
            w: Tensor, g: Tensor | None, r: Tensor | None, st: State, lr: Tensor, t: Tensor, step: Tensor
        ) -> Update | None:
            return move_(MoveArgs(recipe, algebra, w, g, r, st, lr, decay, ascend, t, step, None, narrow))

        # torch counts graphs per code object and gives up after a few, so each graph gets its own code object.
        graph.__code__ = graph.__code__.replace(co_name=f"update_{len(self.graphs)}")
        # With fullgraph a break is an error, not a slow step. Shapes are constants, since parameters keep theirs.
        return torch.compile(graph, **{"fullgraph": True, "dynamic": False, **self.options})


def _tensors(w: Tensor, *numbers: Clock) -> list[Tensor]:
    """Return numbers as 0-dimensional tensors on the device of `w`; tensors stay as they are."""
    # torch.compile makes another graph for each value of a Python number. One copy brings all of them to the device.
    floats = [x for x in numbers if not isinstance(x, Tensor)]
    real = torch.float32 if w.device.type == "mps" else torch.float64
    moved = iter(torch.tensor(floats, dtype=real, device="cpu").to(w.device, non_blocking=True))
    return [x if isinstance(x, Tensor) else next(moved) for x in numbers]


def _layout(x: Tensor | None) -> Any:
    """Return everything about a tensor that a static graph assumes."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)
