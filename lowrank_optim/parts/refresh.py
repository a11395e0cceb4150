"""Fill the slot "when is the basis refitted, and what becomes of the moments?" with schedules."""

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
    """Return by how many steps a staggered schedule refreshes matrix number `place` earlier, below `gap`.

    Multiples of the golden ratio spread any number of matrices evenly.
    """
    return (place * _GOLDEN & 0xFFFFFFFF) * gap >> 32


@dataclass(frozen=True)
class Every(Refresh):
    """A refresh every `gap` steps. A refresh that was impossible (a zero gradient) stays due until it happens.

    Args:
        gap: steps between refreshes.
        moments: "keep" reads the old coordinates as if they were new ones; "rotate" expresses them in the new basis;
            "reset" starts from zero, with a clock that restarts too.
        stagger: False refreshes all matrices together, before steps 0, gap, 2 gap, ... True refreshes each matrix at a
            time of its own, so that no step pays for all of them. Only the first refresh is then common, because there
            is no step without a basis. The times follow multiples of the golden ratio, which spreads any number of
            matrices evenly. They do not change when parameters are added.
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
        """Return the present gap of one matrix, which adaptive schedules keep in their counters."""
        return self.gap

    def carry_(self, algebra: Algebra, recipe: Recipe, st: State, turn: Turn, t: Clock) -> None:
        scaling = (
            recipe.scaling if recipe.scaling_in == "subspace" else None
        )  # in full space it does not depend on the basis
        if self.moments == "reset":
            recipe.momentum.reset_(st)
            if scaling:
                scaling.reset_(st)
        elif self.moments == "rotate":
            # Only an average of gradients is a mean around which the second moment has a variance.
            averages_gradients = recipe.momentum_of == "gradient" and turn.mixes
            mean = recipe.momentum.mean(st, t) if averages_gradients else None
            if scaling:
                scaling.turn_(algebra, st, turn, mean, t)
            recipe.momentum.turn_(st, turn)
            if AGE in st:
                turn.move_(st[AGE])


@dataclass(frozen=True)
class Never(Every):
    """No refresh at all, for full space, which has no basis to refit."""

    gap: int = 1

    def due(self, step: int, last: int, place: int, counters: Mapping[str, Tensor]) -> bool:
        return False


@dataclass(frozen=True)
class Outside(Never):
    """No refresh, but restarts of the moments that code outside of the recipe orders (`engine/restart.py`).

    Args:
        single: True: single entries restart, and each has an age. False: all entries of a parameter restart together,
            on a common clock.
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
    """A gap that grows as soon as the last refreshes have changed the subspace little (Q-GaLore).

    The overlap of whole subspaces measures the change, because it does not depend on signs. The authors' code compares
    the first vectors only, with their signs.

    Args:
        threshold: mean overlap of the last `queue` refreshes from which the gap grows.
        queue: number of refreshes in the mean.
        growth: factor on the gap.
    """

    threshold: float = 0.4
    queue: int = 5
    growth: int = 2

    def counters(self) -> dict[str, Tensor]:
        # -1 marks the places of refreshes that have not happened yet.
        overlaps = torch.full((self.queue,), -1.0, dtype=torch.float32, device="cpu")
        return {"refresh_gap": torch.tensor(self.gap, device="cpu"), "overlaps": overlaps}

    def gap_now(self, counters: Mapping[str, Tensor]) -> int:
        return int(counters["refresh_gap"])

    def note_(self, counters: Mapping[str, Tensor], turn: Turn) -> None:
        overlaps = counters["overlaps"]
        overlaps.copy_(torch.cat([overlaps[1:], turn.overlap().reshape(1).to(overlaps)]))
        if float(overlaps[0]) >= 0 and float(overlaps.mean()) >= self.threshold:
            counters["refresh_gap"].mul_(self.growth)
