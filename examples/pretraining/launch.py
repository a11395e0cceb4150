"""Run folders, and one child process per run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from .errors import PretrainError
from .interrupt import Interrupt
from .job import Job
from .worker import RESULT

POLL_SECONDS = 0.2


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9=._-]+", "-", text).strip("-.") or "run"


def output_folder(out: Path | None, name: str, resume: bool) -> Path:
    """--out, or a folder in runs/ by this name: the newest one to resume, else a new number."""
    if out is not None:
        if holds_run(out) and not resume:
            raise PretrainError(f"{out} holds a run already; add --resume to continue it, or give another --out")
        if out.exists() and not out.is_dir():
            raise PretrainError(f"--out must be a folder, got the file {out}")
        newest = out
    else:
        base = Path("runs", slug(name))
        number, newest, new = 1, base, base
        while holds_run(new):
            number, newest, new = number + 1, new, Path(f"{base}-{number + 1}")
        newest = newest if resume else new
    if resume and not holds_run(newest):
        raise PretrainError(f"nothing to resume in {newest}; leave --resume out to start a run there")
    return newest


def holds_run(folder: Path) -> bool:
    return any(folder.glob("job.json")) or any(folder.glob("*/job.json"))


def enter(job: Job, folder: Path) -> None:
    """Make the folder of `job`, or see that what lies there is the same job begun earlier."""
    path = folder / "job.json"
    if path.exists():
        job.check_continues(Job.read(path))
    folder.mkdir(parents=True, exist_ok=True)
    job.write(path)


def finished(folder: Path) -> dict[str, Any] | None:
    path = folder / RESULT
    return json.loads(path.read_text()) if path.exists() else None


def run_child(folder: Path, interrupt: Interrupt) -> int:
    """Train in a process of its own and wait for it, also after a signal: the child saves first."""
    script = Path(__file__).resolve().parent.parent / "pretrain.py"
    child = subprocess.Popen([sys.executable, str(script), "--worker", str(folder)])
    forwarded = False
    while True:
        try:
            code = child.wait(POLL_SECONDS)
            # A child hit before it could listen dies of the signal; it had nothing to save.
            return 128 - code if code < 0 else code
        except subprocess.TimeoutExpired:
            if interrupt.requested and not forwarded and interrupt.signal is not None:
                child.send_signal(interrupt.signal)
                forwarded = True
