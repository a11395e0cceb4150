"""Python code in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**changes: str) -> dict[str, str]:
    plain = {key: value for key, value in os.environ.items() if not key.startswith("LOWRANK_OPTIM_")}
    return {**plain, "PYTHONPATH": str(ROOT), **changes}


def run(code: str, *arguments: str, fails: bool = False, **changes: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**changes))
    assert bool(done.returncode) == fails, done.stderr
    return done.stdout + done.stderr
