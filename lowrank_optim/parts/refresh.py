"""When is the basis refitted, and what becomes of the moments?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..recipe.algebra import Algebra
from ..recipe.recipe import AGE, Clock, Recipe, Refresh, State
from ..recipe.turn import Turn

_GOLDEN = 0x9E3779B9  # the golden ratio in units of 2**-32
Carry = Literal["keep", "rotate", "reset"]


def ahead(place: int, gap: int) -> int:
    """Steps by which turn number `place` of a staggered schedule comes earlier; multiples of the golden ratio spread
    any number of turns evenly."""
    return (place * _GOLDEN & 0xFFFFFFFF) * gap >> 32


@dataclass(frozen=True)
class Every(Refresh):
    """Every `gap` steps. A refresh that could not happen (a zero gradient) stays due until it does.

    Args:
        gap: steps between refreshes.
        moments: `"keep"` reads the old coordinates as if they were new ones, `"rotate"` re-expresses them in the new
            basis, `"reset"` starts from zero with a clock of their own.
        stagger: False: all matrices together, before steps 0, gap, 2 gap, ... True: each at its own time, so that no
            step pays for all of them at once. Only the very first refresh is then common: without a basis there is no
            step. Turns follow multiples of the golden ratio, which spreads any number of matrices evenly and does not
            move when parameters are added.
    """

    gap: int
    moments: Carry = "keep"
    stagger: bool = False

    @property
    def restarts(self) -> bool:
        return self.moments == "reset"

    @property
    def turns(self) -> bool:
        return self.moments == "rotate"

    def due(self, step: int, last: int, place: int, counters: Mapping[str, Tensor]) -> bool:
        gap = self.gap_now(counters)
        shift = ahead(place, gap) if self.stagger else 0
        return last < 0 or (step + shift) // gap > (last + shift) // gap

    def gap_now(self, counters: Mapping[str, Tensor]) -> int:
        return self.gap

    def carry_(self, algebra: Algebra, recipe: Recipe, st: State, turn: Turn, t: Clock) -> None:
        scaling = recipe.scaling if recipe.scaling_in == "subspace" else None  # in full space it knows no basis
        if self.moments == "reset":
            recipe.momentum.reset_(st)
            if scaling:
                scaling.reset_(st)
        elif self.moments == "rotate":
            averages_gradients = recipe.momentum_of == "gradient" and turn.mixes
            mean = recipe.momentum.mean(st, t) if averages_gradients else None
            if scaling:
                scaling.turn_(algebra, st, turn, mean, t)
            recipe.momentum.turn_(st, turn)
            if AGE in st:
                turn.move_(st[AGE])


@dataclass(frozen=True)
class Never(Every):
    """For full space, where nothing is ever refitted."""

    gap: int = 1

    def due(self, step: int, last: int, place: int, counters: Mapping[str, Tensor]) -> bool:
        return False


@dataclass(frozen=True)
class Outside(Never):
    """Nothing is refitted, but moments begin anew when somebody outside the recipe says so (`restart.py`).

    Args:
        single: entries begin anew one by one, and each has an age; else all of a parameter do, on a common clock.
    """

    single: bool = False

    @property
    def restarts(self) -> bool:
        return not self.single

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        return self.single


@dataclass(frozen=True)
class Lazy(Every):
    """Twice as seldom (`growth`), as soon as the last `queue` refreshes changed little (Q-GaLore).

    Change is measured by the overlap of whole subspaces, which has no sign to be lost: the authors' code compares the
    first vectors alone, with their signs.

    Args:
        threshold: mean overlap of the last refreshes from which the gap grows.
    """

    threshold: float = 0.4
    queue: int = 5
    growth: int = 2

    def counters(self) -> dict[str, Tensor]:
        overlaps = torch.full((self.queue,), -1.0, dtype=torch.float32, device="cpu")
        return {"refresh_gap": torch.tensor(self.gap, device="cpu"), "overlaps": overlaps}

    def gap_now(self, counters: Mapping[str, Tensor]) -> int:
        return int(counters["refresh_gap"])

    def note_(self, counters: Mapping[str, Tensor], turn: Turn) -> None:
        overlaps = counters["overlaps"]
        overlaps.copy_(torch.cat([overlaps[1:], turn.overlap().reshape(1).to(overlaps)]))
        if float(overlaps[0]) >= 0 and float(overlaps.mean()) >= self.threshold:
            counters["refresh_gap"].mul_(self.growth)
