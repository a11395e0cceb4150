"""Checkpoints that many processes write together: a folder each, whose name says that it is complete."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from . import checkpoint
from .errors import PretrainError
from .team import Team

REST, PART = "rest.pt", ".checkpoint.part"


def newest(folder: Path) -> Path:
    """The complete checkpoint with the highest number; where there is none, the name of the first."""
    numbers = [int(found[1]) for path in folder.iterdir() if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    return folder / f"checkpoint-{max(numbers, default=1)}"


def save(folder: Path, team: Team, rest: dict[str, Any], write: Callable[[Path], None]) -> None:
    """`write` is called by all processes. The new folder gets its name when all is on disk; then the old one goes."""
    part, old = folder / PART, newest(folder)
    new = old.with_name(f"checkpoint-{int(old.name.rpartition('-')[2]) + 1}") if old.exists() else old

    def begin() -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        checkpoint.save(rest, part / REST)

    def finish() -> None:
        os.replace(part, new)
        checkpoint.sync_folder(folder)
        if old != new:
            shutil.rmtree(old, ignore_errors=True)

    def attempt(action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, CheckpointException) as error:
            kept = f"{old} is intact" if old.exists() else "there is no earlier one"
            raise PretrainError(
                f"could not save the checkpoint {new}: {error}; {kept}. Make room, then continue with --resume"
            ) from error

    team.first(lambda: attempt(begin))
    team.together(lambda: attempt(lambda: write(part)))
    team.first(lambda: attempt(finish))


def read(path: Path) -> dict[str, Any]:
    return {**checkpoint.load(path / REST), "path": path}
