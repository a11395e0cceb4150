"""Writes a result with what is needed to judge it: the machine, the versions, the command."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def write(name: str, result: dict[str, Any], quiet: bool = False, folder: Path = RESULTS) -> Path:
    """`results/<name>.json`, whole or not at all; returns its path."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    record = {"command": _command(), "date": datetime.date.today().isoformat(), "machine": _machine()}
    peers = "apollo-torch", "fira", "flora-opt", "galore-torch", "ista-daslab-optimizers"
    record["versions"] = _versions("torch", "numpy", "lowrank_optim", "transformers", "tokenizers", *peers)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps({**record, **result}, indent=1) + "\n")
    os.replace(part, path)
    if not quiet:
        print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path


def _command() -> str:
    module = getattr(sys.modules["__main__"].__spec__, "name", None)
    return shlex.join(["python", *(["-m", module] if module else sys.argv[:1]), *sys.argv[1:]])


def _machine() -> dict[str, Any]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def _versions(*names: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
