"""Token files and streams to batches of windows: `sequence + 1` tokens each, the targets being the inputs shifted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .corpus import Corpus
from .text import is_validation, open_stream

STREAM_DOCUMENTS = 64  # documents encoded at once


class TrainingData(Protocol):
    """Windows of a run, numbered from 0."""

    def windows(self, first: int, count: int) -> Tensor:
        """Windows `first` to `first + count`, shape (count, sequence + 1)."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def training_data(corpus: Corpus, sequence: int, seed: int) -> TrainingData:
    if corpus.source.streamed:
        return StreamedWindows(corpus, sequence)
    return LocalWindows(corpus.tokens("train"), sequence, seed)


class LocalWindows:
    """Every window once per epoch, in an order that is a function of (seed, epoch): there is no position to save."""

    def __init__(self, tokens: np.ndarray, sequence: int, seed: int) -> None:
        self._tokens, self._sequence, self._seed = tokens, sequence, seed
        self._count = (len(tokens) - 1) // sequence
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def windows(self, first: int, count: int) -> Tensor:
        rows = [self._window(number) for number in range(first, first + count)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _window(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, self._count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self._seed, epoch)).permutation(self._count)
        start = int(self._order[place]) * self._sequence
        return self._tokens[start : start + self._sequence + 1]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class StreamedWindows:
    """A Hugging Face stream in its own order (no shuffle buffer: its content could not be restored).

    Windows may be left out, never asked for twice. Each of several processes reads all of the stream and leaves out
    what the others train on, so the state of the first one, whose windows come first, is good for all of them.
    """

    def __init__(self, corpus: Corpus, sequence: int) -> None:
        self._coder, self._sequence = corpus.coder(), sequence
        self._field, self._fraction = corpus.source.field, corpus.val_fraction
        self._stream = open_stream(corpus.source)
        self._epoch, self._next, self._rest = 0, 0, np.empty(0, dtype=np.int64)
        self._rows: Iterator[dict[str, Any]] | None = None

    def windows(self, first: int, count: int) -> Tensor:
        assert first >= self._next, f"a stream goes forward only: window {self._next} is next, {first} was asked for"
        self._take(first - self._next)  # what other processes train on
        return torch.from_numpy(np.stack(self._take(count)))

    def _take(self, count: int) -> list[np.ndarray]:
        length, rows = self._sequence, []
        for _ in range(count):
            while len(self._rest) < length + 1:
                self._read()
            rows.append(self._rest[: length + 1])
            self._rest = self._rest[length:]  # windows share one token: the last target is the next input
        self._next += count
        return rows

    def _read(self) -> None:
        texts: list[str] = []
        while len(texts) < STREAM_DOCUMENTS:
            text = self._row()[self._field]
            if not is_validation(text, self._fraction):
                texts.append(text)
        pieces = [np.array([*ids, self._coder.end], dtype=np.int64) for ids in self._coder.encode(texts)]
        self._rest = np.concatenate([self._rest, *pieces])

    def _row(self) -> dict[str, Any]:
        """The next row; after the last one the first, as a new epoch."""
        self._rows = self._rows or iter(self._stream)
        try:
            return next(self._rows)
        except StopIteration:
            # set_epoch also keeps a resumed stream from starting its next epoch where it was resumed.
            self._epoch += 1
            self._stream.set_epoch(self._epoch)
            self._rows = iter(self._stream)
            return next(self._rows)

    def state_dict(self) -> dict[str, Any]:
        rest = torch.from_numpy(self._rest.copy())
        return {"stream": self._stream.state_dict(), "epoch": self._epoch, "next": self._next, "rest": rest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._epoch, self._next = state_dict["epoch"], state_dict["next"]
        self._rest = state_dict["rest"].numpy()
        self._stream.set_epoch(self._epoch)
        self._stream.load_state_dict(state_dict["stream"])
        self._rows = None


def turns(batches: Iterator[Tensor], rank: int, world: int) -> Iterator[tuple[Tensor, bool]]:
    """One batch of every `world`, and whether it counts: processes without one in the last turn repeat another's."""
    while turn := list(itertools.islice(batches, world)):
        yield turn[min(rank, len(turn) - 1)], rank < len(turn)


def validation_batches(tokens: np.ndarray, sequence: int, count: int) -> Iterator[Tensor]:
    """All of `tokens`, each but the first as a target exactly once; the last window is as long as what remains."""
    full = (len(tokens) - 1) // sequence
    for first in range(0, full, count):
        starts = range(first * sequence, min(first + count, full) * sequence, sequence)
        yield torch.from_numpy(np.stack([tokens[s : s + sequence + 1] for s in starts]).astype(np.int64))
    if len(tokens) - 1 > full * sequence:
        yield torch.from_numpy(tokens[full * sequence :].astype(np.int64))[None]
