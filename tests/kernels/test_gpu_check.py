"""The script for GPU machines runs to its end where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_section_runs_on_the_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_cpu.json").read_text())
    sections = {name: row for name, row in found.items() if isinstance(row, dict) and "took_seconds" in row}
    assert {"build", "tests", "steps", "one_rank"} <= sections.keys()
    assert all(row["ok"] for row in sections.values())


@pytest.mark.slow
def test_without_a_gpu_it_says_so():
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert "torch sees no CUDA device here; --device cpu --quick tries the script itself" in done.stderr
