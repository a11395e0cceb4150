"""The one slot for another way to take a step: `step_in_backward` or `ddp_project`.

The optimizer sees only this protocol. The modes implement it from a layer above, so neither imports the other, and two
modes at once are impossible.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class StepMode(Protocol):
    """A way to take a step that replaces `Stepper.step`. It is kept in `Stepper.mode`, and copies do not inherit it.

    Attributes:
        name: the function that starts the mode, for messages.
        amp_by_itself: whether a GradScaler calls `optimizer.step()` without a search for gradients, because backward
            has already used some of them.
        expects_overflow: whether a non-finite gradient is no surprise, since a GradScaler still searches for its scale.
    """

    name: str
    amp_by_itself: bool

    @property
    def expects_overflow(self) -> bool: ...

    def finish(self) -> None:
        """Finish the step; `optimizer.step()` calls this in place of the usual step."""

    def forget(self) -> None:
        """Drop everything gathered since the last step; `optimizer.zero_grad()` calls this."""

    def attach(self, group: dict[str, Any]) -> None:
        """Serve a param group that was added."""

    def sent(self, p: Tensor) -> tuple[float | None, float | None] | None:
        """Return the bytes sent for a parameter per step and per refresh, or None if the layout knows them."""

    def note(self) -> str:
        """Return the remark below the table of `report()`."""
