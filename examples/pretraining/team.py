"""The processes that train one model together, as torchrun or deepspeed started them."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from tqdm import tqdm

from .errors import PretrainError, ToldElsewhereError
from .job import Job

PATIENCE = timedelta(hours=1)  # for the first process, which prepares the text while the others wait
T = TypeVar("T")


class Team:
    """Alone, which is the default, every method does the obvious thing. With others, all of them call it."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @classmethod
    def join(cls) -> Team:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if gpus:
            if local >= gpus:
                raise PretrainError(f"process {local} of this machine needs a GPU of its own, and there are {gpus}")
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        """Together: who goes early takes connections with it that others still read from."""
        dist.barrier()
        dist.destroy_process_group()

    @property
    def main(self) -> bool:
        """The process that writes and talks."""
        return self.rank == 0

    def placed(self, job: Job) -> Job:
        """The job on this process's own device."""
        if self.world > 1 and job.device == "cuda":
            return dataclasses.replace(job, device=f"cuda:{torch.cuda.current_device()}")
        return job

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def once(self, error: PretrainError) -> PretrainError:
        """An error that all processes raise, to be told by the first."""
        return error if self.main else ToldElsewhereError(str(error))

    def first(self, action: Callable[[], T]) -> T:
        """What `action` returns, or raises, in the first process; the others only learn of it."""
        if self.world == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = action()
            except (PretrainError, OSError, SystemExit) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, 0)
        result, error = outcome
        if error is not None:
            raise error if self.main or isinstance(error, SystemExit) else ToldElsewhereError(str(error))
        return result  # type: ignore[no-any-return]

    def together(self, action: Callable[[], T]) -> T:
        """What `action` returns here; if it fails in one process it has failed in all, and one that knows why tells."""
        if self.world == 1:
            return action()
        result, error = None, None
        try:
            result = action()
        except PretrainError as caught:
            error = caught
        told: list[str | None] = [None] * self.world
        dist.all_gather_object(told, error and str(error))
        failed = [rank for rank, text in enumerate(told) if text is not None]
        if failed:
            raise error if error and self.rank == failed[0] else ToldElsewhereError(told[failed[0]])
        return cast(T, result)

    def any(self, flag: bool) -> bool:
        return flag if self.world == 1 else self.sums(flag)[0] > 0

    def mean(self, value: float) -> float:
        return value if self.world == 1 else self.sums(value)[0] / self.world

    def sums(self, *values: float) -> list[float]:
        """Each value's sum over all processes, the same bits everywhere."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()  # type: ignore[no-any-return]
