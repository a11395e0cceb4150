"""Pretrain a LLaMA with any optimizer of lowrank_optim or torch.optim, or several side by side.

See examples/README.md, or run `python examples/pretrain.py --help`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pretraining.errors import PretrainError, ToldElsewhereError
from pretraining.interrupt import Interrupt

if TYPE_CHECKING:
    from pretraining.launch import Plan
    from pretraining.team import Team

# Set before the libraries are imported: the progress bar is the only thing that should move.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# OpenMP's threads spin while they wait; on a machine that does anything else this made a step ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# cuBLAS gives the same bits twice only with a workspace of fixed size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

RUN_FAILED, WRONG_ARGUMENTS, STOPPED = 1, 2, (130, 143)
LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"}  # what torchrun and deepspeed tell their processes


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    worker = "--worker" in argv
    try:
        if worker:
            return _worker(Path(argv[1]))
        return _member(argv) if os.environ.keys() >= LAUNCHED else _parent(argv)
    except ToldElsewhereError:
        pass
    except PretrainError as error:
        print(f"error: {error}", file=sys.stderr)
    except ImportError as error:
        if error.name in (None, "pretraining"):
            raise
        print(f"error: {error}; install the package with its examples: pip install -e '.[examples]'", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted before training began; nothing to save", file=sys.stderr)
        return 130
    return RUN_FAILED if worker else WRONG_ARGUMENTS


def _worker(folder: Path) -> int:
    """One run. Signals are listened to before torch is imported, which takes seconds."""
    interrupt = Interrupt(parent=os.getppid()).install()
    from pretraining.worker import work

    return 0 if work(folder, interrupt) else interrupt.exit_code


def _parent(argv: list[str]) -> int:
    """The only process that the user started: it has one child at a time, which trains."""
    from pretraining import launch
    from pretraining.team import Team

    plan = launch.plan(argv)
    interrupt = Interrupt().install()
    return _train(plan, argv, Team(), lambda folder: launch.run_child(folder, interrupt))


def _member(argv: list[str]) -> int:
    """One of the processes that a launcher started: the first one plans and tells, all of them train."""
    interrupt = Interrupt(parent=os.getppid()).install()
    from pretraining import launch
    from pretraining.team import Team

    team = Team.join()
    try:
        plan = team.first(lambda: launch.plan(argv))
    except (PretrainError, OSError, SystemExit):  # in all of them
        team.leave()
        raise
    code = _train(plan, argv, team, lambda folder: launch.run_here(folder, interrupt, team))
    team.leave()
    return code


def _train(plan: Plan, argv: list[str], team: Team, run: Callable[[Path], int]) -> int:
    from pretraining import launch

    if team.main:
        _announce(plan)
    failed = []
    for job, folder in zip(plan.jobs, plan.folders, strict=True):
        if team.first(lambda folder=folder: launch.finished(folder)):
            if team.main:
                print(f"{job.label}: finished before, nothing to do")
            continue
        code = run(folder)
        if code >= 128:
            how = "interrupted and saved" if code in STOPPED else f"killed by signal {code - 128}"
            team.say(f"{how}; continue with:\n  {launch.resume_command(argv, plan.out)}")
            return code
        if code:
            failed.append(job.label)
    if team.main:
        _conclude(plan, argv, failed)
    return RUN_FAILED if failed else 0


def _announce(plan: Plan) -> None:
    data = plan.data
    train = "streamed" if data.train_tokens is None else f"{data.train_tokens:,}"
    held_out = f"{data.validation_tokens:,}"
    print(f"{data.source}: {train} training tokens, {held_out} validation tokens, vocabulary {data.vocab}")
    print(f"writing to {plan.out}/", flush=True)


def _conclude(plan: Plan, argv: list[str], failed: list[str]) -> None:
    from pretraining import energy, launch, plot, summary

    out, folders = plan.out, plan.folders
    done = [(result, folder) for folder in folders if (result := launch.finished(folder))]
    results, drawn = [result for result, _ in done], []
    if results:
        print(f"\n{summary.table(results, failed)}\n")
        finished = [folder for _, folder in done]
        plot.draw(results, finished, out / "curve.png")
        drawn = ["curve.png", *(["energy.png"] if energy.draw(results, finished, out / "energy.png") else [])]
    config = {key: value for key, value in vars(plan.args).items() if key != "worker"}
    summary.write(out / "summary.json", results, failed, launch.command(argv), config)
    for name in ["summary.json", *drawn]:
        print(f"wrote {out / name}")
    for folder in folders:
        names = sorted({path.name for path in folder.iterdir()} - {"summary.json", *drawn})
        print(f"wrote {folder}/ ({', '.join(names)})")


if __name__ == "__main__":
    sys.exit(main())
