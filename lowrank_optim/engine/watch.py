"""Counters that the engine keeps while it runs."""

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
    """What the engine notes as it goes along. Tensors stay where they are until somebody asks: no synchronisation."""

    refresh_seconds: float = 0.0
    captured: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # by parameter, and by its first matrix
    _open: int = 0
    _start: float = 0.0

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        """Around the work of a refresh; several may overlap, and are timed as one."""
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
        """`shares`: one number per matrix of the chunk."""
        for plan, share in zip(plans, torch.split(shares, [plan.count for plan in plans]), strict=True):
            self.captured.setdefault(plan.name, {})[first] = share
