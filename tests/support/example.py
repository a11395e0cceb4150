"""Runs of examples/pretrain.py on a tiny model."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

for package in ("transformers", "tokenizers", "matplotlib", "tqdm"):
    pytest.importorskip(package)

from pretraining import arguments, corpus, loop  # noqa: E402
from pretraining.interrupt import Interrupt  # noqa: E402
from pretraining.job import Job  # noqa: E402
from pretraining.log import read  # noqa: E402

from tests.support.subprocesses import ROOT  # noqa: E402

EXAMPLES = ROOT / "examples"
TINY = "--hidden 16 --mlp 24 --layers 1 --heads 2 --vocab 300 --sequence 16 --batch 4 --micro-batch 3 --steps 12"
TINY += " --eval-every 5 --save-every 4 --val-fraction 0.2 --device cpu"


def command(folder: Path, cache: Path, *more: str) -> list[str]:
    return [*TINY.split(), "--text", str(folder), "--cache", str(cache), *more]


def make_job(argv: list[str]) -> Job:
    args = arguments.complete(arguments.parser().parse_args(argv))
    prepared = corpus.prepare(arguments.request(args), args.cache)
    return arguments.job(args, arguments.choices(args)[0], prepared)


class StopAt(Interrupt):
    """Asks for a stop as soon as `step` steps are done."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.run = step, None

    @property
    def requested(self) -> bool:
        return self.run is not None and self.run.step >= self.step


def train(job: Job, path: Path, stop: int | None = None, resume: bool = False) -> loop.Run:
    path.mkdir(exist_ok=True)
    interrupt = Interrupt() if stop is None else StopAt(stop)
    run = loop.Run(job, path, interrupt)
    if resume:
        run.load()
    if isinstance(interrupt, StopAt):
        interrupt.run = run
    assert run.train() is (stop is None)
    return run


def assert_same(first: loop.Run, second: loop.Run) -> None:
    """Weights, optimizer, losses and the log are equal to the bit."""
    assert first.step == second.step
    assert first.history == second.history
    for (name, p), q in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    states = [run.optimizer.state_dict()["state"] for run in (first, second)]
    for index, state in states[0].items():
        for key, value in state.items():
            other = states[1][index][key]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other, (index, key)
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in read(run.log.path)] for run in (first, second)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == list(range(1, first.step + 1))


@contextlib.contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loaded(job: Job, path: Path) -> loop.Run:
    run = loop.Run(job, path, Interrupt())
    run.load()
    return run


def assert_matches(pattern: str, found: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(found)
