"""The update, compiled: one graph per recipe, shape and layout, which never compiles again from step to step."""

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
    """`update.move_`, with the same arguments, in graphs that torch.compile makes and this keeps."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.graphs: dict[Any, Graph] = {}

    def __call__(self, args: MoveArgs) -> Update | None:
        recipe, algebra, w, g, r, st, lr, decay, ascend, t, step, note, narrow, _ = args
        if note is not None and g is not None:
            note(g, recipe.basis.down(algebra, g, st))  # outside of the graph, which a refresh must not change
        lr, t, step = _tensors(w, lr, t, step)
        tensors = [w, g, r, t, *(st[key] for key in sorted(st))]
        key = recipe, decay, ascend, narrow, tuple(sorted(st)), tuple(_layout(x) for x in tensors)
        if key not in self.graphs:
            self.graphs[key] = self._compile(recipe, algebra, decay, ascend, narrow)
        return self.graphs[key](w, g, r, dict(st), lr, t, step)

    def _compile(self, recipe: Recipe, algebra: Algebra, decay: float, ascend: bool, narrow: bool) -> Graph:
        """Return a graph of `move_` in which everything but tensors is a constant."""

        def graph(
            w: Tensor, g: Tensor | None, r: Tensor | None, st: State, lr: Tensor, t: Tensor, step: Tensor
        ) -> Update | None:
            return move_(MoveArgs(recipe, algebra, w, g, r, st, lr, decay, ascend, t, step, None, narrow))

        # torch counts graphs per code object and gives up after a few, so each graph gets a code object of its own.
        graph.__code__ = graph.__code__.replace(co_name=f"update_{len(self.graphs)}")
        return torch.compile(graph, **{"fullgraph": True, "dynamic": False, **self.options})


def _tensors(w: Tensor, *numbers: Clock) -> list[Tensor]:
    """Numbers as tensors, in one copy to the device: a graph would be made anew for each value of a number."""
    plain = [x for x in numbers if not isinstance(x, Tensor)]
    real = torch.float32 if w.device.type == "mps" else torch.float64
    moved = iter(torch.tensor(plain, dtype=real, device="cpu").to(w.device, non_blocking=True))
    return [x if isinstance(x, Tensor) else next(moved) for x in numbers]


def _layout(x: Tensor | None) -> Any:
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)
