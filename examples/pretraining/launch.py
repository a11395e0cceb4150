"""What a command line asks for, the folders of its runs, and the process of each."""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import arguments, corpus, optimizers, schedule, strategy
from .corpus import Corpus
from .errors import PretrainError, ToldElsewhereError
from .interrupt import Interrupt
from .job import Job
from .team import Team
from .worker import RESULT, work

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Plan:
    """Jobs that can be done, each in a folder that says so."""

    args: argparse.Namespace
    data: Corpus
    out: Path
    jobs: list[Job]
    folders: list[Path]


def plan(argv: list[str]) -> Plan:
    """Everything is checked before the first folder is made."""
    args = arguments.complete(arguments.parse(argv))
    choices = arguments.choices(args)
    name = f"{args.preset}-" + "-vs-".join(choice.text for choice in choices)
    out = output_folder(args.out, name, args.resume)
    data = corpus.prepare(arguments.request(args), args.cache)
    jobs = [arguments.job(args, choice, data) for choice in choices]
    for job in jobs:
        strategy.check(job)
        optimizers.check(job)
        schedule.check(job)
    folders = [out / slug(job.label) if args.compare else out for job in jobs]
    for job, folder in zip(jobs, folders, strict=True):
        enter(job, folder)
    return Plan(args, data, out, jobs, folders)


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


def resume_command(argv: list[str], out: Path) -> str:
    """What continues these runs."""
    again = [*argv] if "--resume" in argv else [*argv, "--resume"]
    if not any(word == "--out" or word.startswith("--out=") for word in argv):
        again += ["--out", str(out)]
    return command(again)


def command(argv: list[str]) -> str:
    """With what started this process."""
    typed = [word for word in argv if not word.startswith("--local_rank")]  # not by the user, but by deepspeed
    return shlex.join([*_launcher(), sys.argv[0], *typed])


def _launcher() -> list[str]:
    world = os.environ.get("WORLD_SIZE")
    if world is None:
        return ["python"]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ["deepspeed", "--no_local_rank", "--num_accelerators", world]
    local = os.environ["LOCAL_WORLD_SIZE"]
    nodes = ["--nnodes", str(int(world) // int(local))] if world != local else []
    return ["torchrun", *nodes, "--nproc_per_node", local]


def run_here(folder: Path, interrupt: Interrupt, team: Team) -> int:
    """Train in this process, which is one of several that a launcher started; the exit code."""
    gc.collect()  # an earlier run
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        code = 0 if work(folder, interrupt, team) else interrupt.exit_code
    except PretrainError as error:
        if not isinstance(error, ToldElsewhereError):
            print(f"error: {error}", file=sys.stderr)
        code = 1
    return interrupt.exit_code if team.any(interrupt.requested) else code


def run_child(folder: Path, interrupt: Interrupt) -> int:
    """Train in a process of its own and wait for it, also after a signal: the child saves first. The exit code."""
    script = Path(__file__).resolve().parent.parent / "pretrain.py"
    child = subprocess.Popen([sys.executable, str(script), "--worker", str(folder)])
    forwarded = False
    while True:
        try:
            code = child.wait(POLL_SECONDS)
            # A child hit before it could listen dies of the signal; it had nothing to save.
            code = 128 - code if code < 0 else code
            return interrupt.exit_code if interrupt.requested else code
        except subprocess.TimeoutExpired:
            if interrupt.requested and not forwarded and interrupt.signal is not None:
                child.send_signal(interrupt.signal)
                forwarded = True
