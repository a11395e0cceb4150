"""`capturable=True`: a step in two parts, so that one of them can be a CUDA graph.

The host's part (`prepare`) reads norms, refits bases and counts; the device's part (`update`) waits for nothing, and
reads on the device whatever changes from step to step (`step_numbers.py`). A normal step runs both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .autograd import full_precision
from .chunk import Chunk
from .device_numbers import Numbers
from .gradients import gradient_norms
from .grouping import Asked
from .member import Member
from .refresh import refresh_, refresh_due
from .update import update_

if TYPE_CHECKING:
    from ..optimizer import LowRankOptimizer

Key = tuple[int, ...]  # where the parameters of a chunk are


def capturing() -> bool:
    """Are the operations of this thread being recorded instead of run?"""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Captured:
    """The two parts of a step of one optimizer."""

    def __init__(self, optimizer: LowRankOptimizer) -> None:
        self.optimizer = optimizer
        self.numbers: dict[Key, Numbers] = {}
        self.recorded: set[Key] = set()  # what the last captured graph reads

    @torch.no_grad()
    def prepare(self, members: list[Member], replay: bool = False) -> bool:
        """False where nothing may be updated. `replay`: a graph will do the device's part."""
        optimizer = self.optimizer
        optimizer._prepare(members)
        norms = gradient_norms([one.grad for one in members])
        bad = [one for one, norm in zip(members, norms, strict=True) if not math.isfinite(norm)]
        if bad:
            optimizer._skip(bad)
        if bad or optimizer._dry_run(members):
            return False
        chunks = self._chunks(members)
        if replay and self.recorded != chunks.keys():
            raise RuntimeError(_NOT_CAPTURED)
        with full_precision(one.p for one in members):
            for chunk in chunks.values():
                for piece in chunk.pieces() if refresh_due(chunk) else ():
                    refresh_(piece)
                chunk.tell_()
        for one in members:
            one.state["step"] += 1
        return True

    def update(self, members: list[Member]) -> None:
        """Only work for the device."""
        with full_precision(one.p for one in members):
            chunks = self._chunks(members)
            for chunk in chunks.values():
                for piece in chunk.pieces():
                    update_(piece, move=self.optimizer._move)
        if capturing():
            self.recorded = set(chunks)

    def _chunks(self, members: list[Member]) -> dict[Key, Chunk]:
        chunks = {}
        for chunk in self.optimizer._chunks(members, Asked()):
            key = tuple(p.data_ptr() for p in chunk.params)
            if key not in self.numbers:
                count = sum(plan.count for plan in chunk.plans)
                self.numbers[key] = Numbers.zeros(count, chunk.restarts, chunk.params[0].device, chunk.working)
            chunk.numbers = self.numbers[key]
            chunks[key] = chunk
        return chunks


_NOT_CAPTURED = (
    "prepare() goes before the replay of a graph in which optimizer.step() was captured, and there is none, or other "
    "parameters have gradients now than then; nothing was updated. Take a normal step, and capture optimizer.step()"
)
