"""The lengths of gradients that are used one by one: what each is multiplied by, and the norm of all in the end."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..engine.member import Member

_TINY = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@dataclass
class Clipping:
    """Of one step.

    Args:
        clip_norm: the largest norm of each gradient; None: no clipping.
        norm_before: of all gradients of the step before, where that is to clip all of these.
        inverse_scale: what takes the scale of the losses out of gradients; projected ones are without it already.
    """

    clip_norm: float | None = None
    norm_before: float | None = None
    inverse_scale: float = 1.0
    overflow = False  # some gradient was not finite
    partial = False  # some gradients were only known projected, so their norm is not
    squares = 0.0

    def factor(self, member: Member, norm: float) -> float:
        """What a gradient of this norm is to be multiplied by."""
        unscale = 1.0 if member.projected else self.inverse_scale
        norm *= unscale
        if not math.isfinite(norm):
            self.overflow = True
            return 1.0
        self.squares += norm**2
        return unscale * min(1.0, self._ratio(norm), self._ratio(self.norm_before))

    @property
    def norm(self) -> float | None:
        """Of all finite gradients so far, before clipping."""
        return None if self.partial else math.sqrt(self.squares)

    def _ratio(self, norm: float | None) -> float:
        return math.inf if self.clip_norm is None or norm is None else self.clip_norm / (norm + _TINY)
