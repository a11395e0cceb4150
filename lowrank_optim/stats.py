"""Counters of a training run, for any logger. Nothing here is needed to train, and nothing of it is in checkpoints
that is not state anyway."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .parts.limited import HITS
from .plan import Plan

if TYPE_CHECKING:
    from .optimizer import LowRankOptimizer


@dataclass
class Watch:
    """What the engine notes as it goes along. Tensors stay where they are until somebody asks: no synchronisation."""

    refresh_seconds: float = 0.0
    captured: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # by parameter, and by its first matrix

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.refresh_seconds += time.perf_counter() - start

    def note_captured(self, plans: list[Plan], first: int, shares: Tensor) -> None:
        """`shares`: one number per matrix of the chunk."""
        for plan, share in zip(plans, torch.split(shares, [plan.count for plan in plans]), strict=True):
            self.captured.setdefault(plan.name, {})[first] = share


def stats(optimizer: LowRankOptimizer) -> dict[str, float]:
    watch, states = optimizer._watch, [state for state in optimizer.state.values() if state]
    result = {
        "refreshes": _sum(states, "refreshes"),
        "refresh_seconds": watch.refresh_seconds,
        "skipped_gradients": _sum(states, "skipped"),
        "moment_resets": float(sum(_resets(optimizer))),
        "limiter_hits": _sum(states, HITS),
    }
    shares = {name: _mean(list(parts.values())) for name, parts in watch.captured.items()}
    if shares:
        result["captured_energy"] = sum(shares.values()) / len(shares)
    return {**result, **{f"captured_energy/{name}": share for name, share in shares.items()}}


def _sum(states: list[dict[str, Tensor]], key: str) -> float:
    return float(sum(int(state[key].sum()) for state in states if key in state))


def _resets(optimizer: LowRankOptimizer) -> Iterator[int]:
    """Per matrix: the first refresh finds nothing to reset."""
    for p, group in optimizer._members():
        state = optimizer.state.get(p)
        if state and "refreshes" in state and optimizer.recipe(group).refresh.restarts:
            yield int((state["refreshes"] - 1).clamp(min=0).sum())


def _mean(parts: list[Tensor]) -> float:
    return float(sum(float(part.sum()) for part in parts) / sum(part.numel() for part in parts))
