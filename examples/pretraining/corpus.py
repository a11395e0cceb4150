"""Documents to token files, once: split, tokenizer, training tokens, validation tokens, all cached by content."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import tokenizer
from .errors import PretrainError
from .text import Source, digest, documents, is_validation, open_stream
from .tokenizer import Coder

TOKENIZER_DOCUMENTS = 10_000  # a streamed data set trains its tokenizer on this many documents
ENCODE_DOCUMENTS = 256  # documents encoded at once
FORMAT = 1  # raise it when the files below change meaning: old caches are then left alone


@dataclass(frozen=True)
class Request:
    """What the token files depend on besides the text itself."""

    source: Source
    vocab: int
    tokenizer: str | None
    sequence: int
    val_fraction: float
    val_tokens: int


@dataclass(frozen=True)
class Corpus:
    """A folder with `validation.bin` and, for local text, `train.bin`: token numbers, documents closed by `end`."""

    folder: Path
    digest: str
    vocab: int
    train_tokens: int | None  # None: streamed
    validation_tokens: int
    source: Source
    val_fraction: float
    tokenizer: str  # path of a tokenizer file, or the name of one

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        values = json.loads((folder / "corpus.json").read_text())
        return cls(folder=folder, **{**values, "source": Source(**values["source"])})

    def tokens(self, half: str) -> np.ndarray:
        kind = np.uint16 if self.vocab <= 2**16 else np.uint32
        return np.memmap(self.folder / f"{half}.bin", dtype=kind, mode="r")

    def coder(self) -> Coder:
        local = Path(self.tokenizer)
        return tokenizer.load(local) if local.suffix == ".json" else tokenizer.named(self.tokenizer)


def prepare(request: Request, cache: Path) -> Corpus:
    """The token files for `request`, from the cache if the text has not changed since."""
    key = _fingerprint(request)
    folder = cache / f"corpus-{key}"
    if not (folder / "corpus.json").exists():
        print(f"preparing {request.source}: tokenizer and tokens (once; cached in {cache})", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        _build(request, folder, key)
    corpus = Corpus.open(folder)
    _check_size(corpus, request)
    return corpus


def _fingerprint(request: Request) -> str:
    """Changes with any document, so that a cached corpus is never stale. A stream is known by its name only."""
    import tokenizers

    settings = dataclasses.replace(request, sequence=0)  # the files are the same for every sequence length
    total = hashlib.sha256(repr((FORMAT, tokenizers.__version__, settings)).encode())
    count = 0
    if not request.source.streamed:
        for text in documents(request.source):
            total.update(digest(text).to_bytes(8, "big"))
            count += 1
        if not count:
            raise PretrainError(
                f"no text in {request.source}: no file there is text and not empty; name another --text"
            )
    return total.hexdigest()[:16]


def _build(request: Request, folder: Path, key: str) -> None:
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        name = request.tokenizer or str(_train_tokenizer(request, folder.parent / f"tokenizer-{key}.json"))
        coder = tokenizer.named(name) if request.tokenizer else tokenizer.load(Path(name))
        kind = np.uint16 if coder.vocab <= 2**16 else np.uint32
        held_out = _encode(_validation_documents(request), coder, kind)[: request.val_tokens]
        held_out.tofile(part / "validation.bin")
        values = {
            "vocab": coder.vocab,
            "train_tokens": None,
            "validation_tokens": len(held_out),
            "source": dataclasses.asdict(request.source),
            "val_fraction": request.val_fraction,
            "tokenizer": str(Path(name).resolve()) if not request.tokenizer else name,
        }
        if not request.source.streamed:
            train = _encode(_training_documents(request), coder, kind)
            train.tofile(part / "train.bin")
            values["train_tokens"] = len(train)
        content = b"".join(path.read_bytes() for path in sorted(part.glob("*.bin")))
        values["digest"] = hashlib.sha256(f"{request.source} {coder.digest}".encode() + content).hexdigest()
        (part / "corpus.json").write_text(json.dumps(values, indent=2))
        _put(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _put(part: Path, folder: Path) -> None:
    """Two runs may prepare the same corpus at once; the first to be done has made what the other needs."""
    try:
        os.replace(part, folder)
    except OSError:
        if not (folder / "corpus.json").exists():
            raise


def _train_tokenizer(request: Request, path: Path) -> Path:
    if not path.exists():
        limit = TOKENIZER_DOCUMENTS if request.source.streamed else None
        tokenizer.train(itertools.islice(_training_documents(request), limit), request.vocab, path)
    return path


def _all_documents(request: Request) -> Iterator[str]:
    if request.source.streamed:
        return (row[request.source.field] for row in open_stream(request.source))
    return documents(request.source)


def _training_documents(request: Request) -> Iterator[str]:
    return (text for text in _all_documents(request) if not is_validation(text, request.val_fraction))


def _validation_documents(request: Request) -> Iterable[str]:
    """Local text in the order of its hashes: which documents make the cut does not depend on their names.

    A stream cannot be sorted; there the first ones count, enough of them to be cut at `val_tokens`.
    """
    held_out = (text for text in _all_documents(request) if is_validation(text, request.val_fraction))
    if not request.source.streamed:
        return sorted(held_out, key=digest)
    return _at_least(held_out, characters=8 * request.val_tokens)


def _at_least(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _encode(texts: Iterable[str], coder: Coder, kind: type) -> np.ndarray:
    pieces: list[np.ndarray] = [np.empty(0, dtype=kind)]
    iterator = iter(texts)
    while batch := list(itertools.islice(iterator, ENCODE_DOCUMENTS)):
        pieces.extend(np.array([*ids, coder.end], dtype=kind) for ids in coder.encode(batch))
    return np.concatenate(pieces)


def _check_size(corpus: Corpus, request: Request) -> None:
    if corpus.validation_tokens < 2:
        raise PretrainError(
            f"no document of {request.source} was chosen for validation, {request.val_fraction:.0%} of them are; "
            "raise --val-fraction, or give more text (a single file is cut into documents at blank lines)"
        )
    if corpus.train_tokens is not None and corpus.train_tokens <= request.sequence:
        raise PretrainError(
            f"{request.source} has {corpus.train_tokens} training tokens, too few for one sequence of "
            f"{request.sequence} + 1; give more text or a smaller --sequence"
        )
