"""Counters that the engine keeps while it runs, and that `optimizer.stats()` reads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..recipe.plan import Plan


@dataclass
class Watch:
    """The counters of one optimizer. They are in no checkpoint.

    Attributes:
        refresh_seconds: wall time of the host in refreshes.
        captured: the share of the gradient's energy that each subspace captured at its last refresh, by the name of the
            parameter and the number of its first matrix in the refreshed piece.
    """

    refresh_seconds: float = 0.0
    # Shares stay on the device where they were computed until `stats()` reads them, so a step does not synchronize.
    captured: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    # Under lockstep the refreshes of several chunks overlap. They are timed as one interval, from the first entry to
    # the last exit.
    _open: int = 0
    _start: float = 0.0

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        """Time the refreshes that run inside this context; contexts that overlap are timed as one."""
        if not self._open:
            self._start = time.perf_counter()
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self.refresh_seconds += time.perf_counter() - self._start

    def note_captured(self, plans: list[Plan], first: int, shares: Tensor) -> None:
        """Store the captured shares `(b,)` of a chunk, which has one number per matrix."""
        for plan, share in zip(plans, torch.split(shares, [plan.count for plan in plans]), strict=True):
            self.captured.setdefault(plan.name, {})[first] = share
