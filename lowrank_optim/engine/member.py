"""A parameter in one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..distributed.layout import Layout
from ..recipe.plan import Plan
from ..recipe.recipe import Recipe

RecipeOf = Callable[[Plan, dict[str, Any]], Recipe]


class Member(NamedTuple):
    """A parameter in one step, with all that is known of it.

    Attributes:
        grad: whole and shaped like the parameter, or where it is `projected` only the coordinates R of it.
    """

    p: Tensor
    group: dict[str, Any]
    grad: Tensor
    projected: bool
    plan: Plan
    layout: Layout
    state: dict[str, Tensor]
