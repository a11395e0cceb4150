"""All that a GPU has to show, in one command: `python -m benchmarks.gpu_check [--quick] [--device cpu] [--out FOLDER]`.

Builds the native kernels, runs the GPU tests, measures (`benchmarks/gpu.py`), and writes one JSON, again after each
section, so that a run cut short leaves what it has. For a machine with a GPU, torch, nvcc and pytest, and without a
network; nothing is installed. Under nine minutes: a section that takes too long is stopped and said to be.

Each section is a process of its own: an error on the device cannot spoil the others. `--device cpu --quick` runs all of
it on small shapes, so that the script itself is tested where there is no GPU; what it then measures means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu, record

MINUTES = 8.5  # in all
LIMITS = {"build": 120, "tests": 200, "steps": 150, "refresh": 110}  # seconds; 60 for all others
ROOT = Path(record.__file__).parent.parent


def build(arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Anew, in a cache of its own, so that the time is that of compiling."""
    start = time.perf_counter()
    said = _python(["-m", "lowrank_optim.build"], arguments, seconds)
    return {"seconds": time.perf_counter() - start, "ok": said.returncode == 0, "said": _tail(said)}


def tests(arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    few = ["-k", "galore_adamw or projected"] if arguments.quick else []
    # where the time is over before the tests are, the last lines still say what failed, and what hung
    options = ["-v", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60"]
    said = _python(["-m", "pytest", *options, "tests/kernels/test_gpu.py", *few], arguments, seconds)
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", said.stdout)}
    return {"ok": said.returncode == 0, **counts, "said": _tail(said, 6000 if said.returncode else 500)}


def measured(section: str, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        said = _python(["-m", "benchmarks.gpu_check", "--section", section, "--found", str(found)], arguments, seconds)
        if said.returncode:
            return {"ok": False, "said": _tail(said, 4000)}
        return {"ok": True, **json.loads(found.read_text())}


def _python(command: list[str], arguments: argparse.Namespace, seconds: float) -> subprocess.CompletedProcess[str]:
    own = ["--device", arguments.device, *(["--quick"] if arguments.quick else [])]
    full = [sys.executable, *command, *(own if "--section" in command else [])]
    settings = {"PYTHONPATH": str(ROOT), "LOWRANK_OPTIM_TEST_DEVICE": arguments.device, "OMP_NUM_THREADS": "4"}
    settings |= {"LOWRANK_OPTIM_CACHE": arguments.cache}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(full, cwd=ROOT, env={**os.environ, **settings}, start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # compilers that it has started, too: they hold its pipes open
            output, errors = process.communicate()
            return subprocess.CompletedProcess(full, 124, output, f"{errors}\nstopped after {seconds:.0f} s")
    return subprocess.CompletedProcess(full, process.returncode, output, errors)


def _tail(said: subprocess.CompletedProcess[str], size: int = 2000) -> str:
    return (said.stdout + said.stderr)[-size:]


def check(arguments: argparse.Namespace) -> bool:
    end = time.monotonic() + 60 * MINUTES
    found: dict[str, Any] = {"device": gpu.device_of(arguments.device), "quick": arguments.quick, "commit": _commit()}
    names = arguments.only or ["build", "tests", *gpu.SECTIONS]
    name = f"gpu_{re.sub(r'[^a-z0-9]+', '_', found['device']['name'].lower()).strip('_')}"
    for section in names:
        seconds = min(LIMITS.get(section, 60), end - time.monotonic())
        start = time.monotonic()
        if seconds < 5:
            found[section] = {"ok": False, "said": f"left out: {MINUTES} minutes were over"}
        elif section in ("build", "tests"):
            found[section] = {"build": build, "tests": tests}[section](arguments, seconds)
        else:
            found[section] = measured(section, arguments, seconds)
        found[section]["took_seconds"] = round(time.monotonic() - start, 1)
        _show(section, found[section])
        path = record.write(name, found, quiet=True, folder=arguments.out)
    print(f"wrote {path}")
    return all(found[section]["ok"] for section in names)


def _show(section: str, row: dict[str, Any]) -> None:
    print(f"-- {section}: {'ok' if row['ok'] else 'FAILED'}, {row['took_seconds']} s", flush=True)
    print("\n".join(row.get("lines", [])) if "lines" in row else row.get("said", "").strip(), flush=True)


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "not a git checkout"
    except OSError:
        return "no git here"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds, few tests")
    parser.add_argument("--only", nargs="+", choices=["build", "tests", *gpu.SECTIONS], help="some sections")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="the folder for the JSON")
    parser.add_argument("--section", choices=gpu.SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--found", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu --quick tries the script itself")
    if arguments.section:
        result = gpu.SECTIONS[arguments.section](gpu.Bench(torch.device(arguments.device), arguments.quick))
        Path(arguments.found).write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as cache:
        arguments.cache = cache
        sys.exit(0 if check(arguments) else 1)


if __name__ == "__main__":
    main()
