"""When is the basis refitted, and what becomes of the moments?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..distributed.algebra import Algebra
from ..recipe import Clock, Recipe, State, Turn

_GOLDEN = 0x9E3779B9  # the golden ratio in units of 2**-32
Carry = Literal["keep", "rotate", "reset"]


@dataclass(frozen=True)
class Every:
    """All matrices together, every `gap` steps: before steps 0, gap, 2 gap, ...

    A refresh that could not happen (a zero gradient) stays due until it does.

    Args:
        gap: steps between refreshes.
        moments: `"keep"` reads the old coordinates as if they were new ones, `"rotate"` re-expresses them in the new
            basis, `"reset"` starts from zero with a clock of their own.
    """

    gap: int
    moments: Carry = "keep"

    @property
    def restarts(self) -> bool:
        return self.moments == "reset"

    def due(self, step: int, last: int, place: int) -> bool:
        return last < 0 or step // self.gap > last // self.gap

    def carry_(self, algebra: Algebra, recipe: Recipe, st: State, turn: Turn, t: Clock) -> None:
        if self.moments == "reset":
            recipe.momentum.reset_(st)
            recipe.scaling.reset_(st)
        elif self.moments == "rotate":
            averages_gradients = recipe.momentum_of == "gradient"
            mean = recipe.momentum.mean(st, t) if averages_gradients else None
            recipe.scaling.turn_(algebra, st, turn, mean, t)
            recipe.momentum.turn_(st, turn)


@dataclass(frozen=True)
class Staggered(Every):
    """Each matrix every `gap` steps, but at its own time, so that no step pays for all of them at once.

    Only the very first refresh is common: without a basis there is no step. Turns follow multiples of the golden ratio,
    which spreads any number of matrices evenly and does not move when parameters are added.
    """

    def due(self, step: int, last: int, place: int) -> bool:
        shift = (place * _GOLDEN & 0xFFFFFFFF) * self.gap >> 32
        return last < 0 or (step + shift) // self.gap > (last + shift) // self.gap
