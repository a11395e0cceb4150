"""What came out: a table for the eye, `summary.json` for programs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from lowrank_optim.reports.report import human

from .optimizers import find, is_weight_space

HEAD = (
    "optimizer",
    "lr",
    "state",
    "predicted",
    "vs AdamW",
    "total",
    "peak",
    "in optimizer",
    "tokens/s",
    "validation loss",
)


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    size, share = result["bytes"], result["optimizer_share_of_time"]
    return (
        result["label"],
        _rates(result["job"]),
        human(size["optimizer_measured"]),
        human(size["optimizer_predicted"]),
        f"{size['optimizer_measured'] / size['optimizer_predicted_adamw']:.3f}",
        _total(size),
        human(size["peak"]),
        "in backward" if share is None else f"{share:.1%}",
        f"{result['tokens_per_second']:,.0f}",
        f"{result['validation_loss']:.4f}",
    )


def _total(size: dict[str, Any]) -> str:
    """Weights, gradients and state, as measured; what backward uses at once is not, hence the mark."""
    weights, gradients = (size.get(f"{what}_measured") for what in ("weights", "gradients"))
    known = (size["weights"] if weights is None else weights) + size["optimizer_measured"]
    return human(known + gradients) if gradients is not None else f"~{human(known + size['gradients'])}"


def _rates(job: dict[str, Any]) -> str:
    """The peak lr of embeddings, head and vectors, and that of the matrices where a factor makes it another."""
    if is_weight_space(find(job["optimizer"])):  # whose lr is that of the matrices
        rest = job["keywords"].get("rest_lr")
        return f"{job['lr']:g}" if rest in (None, job["lr"]) else f"{rest:g}, matrices {job['lr']:g}"
    scale = job["keywords"].get("scale", 1.0)
    factor = job["matrix_lr_scale"] * (scale**0.5 if job["optimizer"].lower().startswith("apollo") else scale)
    return f"{job['lr']:g}" if factor == 1 else f"{job['lr']:g}, matrices {job['lr'] * factor:g}"


def table(results: list[dict[str, Any]], failed: list[str]) -> str:
    """One row per run; the first column to the left, numbers to the right."""
    rows = [HEAD, *map(_row, results), *((label, *["-"] * (len(HEAD) - 2), "failed") for label in failed)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = [
        "  ".join(_pad(cell, w, i == 0) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _pad(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def write(path: Path, results: list[dict[str, Any]], failed: list[str], command: str, config: dict[str, Any]) -> None:
    content = {
        "command": command,
        "config": config,
        "versions": _versions(),
        "machine": _machine(),
        "runs": results,
        "failed": failed,
    }
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=2, default=str) + "\n")
    os.replace(part, path)


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "tokenizers", "datasets", "lowrank_optim")
    return {"python": sys.version.split()[0], **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(name), "__version__", "unknown"))


def _machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return {"cpu": _cpu(), "cores": cores, "threads": threads, "gpu": gpu, "system": platform.platform()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
