"""Where documents come from, and which of them are for validation."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import PretrainError

# Third-party packages differ between machines; test folders are mostly data tables.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
DEFAULT_CONFIGS = {"allenai/c4": "en"}  # data sets that cannot be loaded without naming a configuration
DOCUMENT_CHARACTERS = 2000  # a single file is cut into documents of at least this size


@dataclass(frozen=True)
class Source:
    """The standard library by default, else `path` (file or folder) or `dataset` ("name" or "name:config")."""

    path: str | None = None
    dataset: str | None = None
    field: str = "text"

    @property
    def streamed(self) -> bool:
        return self.dataset is not None

    def __str__(self) -> str:
        return self.dataset or self.path or "Python standard library"


def digest(text: str) -> int:
    """A document's identity: 64 bits of the hash of its content, so that copies land on the same side of the split."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big")


def is_validation(text: str, fraction: float) -> bool:
    return digest(text) < fraction * 2**64


def documents(source: Source) -> Iterator[str]:
    """All documents of local text, in an order that depends on names only."""
    if source.path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        yield from _read(sorted(_walk(root, ".py")))
    elif Path(source.path).is_file():
        if not _is_text(Path(source.path)):
            raise PretrainError(f"--text {source.path} is no text: it holds zero bytes. Give UTF-8 text")
        yield from _cut(Path(source.path).read_text(encoding="utf-8", errors="replace"))
    elif Path(source.path).is_dir():
        yield from _read(sorted(p for p in _walk(Path(source.path)) if _is_text(p)))
    else:
        raise PretrainError(f"--text must name a file or a folder, got {source.path!r}, which does not exist")


def _walk(root: Path, suffix: str = "") -> Iterator[Path]:
    skipped = SKIPPED_FOLDERS if suffix else set()
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n not in skipped and not n.startswith(".")]
        yield from (Path(folder, f) for f in files if f.endswith(suffix) and not f.startswith("."))


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def _read(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield text


def _cut(text: str) -> Iterator[str]:
    """Blocks between blank lines, gathered until they are long enough to be worth calling a document."""
    gathered: list[str] = []
    for block in text.split("\n\n"):
        gathered.append(block)
        if sum(map(len, gathered)) >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(gathered)
            gathered = []
    if "".join(gathered).strip():
        yield "\n\n".join(gathered)


def open_stream(source: Source) -> Any:
    """The training half of a Hugging Face data set, read over the network as it is needed."""
    import datasets

    assert source.dataset is not None
    name, _, config = source.dataset.partition(":")
    config = config or DEFAULT_CONFIGS.get(name, "")
    try:
        stream = datasets.load_dataset(name, config or None, split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise PretrainError(
            f"cannot stream the data set {source.dataset!r}: {error}. "
            "Check its name (NAME or NAME:CONFIG) and the network"
        ) from error
    columns = stream.column_names
    if columns and source.field not in columns:
        known = ", ".join(columns)
        raise PretrainError(f"the data set {source.dataset!r} has no column {source.field!r}; --text-field: {known}")
    return stream
