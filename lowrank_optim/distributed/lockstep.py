"""Tasks that run one at a time, each until it has something to send; what all of them have is then sent together.

A step of a sharded model needs a few thin sums per matrix, and a collective costs more by being one than by its bytes.
Parts ask for a sum in the middle of their work and know of nothing else, so that work has to stop there, and to go on
when the sum is complete. Each task therefore has a thread of its own, and only one of them runs at any time: the order
of all work, and with it the order of collectives, is the same on every rank. Collectives are entered by the thread that
called `together`, never by a task's.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Work = Callable[[], None]
_this = threading.local()  # its `lockstep`: the one that a thread works for


class Peers(NamedTuple):
    """Those who add up: a process group, and the device on which it can, or only its type: the current one."""

    group: dist.ProcessGroup
    device: str


@dataclass
class _Letter:
    """What a task wants to have added up."""

    x: Tensor
    op: dist.ReduceOp.RedOpType
    peers: Peers
    answered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


@dataclass
class _Family:
    """Tasks that another one has begun, and waits for."""

    left: int
    done: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


class _Abandoned(BaseException):
    """Ends a task whose sums will never come, because another one has failed."""


def ranks() -> tuple[int, int]:
    """(number of this process, how many there are); (0, 1) without torch.distributed."""
    known = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if known else (0, 1)


def total(x: Tensor, peers: Peers, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum of `x` over all ranks of a group (or what `op` says), row-major and in memory of its own.

    Within `together` it is sent along with those of the other tasks.
    """
    letter, lockstep = _Letter(x, op, peers), getattr(_this, "lockstep", None)
    if lockstep is None:
        _send([letter])
    else:
        lockstep.post(letter)
    return letter.x


def together(works: Sequence[Work]) -> None:
    """Does all of the works, in this order as far as they wait for nothing; the first error ends them all.

    It may be called within one of them, whose own letters then wait for those of the new ones.
    """
    lockstep = getattr(_this, "lockstep", None)
    if len(works) == 1:
        works[0]()
    elif lockstep is not None:
        lockstep.begin(works)
    elif works:
        _Lockstep().run(works)


class _Lockstep:
    """One call of `together`. All that is here is touched by the one thread that runs."""

    def __init__(self) -> None:
        self._fresh: deque[tuple[Work, _Family | None]] = deque()
        self._letters: list[_Letter] = []
        self._woken: deque[threading.Semaphore] = deque()
        self._asleep: set[threading.Semaphore] = set()
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Semaphore(0)  # released by a thread that stops, for the one that called
        self._error: BaseException | None = None
        self._over = False
        # what belongs to a thread, and is to be the caller's in all of them
        self._inference, self._grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        used = torch.accelerator.is_available() and torch.get_device_module().is_initialized()
        self._stream: Any = torch.accelerator.current_stream() if used else None

    # -- the thread that called ----------------------------------------------------------------------------------------

    def run(self, works: Sequence[Work]) -> None:
        self._fresh.extend((work, None) for work in works)
        try:
            while self._woken or self._fresh or self._letters:
                if self._woken:
                    self._woken.popleft().release()
                elif self._fresh:
                    self._threads.append(threading.Thread(target=self._work, daemon=True))
                    self._threads[-1].start()
                else:
                    self._deliver()
                    continue
                self._stopped.acquire()
                if self._error is not None:
                    raise self._error
        finally:
            self._over = True
            for sleeper in list(self._asleep):
                sleeper.release()
            for thread in self._threads:
                thread.join()

    def _deliver(self) -> None:
        """One collective for all letters of a kind, in the order in which they were posted."""
        letters, self._letters = self._letters, []
        kinds: dict[Any, list[_Letter]] = {}
        for letter in letters:
            kinds.setdefault((letter.op, letter.peers, letter.x.dtype, letter.x.device), []).append(letter)
        for some in kinds.values():
            _send(some)
        self._woken.extend(letter.answered for letter in letters)

    # -- the threads of the tasks --------------------------------------------------------------------------------------

    def post(self, letter: _Letter) -> None:
        self._letters.append(letter)
        self._sleep(letter.answered)

    def begin(self, works: Sequence[Work]) -> None:
        if works:
            family = _Family(len(works))
            self._fresh.extend((work, family) for work in works)
            self._sleep(family.done)

    def _sleep(self, until: threading.Semaphore) -> None:
        if self._over:
            raise _Abandoned
        self._asleep.add(until)
        self._stopped.release()
        until.acquire()
        self._asleep.discard(until)
        if self._over:
            raise _Abandoned

    def _work(self) -> None:
        """A thread takes one task after the other: as many of them as wait at once have one each, and no more."""
        _this.lockstep = self
        if self._stream is not None:
            torch.accelerator.set_stream(self._stream)  # and its device
        with suppress(_Abandoned), torch.inference_mode(self._inference), torch.set_grad_enabled(self._grad):
            while self._fresh and self._error is None:
                self._do(*self._fresh.popleft())
        self._stopped.release()

    def _do(self, work: Work, family: _Family | None) -> None:
        try:
            work()
        except Exception as error:
            self._error = self._error or error
        if family is not None:
            family.left -= 1
            if not family.left:
                self._woken.append(family.done)


def _send(letters: Sequence[_Letter]) -> None:
    """One collective for letters of one kind.

    The buffer is new and row-major: collectives add up memory, and LAPACK, say, returns column-major tensors.
    """
    op, peers, example = letters[0].op, letters[0].peers, letters[0].x
    flat = torch.cat([letter.x.reshape(-1) for letter in letters])
    if flat.device.type != torch.device(peers.device).type:  # "cuda" alone need not be the GPU of x
        flat = flat.to(peers.device)
    dist.all_reduce(flat, op, group=peers.group)
    parts = torch.split(flat.to(example.device), [letter.x.numel() for letter in letters])
    for letter, part in zip(letters, parts, strict=True):
        letter.x = part.view(letter.x.shape)
