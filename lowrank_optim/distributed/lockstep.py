"""Run tasks one at a time, each until it needs a sum over ranks, and send the sums of all tasks together.

A step of a sharded model needs a few thin sums per matrix. A collective has a fixed cost that exceeds the cost of these
few bytes, so the sums of all matrices should share one collective.

**Why threads.** A part asks for a sum in the middle of its work (`total` returns the finished sum) and knows nothing of
other matrices. Its function must therefore stop at that line and continue when the sum is complete. A generator could
stop only if every function between the part and `total` were a generator, too. A thread can stop anywhere.

**Why only one runs at a time.** All ranks must enter the same collectives in the same order. With one running thread,
and hand-overs at fixed places only, the order of all work depends on nothing but the list of tasks. Collectives are
entered by the thread that called `together`, never by the thread of a task.

**An example.** Two matrices A and B need two sums each, and the second sum depends on the first. Time runs downwards::

    caller                          thread 1 (A)              thread 2 (B)
    start thread 1, wait            total(a1): post, sleep
    start thread 2, wait                                      total(b1): post, sleep
    all_reduce(a1 and b1)
    wake thread 1, wait             total(a2): post, sleep
    wake thread 2, wait                                       total(b2): post, sleep
    all_reduce(a2 and b2)
    wake thread 1, wait             finish A, end
    wake thread 2, wait                                       finish B, end

Four sums have cost two collectives. With any number of matrices of one dtype and device it is still two.
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
_this = threading.local()  # attribute `lockstep`: the `_Lockstep` that the current thread is a task of, if any


class Peers(NamedTuple):
    """The processes that add up a tensor together.

    Attributes:
        group: their process group.
        device: where the group's backend works, such as "cpu". A type without an index, such as "cuda", means the
            current device of that type.
    """

    group: dist.ProcessGroup
    device: str


@dataclass
class _Letter:
    """A request of one task: add up `x` over `peers`. The answer replaces `x`."""

    x: Tensor
    op: dist.ReduceOp.RedOpType
    peers: Peers
    answered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


@dataclass
class _Family:
    """The tasks of a nested call of `together`, which the calling task waits for. `left` of them have not ended."""

    left: int
    done: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


class _Abandoned(BaseException):
    """The exception that ends a sleeping task after another task has failed: its sums will never be sent.

    It is no `Exception`, so that no handler in a part takes it for an error of its own.
    """


def ranks() -> tuple[int, int]:
    """Return (rank of this process, number of processes); (0, 1) without torch.distributed."""
    known = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if known else (0, 1)


def total(x: Tensor, peers: Peers, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Return the sum of `x` over all ranks of a group, row-major and in new memory. All ranks of the group call it.

    Inside `together` the calling task sleeps, and the sum is sent in one collective with the sums of the other tasks.

    Args:
        x: any shape, the same on all ranks.
        peers: the processes that have a summand.
        op: another reduction, such as the maximum.
    """
    letter, lockstep = _Letter(x, op, peers), getattr(_this, "lockstep", None)
    if lockstep is None:
        _send([letter])
    else:
        lockstep.post(letter)
    return letter.x


def together(works: Sequence[Work]) -> None:
    """Run all works, started in the given order, with their sums sent together. Return when all have ended.

    The first error ends all works and is raised here. A work may call `together` itself: it then sleeps until the
    nested works have ended, and their sums are sent with those of the outer works.
    """
    # The same call serves code inside and outside of tasks: the thread says which scheduler, if any, it works for.
    lockstep = getattr(_this, "lockstep", None)
    if len(works) == 1:
        # A single work needs no thread of its own. Inside a task its sums still join those of the other tasks.
        works[0]()
    elif lockstep is not None:
        lockstep.begin(works)
    elif works:
        _Lockstep().run(works)


