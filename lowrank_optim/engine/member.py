"""The unit that a step works on: a parameter together with everything that updates it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..distributed.layout import Layout
from ..recipe.plan import Plan
from ..recipe.recipe import Recipe

RecipeOf = Callable[[Plan, dict[str, Any]], Recipe]


class Member(NamedTuple):
    """One parameter in one step.

    Attributes:
        p: the tensor that is updated: a parameter, its copy or a fragment of it.
        grad: its gradient, like `p`; or, if `projected`, only the coordinates R `(r, n)` or `(b, r, n)`.
        projected: whether `grad` is R already, because it was accumulated or sent as coordinates.
        state: the live state of `p`; an update writes into it.
    """

    p: Tensor
    group: dict[str, Any]
    grad: Tensor
    projected: bool
    plan: Plan
    layout: Layout
    state: dict[str, Tensor]
