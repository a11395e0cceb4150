"""A checkpoint is on disk whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from .errors import PretrainError


class _Recorder:
    """A file that remembers its first OSError: torch.save reports a full disk as an unrelated RuntimeError."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def save(content: dict[str, Any], path: Path) -> None:
    """Write beside `path`, flush to the disk, then rename: a reader sees the old file or the new one."""
    part = path.with_name(f".{path.name}.part")
    recorder: _Recorder | None = None
    try:
        with part.open("wb") as file:
            recorder = _Recorder(file)
            torch.save(content, cast(IO[bytes], recorder))  # write and flush are all it needs
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else recorder.error if recorder else None
        if cause is None:
            raise
        kept = "the last checkpoint there is intact" if path.exists() else "there is no earlier one"
        raise PretrainError(
            f"could not save the checkpoint {path}: {cause.strerror}; {kept}. Make room, then continue with --resume"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Without this a power cut may undo the rename. Not every system can open a folder."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise PretrainError(f"cannot read the checkpoint {path}: {error}; remove it to start the run afresh") from error
    return content
