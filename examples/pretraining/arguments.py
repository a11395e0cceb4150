"""The command line, checked before anything expensive happens."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import config, optimizers, schedule, strategy
from .corpus import Corpus, Request
from .errors import PretrainError
from .job import Job
from .model import DTYPES
from .optimizers import Choice
from .precision import AMP
from .presets import PRESETS
from .text import Source

SIZES = "hidden", "mlp", "layers", "heads", "vocab", "sequence", "steps", "batch", "micro_batch"
TEMPO = "eval_every", "save_every", "val_tokens"
IN_BACKWARD = {"clip_by": "tensor", "accumulate": "projected", "basis_from": "window"}  # what they are if not given
SMALLEST_VOCAB = 257  # 256 bytes and the end of a document


def _number(kind: type, good: Callable[[float], bool], rule: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not good(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value

    return parse


count = _number(int, lambda v: v >= 1, "a whole number of at least 1")
natural = _number(int, lambda v: v >= 0, "a whole number of at least 0")
positive = _number(float, lambda v: 0 < v < float("inf"), "a number above 0")
non_negative = _number(float, lambda v: 0 <= v < float("inf"), "a number of at least 0")
fraction = _number(float, lambda v: 0 <= v < 1, "at least 0 and below 1")
minority = _number(float, lambda v: 0 < v <= 0.5, "above 0 and at most 0.5")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, before which stands what a file of --config says."""
    top = parser()
    first, _ = _config_parser().parse_known_args(argv)
    return top.parse_args([*config.words(first.config, top, argv), *argv] if first.config else argv)


def _config_parser() -> argparse.ArgumentParser:
    alone = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    alone.add_argument("--config", type=Path)
    return alone


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="pretrain.py",
        description="Pretrain a LLaMA with any optimizer of lowrank_optim or torch.optim.",
        epilog="Exit codes: 0 finished, 1 a run failed, 2 wrong arguments, 130 and 143 interrupted and saved.",
    )
    _add_model(top.add_argument_group("model", "a preset, and what to change in it"))
    _add_optimizer(top.add_argument_group("optimizer"))
    _add_training(top.add_argument_group("training"))
    _add_backward(top.add_argument_group("step in backward"))
    _add_data(top.add_argument_group("data"))
    _add_run(top.add_argument_group("run"))
    return top


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--config", type=Path, metavar="FILE", help="YAML or JSON: names of these options, and values")
    group.add_argument("--preset", choices=PRESETS, default="nano", help="default: nano, about a minute on two cores")
    for name in ("hidden", "mlp", "layers", "heads", "vocab", "sequence"):
        group.add_argument(f"--{name}", type=count, metavar="N")


def _add_optimizer(group: argparse._ArgumentGroup) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--optimizer", default="galore", metavar="NAME", help="class, or its beginning (default: galore)"
    )
    which.add_argument("--compare", metavar="A,B", help="several in turn, as in adamw,galore:rank=0.5:scale=1")
    group.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keywords of --optimizer")
    group.add_argument("--lr", type=positive, help="peak lr of all runs (default: the preset's for the optimizer)")


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--steps", type=count, metavar="N", help="updates of the weights")
    group.add_argument("--batch", type=count, metavar="N", help="sequences per update")
    group.add_argument("--micro-batch", type=count, metavar="N", help="sequences per forward pass")
    group.add_argument("--warmup", type=fraction, default=0.1, help="share of the steps (default: 0.1)")
    group.add_argument(
        "--restart-warmup",
        type=natural,
        metavar="N",
        help="updates over which lr rises to the schedule again after each restart of all layers (ReLoRA's merges, "
        "resets of moments, SST's draws, the end of --warm-start); 0: none (default: 10, ReLoRA 100, SST 20, and at "
        "most a fifth of the period, where the method restarts at all)",
    )
    group.add_argument(
        "--warm-start",
        type=natural,
        default=0,
        metavar="N",
        help="first train the model as it is for N updates, with AdamW as the preset has it, then convert it; for "
        "methods that convert (default: 0)",
    )
    group.add_argument("--clip", type=non_negative, default=1.0, help="largest gradient norm, 0 for none (default: 1)")
    group.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights, gradients and activations")
    group.add_argument("--amp", choices=AMP, default="none", help="dtype of products, by autocast; weights stay fp32")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    group.add_argument("--seed", type=natural, default=0)
    group.add_argument(
        "--strategy",
        choices=strategy.STRATEGIES,
        default="auto",
        help="how processes that torchrun or deepspeed started share the model (default: ddp, in one process single)",
    )
    group.add_argument("--local_rank", help=argparse.SUPPRESS)  # of the deepspeed launcher; the environment says it too


