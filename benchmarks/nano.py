"""The main job's nano model, and its real gradients while it trains."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


def example(name: str) -> Any:
    """A module of examples/pretraining."""
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(f"pretraining.{name}")


def gradients(at: list[int]) -> Iterator[dict[str, Tensor]]:
    """The gradients of all projected matrices after so many steps of AdamW, for each entry of `at`, ascending."""
    arguments, corpus, loop = example("arguments"), example("corpus"), example("loop")
    # A small lr keeps the gradients of full rank; at the swept one they collapse onto a few directions early on.
    command = ["--optimizer", "adamw", "--lr", "0.001", "--set", "matrix_lr_scale=1.0"]
    args = arguments.complete(arguments.parser().parse_args(command))
    data = corpus.prepare(arguments.request(args), ROOT / args.cache)
    with tempfile.TemporaryDirectory() as folder:
        job = arguments.job(args, arguments.choices(args)[0], data)
        run = loop.Run(job, Path(folder), loop.Interrupt())
        with loop.tqdm(disable=True) as bar:
            for step in at:
                while run.step < step:
                    run._train_step(bar)
                run._backward()
                named = run.model.named_parameters()
                yield {name: p.grad.clone() for name, p in named if "_proj" in name and p.grad is not None}
                run.model.zero_grad()
