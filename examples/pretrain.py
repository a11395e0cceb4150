"""Pretrain a LLaMA with any optimizer of lowrank_optim or torch.optim, or several side by side.

See examples/README.md, or run `python examples/pretrain.py --help`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pretraining.errors import PretrainError
from pretraining.interrupt import Interrupt

if TYPE_CHECKING:
    from pretraining.corpus import Corpus

# Set before the libraries are imported: the progress bar is the only thing that should move.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# OpenMP's threads spin while they wait; on a machine that does anything else this made a step ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# cuBLAS gives the same bits twice only with a workspace of fixed size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

RUN_FAILED, WRONG_ARGUMENTS = 1, 2


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    worker = "--worker" in argv
    try:
        return _worker(Path(argv[1])) if worker else _parent(argv)
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
    from pretraining import arguments, corpus, launch, optimizers, schedule

    args = arguments.complete(arguments.parser().parse_args(argv))
    choices = arguments.choices(args)
    name = f"{args.preset}-" + "-vs-".join(choice.text for choice in choices)
    out = launch.output_folder(args.out, name, args.resume)
    data = corpus.prepare(arguments.request(args), args.cache)
    jobs = [arguments.job(args, choice, data) for choice in choices]
    for job in jobs:
        optimizers.check(job)
        schedule.check(job)
    folders = [out / launch.slug(job.label) if args.compare else out for job in jobs]
    for job, folder in zip(jobs, folders, strict=True):
        launch.enter(job, folder)
    _announce(data, out)

    interrupt = Interrupt().install()
    failed = []
    for job, folder in zip(jobs, folders, strict=True):
        if launch.finished(folder):
            print(f"{job.label}: finished before, nothing to do")
            continue
        code = launch.run_child(folder, interrupt)
        if interrupt.requested or code > 128:
            code = interrupt.exit_code if interrupt.requested else code
            print(f"interrupted and saved; continue with:\n  {_resume_command(argv, out)}", file=sys.stderr)
            return code
        if code:
            failed.append(job.label)
    _conclude(args, argv, out, folders, failed)
    return RUN_FAILED if failed else 0


def _announce(data: Corpus, out: Path) -> None:
    train = "streamed" if data.train_tokens is None else f"{data.train_tokens:,}"
    held_out = f"{data.validation_tokens:,}"
    print(f"{data.source}: {train} training tokens, {held_out} validation tokens, vocabulary {data.vocab}")
    print(f"writing to {out}/", flush=True)


def _resume_command(argv: list[str], out: Path) -> str:
    again = [*argv] if "--resume" in argv else [*argv, "--resume"]
    if not any(word == "--out" or word.startswith("--out=") for word in argv):
        again += ["--out", str(out)]
    return shlex.join(["python", sys.argv[0], *again])


def _conclude(args: argparse.Namespace, argv: list[str], out: Path, folders: list[Path], failed: list[str]) -> None:
    from pretraining import energy, launch, plot, summary

    done = [(result, folder) for folder in folders if (result := launch.finished(folder))]
    results, drawn = [result for result, _ in done], []
    if results:
        print(f"\n{summary.table(results, failed)}\n")
        finished = [folder for _, folder in done]
        plot.draw(results, finished, out / "curve.png")
        drawn = ["curve.png", *(["energy.png"] if energy.draw(results, finished, out / "energy.png") else [])]
    command = shlex.join(["python", sys.argv[0], *argv])
    config = {key: value for key, value in vars(args).items() if key != "worker"}
    summary.write(out / "summary.json", results, failed, command, config)
    for name in ["summary.json", *drawn]:
        print(f"wrote {out / name}")
    for folder in folders:
        names = sorted({path.name for path in folder.iterdir()} - {"summary.json", *drawn})
        print(f"wrote {folder}/ ({', '.join(names)})")


if __name__ == "__main__":
    sys.exit(main())
