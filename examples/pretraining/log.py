"""One JSON line per step, cut back to the checkpoint when a run is resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Log:
    """Of several processes that share a run, one writes it."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self._writes = path, writes

    def write(self, **values: Any) -> None:
        if not self._writes:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def truncate(self, step: int) -> None:
        """Drop what a killed run logged after its last checkpoint, half a line included."""
        if not self._writes:
            return
        kept = [json.dumps(row) + "\n" for row in read(self.path) if row["step"] <= step]
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text("".join(kept))
        os.replace(part, self.path)


def read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # cut off by a kill
            break
    return rows
