"""The one slot for another way to take a step: step in backward, `ddp_project`."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class StepMode(Protocol):
    """A way to take a step that replaces `Stepper.step`. It lives in `Stepper.mode`, and copies do not inherit it.

    Attributes:
        name: of the function that starts the mode, for messages.
        amp_by_itself: a GradScaler calls `optimizer.step()` without looking for gradients first, because backward has
            already used some of them.
        expects_overflow: non-finite gradients are no surprise, since a GradScaler is still searching for its scale.
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
