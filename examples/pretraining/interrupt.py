"""SIGINT and SIGTERM as a question that the training loop asks between two steps."""

from __future__ import annotations

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Remembers the first stop signal; also stops when the process that started this one is gone.

    A second signal changes nothing: Ctrl-C reaches the child twice, once from the terminal and once from its parent.
    """

    def __init__(self, parent: int | None = None) -> None:
        self.signal: int | None = None
        self._parent = parent

    def install(self) -> Interrupt:
        for number in SIGNALS:
            signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number

    @property
    def requested(self) -> bool:
        if self._parent is not None and os.getppid() != self._parent:
            self.signal = self.signal or signal.SIGTERM
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + signal number, the shell's convention: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGTERM)
