"""Clipping of gradients that are used one at a time: the factor of each gradient, and the norm of all at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..engine.member import Member

_TINY = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@dataclass
class Clipping:
    """The clipping of one step.

    Args:
        clip_norm: the largest norm of each gradient; None: no clipping.
        norm_before: the norm of all gradients of the previous step, by which delayed clipping clips every gradient.
        inverse_scale: the factor that removes the scale of the losses. Projected gradients are unscaled already.

    Attributes:
        overflow: whether a gradient was not finite.
        partial: whether gradients were accumulated projected, so that their norm is unknown.
        squares: the sum of squares of all finite gradients so far.
    """

    clip_norm: float | None = None
    norm_before: float | None = None
    inverse_scale: float = 1.0
    overflow = False
    partial = False
    squares = 0.0

    def factor(self, member: Member, norm: float) -> float:
        """Return the number by which the gradient of a member must be multiplied, given its norm before unscaling."""
        unscale = 1.0 if member.projected else self.inverse_scale
        norm *= unscale
        if not math.isfinite(norm):
            self.overflow = True
            return 1.0
        self.squares += norm**2
        return unscale * min(1.0, self._ratio(norm), self._ratio(self.norm_before))

    @property
    def norm(self) -> float | None:
        """Return the norm of all finite gradients so far, before clipping, or None if it is unknown."""
        return None if self.partial else math.sqrt(self.squares)

    def _ratio(self, norm: float | None) -> float:
        """Return the factor that brings a norm down to `clip_norm`, infinity without a limit."""
        return math.inf if self.clip_norm is None or norm is None else self.clip_norm / (norm + _TINY)
