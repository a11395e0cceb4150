"""`capturable=True`: a step in two halves, of which the second can be a CUDA graph.

A graph can neither branch nor read a value back to the host. The host half (`prepare`) therefore does everything that
depends on values: it reads norms, refits bases and counts steps. The device half (`update`) waits for nothing. It reads
all numbers that change from step to step in device memory (`device_numbers.py`). A normal step runs both halves.
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

Key = tuple[int, ...]  # addresses of the parameters of a chunk


def capturing() -> bool:
    """Whether the current stream records a CUDA graph, so that operations are captured instead of run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Captured:
    """The two halves of a step, for one optimizer.

    Attributes:
        numbers: the device numbers of each chunk. Their memory never changes, because graphs contain its addresses.
        recorded: the chunks that the last captured graph updates.
    """

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self.numbers: dict[Key, Numbers] = {}
        self.recorded: set[Key] = set()

    def step(self) -> None:
        """Take a normal step, which runs both halves. While a graph is captured, run the device half alone."""
        table = self.stepper.table
        # The host half reads norms, and waiting for the device is forbidden during a capture.
        if not capturing():
            table.recheck()
        members = table.with_gradients()
        if capturing() or self.prepare(members):
            self.update(members)

    @torch.no_grad()
    def prepare(self, members: list[Member], replay: bool = False) -> bool:
        """Run the host half of a step. Return False if nothing may be updated.

        Args:
            replay: whether a graph will run the device half. It must then update the chunks of the present gradients.
        """
        stepper = self.stepper
        stepper.prepare(members)
        norms = gradient_norms([member.grad for member in members])
        # A graph cannot leave one parameter out, so a single non-finite gradient stops the whole step.
        bad = [member for member, norm in zip(members, norms, strict=True) if not math.isfinite(norm)]
        if bad:
            stepper.skip(bad)
        if bad or stepper.dry_run(members):
            return False
        chunks = self._chunks(members)
        # The graph must update exactly those parameters that have a gradient now.
        if replay and self.recorded != chunks.keys():
            raise RuntimeError(_NOT_CAPTURED)
        with full_precision(member.p for member in members):
            # Refreshes come first: they advance the counts that `tell_` then copies to the device.
            for chunk in chunks.values():
                for piece in chunk.pieces() if refresh_due(chunk) else ():
                    refresh_(piece)
                chunk.tell_()
        # Only now, since the chunks above took `state["step"] + 1` as the number of this step.
        for member in members:
            member.state["step"] += 1
        return True

    def update(self, members: list[Member]) -> None:
        """Run the device half of a step, which a graph can contain."""
        with full_precision(member.p for member in members):
            # The host has counted this step already. These chunks do not use that count: they read step and clocks from
            # their device numbers, and refit no basis.
            chunks = self._chunks(members)
            for chunk in chunks.values():
                for piece in chunk.pieces():
                    update_(piece, move=self.stepper.move)
        if capturing():
            self.recorded = set(chunks)

    def _chunks(self, members: list[Member]) -> dict[Key, Chunk]:
        """Return the chunks of the members, each with its device numbers, which are created with the first chunk."""
        chunks = {}
        for chunk in self.stepper.chunks(members):
            # A graph reads addresses, so a chunk is identified by those of its parameters, not by their names.
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
