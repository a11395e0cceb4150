"""Declare what an optimizer class says about its method. `engine/table.py` asks nothing else of the class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from .plan import Plan
from .recipe import Recipe


class Method(Protocol):
    """The rule of one paper, as the engine sees it. `LowRankOptimizer` implements it and documents each default."""

    rule: str  # the method in full space, "AdamW" for example
    ranked: bool  # False: matrices are updated whole, so `rank` is not a choice
    choices: Mapping[str, tuple[str, ...]]  # options whose values are this method's own
    fixed: tuple[str, ...]  # options that cannot be edited once there is state
    irreplaceable: str  # why no other tensor may be updated in place of a parameter, or ""
    unpartitionable: str  # why every process needs whole parameters, or ""
    defaults: dict[str, Any]

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """Return the recipe of projected matrices, with the numbers of this group."""

    def plain(self, group: dict[str, Any]) -> Recipe:
        """Return the recipe of parameters that are not projected."""

    def refuse(self, plan: Plan, group: dict[str, Any]) -> None:
        """Raise a ValueError for a projected matrix that the method cannot update."""

    def refuse_group(self, group: dict[str, Any]) -> None:
        """Raise an error for options of a group that are out of range or mean nothing together."""

    def refuse_shard(self, plan: Plan, group: dict[str, Any]) -> None:
        """Raise a NotImplementedError for a sharded parameter that the method cannot update."""

    def refuse_nothing(self, reasons: list[tuple[str, str]]) -> None:
        """Raise a ValueError if nothing is low-rank. `reasons`: (name, why it is not projected, or "")."""

    def ways(self, group: dict[str, Any]) -> dict[str, bool]:
        """Return the ways of running a step that need whole parameters, and whether each is in use."""
