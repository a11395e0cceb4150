"""`capturable=True`: a step in two parts, so that one of them can be a CUDA graph.

The host's part (`prepare`) reads norms, refits bases and counts; the device's part (`update`) waits for nothing, and
reads on the device whatever changes from step to step (`step_numbers.py`). A normal step runs both.
"""

from __future__ import annotations

import math

import torch

from .autograd import full_precision
from .chunk import Chunk
from .device_numbers import Numbers
from .gradients import gradient_norms
from .member import Member
from .refresh import refresh_, refresh_due
from .stepper import Stepper
from .update import update_

Key = tuple[int, ...]  # where the parameters of a chunk are


def capturing() -> bool:
    """Are the operations of this thread being recorded instead of run?"""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Captured:
    """The two halves of a step that can be a CUDA graph.

    Attributes:
        numbers: of each chunk, in device memory that stays the same.
        recorded: the chunks that the last captured graph reads.
    """

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self.numbers: dict[Key, Numbers] = {}
        self.recorded: set[Key] = set()

    def step(self) -> None:
        """Take a normal step, which runs both halves; while a graph is captured, only that of the device."""
        table = self.stepper.table
        if not capturing():
            table.recheck()
        members = table.with_gradients()
        if capturing() or self.prepare(members):
            self.update(members)

    @torch.no_grad()
    def prepare(self, members: list[Member], replay: bool = False) -> bool:
        """Run the host's half of a step; return False where nothing may be updated.

        Args:
            replay: whether a graph will run the half of the device.
        """
        stepper = self.stepper
        stepper.prepare(members)
        norms = gradient_norms([member.grad for member in members])
        bad = [member for member, norm in zip(members, norms, strict=True) if not math.isfinite(norm)]
        if bad:
            stepper.skip(bad)
        if bad or stepper.dry_run(members):
            return False
        chunks = self._chunks(members)
        if replay and self.recorded != chunks.keys():
            raise RuntimeError(_NOT_CAPTURED)
        with full_precision(member.p for member in members):
            for chunk in chunks.values():
                for piece in chunk.pieces() if refresh_due(chunk) else ():
                    refresh_(piece)
                chunk.tell_()
        for member in members:
            member.state["step"] += 1
        return True

    def update(self, members: list[Member]) -> None:
        """Run the half of the device, which a graph can hold."""
        with full_precision(member.p for member in members):
            chunks = self._chunks(members)
            for chunk in chunks.values():
                for piece in chunk.pieces():
                    update_(piece, move=self.stepper.move)
        if capturing():
            self.recorded = set(chunks)

    def _chunks(self, members: list[Member]) -> dict[Key, Chunk]:
        chunks = {}
        for chunk in self.stepper.chunks(members):
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