class _Lockstep:
    """The scheduler of one outermost call of `together`.

    Only the thread that runs at the moment reads or writes its attributes, so they need no lock.
    """

    def __init__(self) -> None:
        # The three queues of `run`: tasks without a thread, posted sums, and threads that may continue.
        self._fresh: deque[tuple[Work, _Family | None]] = deque()
        self._letters: list[_Letter] = []
        self._woken: deque[threading.Semaphore] = deque()
        self._asleep: set[threading.Semaphore] = set()
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Semaphore(0)  # a task's thread releases it when it sleeps or ends; the caller waits
        self._error: BaseException | None = None
        self._over = False
        # PyTorch keeps these settings per thread. The threads of tasks take over those of the caller.
        self._inference, self._grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        used = torch.accelerator.is_available() and torch.get_device_module().is_initialized()
        self._stream: Any = torch.accelerator.current_stream() if used else None

    # -- the thread that called ----------------------------------------------------------------------------------------

    def run(self, works: Sequence[Work]) -> None:
        """Run the tasks to their end: let one thread run until it stops, then the next, and send sums in between."""
        self._fresh.extend((work, None) for work in works)
        try:
            while self._woken or self._fresh or self._letters:
                # Sums are sent last, when no thread can run without one: each collective then carries the most.
                if self._woken:
                    self._woken.popleft().release()
                elif self._fresh:
                    self._threads.append(threading.Thread(target=self._work, daemon=True))
                    self._threads[-1].start()
                else:
                    self._deliver()
                    continue
                # From here until `_stopped` is released, only the thread of the task runs.
                self._stopped.acquire()
                if self._error is not None:
                    raise self._error
        finally:
            # After an error, sleeping threads wake up, find `_over` and end by `_Abandoned`; without one, none sleeps.
            self._over = True
            for sleeper in list(self._asleep):
                sleeper.release()
            # A thread must not outlive the step: it may hold tensors, and it could touch them later.
            for thread in self._threads:
                thread.join()

    def _deliver(self) -> None:
        """Send all posted letters: one collective per reduction, group, dtype and device."""
        letters, self._letters = self._letters, []
        # Dictionaries and lists keep the order of posting, so every rank sends the same kinds in the same order.
        kinds: dict[Any, list[_Letter]] = {}
        for letter in letters:
            kinds.setdefault((letter.op, letter.peers, letter.x.dtype, letter.x.device), []).append(letter)
        for equal_letters in kinds.values():
            _send(equal_letters)
        self._woken.extend(letter.answered for letter in letters)

    # -- the threads of the tasks --------------------------------------------------------------------------------------

    def post(self, letter: _Letter) -> None:
        """Queue a letter and sleep until it is answered."""
        self._letters.append(letter)
        self._sleep(letter.answered)

    def begin(self, works: Sequence[Work]) -> None:
        """Queue the works of a nested `together` and sleep until all of them have ended."""
        if works:
            family = _Family(len(works))
            self._fresh.extend((work, family) for work in works)
            self._sleep(family.done)

    def _sleep(self, until: threading.Semaphore) -> None:
        """Hand over to the calling thread, and return when `until` is released. Raise `_Abandoned` after an error."""
        if self._over:  # a `finally` or a context manager of an abandoned task asks for a sum
            raise _Abandoned
        # First announce the semaphore, so that an error can wake this thread; then let the caller run.
        self._asleep.add(until)
        self._stopped.release()
        until.acquire()
        self._asleep.discard(until)
        if self._over:
            raise _Abandoned

    def _work(self) -> None:
        """Run queued tasks one after another, as the body of a thread.

        A thread whose task ends takes the next one. There are thus only as many threads as tasks sleep at once.
        """
        _this.lockstep = self
        if self._stream is not None:
            torch.accelerator.set_stream(self._stream)  # also selects the device of the stream
        with suppress(_Abandoned), torch.inference_mode(self._inference), torch.set_grad_enabled(self._grad):
            while self._fresh and self._error is None:
                self._do(*self._fresh.popleft())
        self._stopped.release()

    def _do(self, work: Work, family: _Family | None) -> None:
        """Run one task, keep its error for `run`, and wake the task that began it if it was the last of its family."""
        # The first error counts. The caller raises it, because an exception in a thread would only be printed.
        try:
            work()
        except Exception as error:
            self._error = self._error or error
        if family is not None:
            family.left -= 1
            if not family.left:
                self._woken.append(family.done)


def _send(letters: Sequence[_Letter]) -> None:
    """Answer letters of equal reduction, peers, dtype and device by one all-reduce of all their elements."""
    op, peers, example = letters[0].op, letters[0].peers, letters[0].x
    # The buffer (total elements,) is new and row-major. A collective adds up memory without looking at strides, and
    # LAPACK, for example, returns column-major tensors, whose strides may differ between ranks.
    flat = torch.cat([letter.x.reshape(-1) for letter in letters])
    # Only the types are compared: "cuda" names the current GPU, which need not be the GPU of x.
    if flat.device.type != torch.device(peers.device).type:
        flat = flat.to(peers.device)
    dist.all_reduce(flat, op, group=peers.group)
    parts = torch.split(flat.to(example.device), [letter.x.numel() for letter in letters])
    for letter, part in zip(letters, parts, strict=True):
        letter.x = part.view(letter.x.shape)
