"""CUDA kernels, on the CPU, under ThreadSanitizer: no races as written, and some without any one of the barriers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lowrank_optim.ops import compile as build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler"),
]

KERNELS = sorted((build.sources() / "cuda").glob("*.cu"))
BARRIERS = [
    f"{path.name}:{number}"
    for path in [*KERNELS, *KERNELS[0].parent.glob("*.h")]
    for number, line in enumerate(path.read_text().splitlines(), start=1)
    if "__syncthreads()" in line
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Path:
    """A program that runs all of them."""
    program = tmp_path_factory.mktemp("races") / "races"
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", "-DLRO_EMULATED", "-DLRO_DROP_BARRIERS", "-pthread"]
    files = [str(Path(__file__).with_name("races.cpp")), "-x", "c++", *map(str, KERNELS)]
    done = subprocess.run(
        ["g++", *flags, f"-I{build.sources()}", *files, "-o", str(program)], capture_output=True, text=True
    )
    if "cannot find" in done.stderr and "tsan" in done.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert not done.returncode, done.stderr
    return program


def run(program: Path, dropped: str = "") -> tuple[set[str], int]:
    """The kernels that ran, and how many races there were."""
    command = [*(["setarch", "-R"] if shutil.which("setarch") else []), str(program)]  # it knows few layouts of memory
    environment = {**os.environ, "LRO_DROPPED": dropped, "TSAN_OPTIONS": "exitcode=0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    *names, last = done.stdout.splitlines()
    assert last == "done", done.stderr
    races = re.findall("WARNING: ThreadSanitizer: data race", done.stderr)
    return {re.findall(r"\w+", name)[0] for name in names}, len(races)


def test_kernels_have_no_races(kernels):
    ran, races = run(kernels)
    assert races == 0
    written = [re.findall(r"__global__ void .*?(\w+)\((?!kThreads)", path.read_text()) for path in KERNELS]
    assert ran == {name for names in written for name in names}


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_barrier_that_is_left_out_is_reported(kernels, barrier):
    assert run(kernels, barrier)[1] > 0