def _add_backward(group: argparse._ArgumentGroup) -> None:
    norms, sums = ("global", "tensor", "delayed"), ("projected", "whole")
    group.add_argument("--step-in-backward", action="store_true", help="use and free each gradient when it is complete")
    group.add_argument("--clip-by", choices=norms, help="norm that --clip bounds; needed, and never global")
    group.add_argument("--accumulate", choices=sums, help="over micro-batches (default: projected, where possible)")
    group.add_argument("--basis-from", choices=("window", "micro-batch"), help="what fits a basis (default: window)")


def _add_data(group: argparse._ArgumentGroup) -> None:
    where = group.add_mutually_exclusive_group()
    where.add_argument("--text", metavar="PATH", help="a file or folder (default: the Python standard library)")
    where.add_argument("--dataset", metavar="NAME[:CONFIG]", help="a Hugging Face data set, streamed, as in allenai/c4")
    group.add_argument("--text-field", default="text", metavar="COLUMN", help="column of the data set (default: text)")
    group.add_argument("--tokenizer", metavar="NAME", help="of the Hugging Face hub (default: trained on the text)")
    group.add_argument("--val-fraction", type=minority, default=0.02, help="of the documents (default: 0.02)")
    group.add_argument("--val-tokens", type=count, metavar="N", help="at most, from the validation documents")
    group.add_argument("--cache", type=Path, default=Path("runs/cache"), help="of tokenizers and tokens")


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--out", type=Path, help="folder of the run (default: a new one in runs/)")
    group.add_argument("--resume", action="store_true", help="continue in --out, or in the newest run of this name")
    group.add_argument("--save-every", type=count, metavar="N", help="steps between checkpoints")
    group.add_argument("--eval-every", type=count, metavar="N", help="steps between validations")
    group.add_argument("--worker", type=Path, help=argparse.SUPPRESS)


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fill what was not given from the preset, then check what no single argument can."""
    preset = PRESETS[args.preset]
    for name in (*SIZES, *TEMPO):
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name))
    args.micro_batch = min(args.micro_batch, args.batch)
    if args.hidden % (2 * args.heads):
        raise PretrainError(f"--hidden must be a multiple of 2 * --heads, got {args.hidden} and {args.heads} heads")
    if args.vocab < SMALLEST_VOCAB and not args.tokenizer:
        raise PretrainError(f"--vocab must be at least {SMALLEST_VOCAB} (256 bytes and an end mark), got {args.vocab}")
    if args.compare and args.set:
        raise PretrainError("--set goes with --optimizer; under --compare write NAME:KEY=VALUE")
    if args.compare:
        args.optimizer = None  # its default means nothing then
    if args.amp != "none" and args.dtype != "fp32":
        raise PretrainError(
            f"--amp {args.amp} computes in 16 bits next to float32 weights, --dtype {args.dtype} has no such weights; "
            "leave one of them out"
        )
    _complete_backward(args)
    args.strategy, args.world = strategy.chosen(args.strategy)
    args.device = _device(args.device)
    return args


def _complete_backward(args: argparse.Namespace) -> None:
    given = [name for name in IN_BACKWARD if getattr(args, name) not in (None, "global")]
    if given and not args.step_in_backward:
        flag = f"--{given[0].replace('_', '-')}"
        raise PretrainError(f"{flag} {getattr(args, given[0])} needs --step-in-backward; add it, or leave {flag} out")
    if args.step_in_backward and (args.clip_by == "global" or (args.clip_by is None and args.clip)):
        raise PretrainError(
            f"--step-in-backward cannot clip (--clip {args.clip:g}) by the norm of all gradients, which is known only "
            "when most of them have been used. Add --clip-by delayed (by the norm of all in the step before), "
            "--clip-by tensor (each gradient by its own norm), or --clip 0"
        )
    if "clip_by" in given and not args.clip:
        raise PretrainError(f"--clip-by {args.clip_by} with --clip 0 clips nothing; leave one of them out")
    if (args.accumulate, args.basis_from) == ("whole", "micro-batch"):
        raise PretrainError(
            "--basis-from micro-batch with --accumulate whole: gradients are not projected before the window is "
            "complete, so bases are fitted to all of it anyway; leave one of them out"
        )
    for name, default in IN_BACKWARD.items():
        setattr(args, name, getattr(args, name) or default)
    if not args.step_in_backward:
        args.clip_by = "global"


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise PretrainError(f"--device must be cpu or cuda, got {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise PretrainError(f"--device {name}: torch {torch.__version__} finds no CUDA device here; use --device cpu")
    return name


def choices(args: argparse.Namespace) -> list[Choice]:
    if args.compare is None:
        return [optimizers.parse_choice(args.optimizer, args.set)]
    chosen = [optimizers.parse_choice(text) for text in optimizers.split(args.compare, ",")]
    labels = [choice.label for choice in chosen]
    for label in labels:
        if labels.count(label) > 1:
            raise PretrainError(f"--compare names {label} twice; give the second one other keywords")
    return chosen


def request(args: argparse.Namespace) -> Request:
    source = Source(args.text, args.dataset, args.text_field)
    return Request(source, args.vocab, args.tokenizer, args.sequence, args.val_fraction, args.val_tokens)


def job(args: argparse.Namespace, choice: Choice, corpus: Corpus) -> Job:
    same = (
        "preset",
        "device",
        "dtype",
        "seed",
        "warmup",
        "clip",
        "eval_every",
        "save_every",
        *SIZES,
        "amp",
        "step_in_backward",
        "warm_start",
        "strategy",
        "world",
    )
    settings = optimizers.settings(choice, PRESETS[args.preset], args.lr, args.dtype)
    return Job(
        label=choice.label,
        optimizer=choice.optimizer.__name__,
        corpus=str(corpus.folder.resolve()),
        corpus_digest=corpus.digest,
        **{name: getattr(args, name) for name in (*same, *IN_BACKWARD)} | {"vocab": corpus.vocab},
        **settings,
        restart_warmup=schedule.ramp(choice.optimizer, settings["keywords"], args.restart_warmup, args.warm_start),
        dense=_dense(args, choice),
    )


def _dense(args: argparse.Namespace, choice: Choice) -> dict[str, Any]:
    """Settings of the AdamW that trains during --warm-start."""
    if not args.warm_start:
        return {}
    flag, name = f"--warm-start {args.warm_start}", choice.optimizer.__name__
    if not optimizers.is_weight_space(choice.optimizer):
        raise PretrainError(f"{flag} is for methods that convert the model, such as ReLoRA, and {name} does not")
    if args.warm_start >= args.steps:
        raise PretrainError(f"{flag} leaves {name} none of --steps {args.steps}; make it smaller")
    if args.step_in_backward:
        raise PretrainError(
            f"{flag} trains with torch's AdamW, which cannot step in backward; leave it or --step-in-backward out"
        )
    return optimizers.settings(optimizers.parse_choice("adamw"), PRESETS[args.preset], None, args.dtype)
