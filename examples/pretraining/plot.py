"""The loss curves and the memory of all runs, as one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from .job import Job
from .log import read

COLORS = ("#4269d0", "#ff725c", "#3ca951", "#a463f2", "#efb118", "#6cc5b0", "#9c6b4e", "#9498a0")
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "font.size": 10,
    "legend.frameon": False,
}
PARTS = (("weights", "weights", 0.35), ("gradients", "gradients", 0.6), ("optimizer_measured", "optimizer state", 1.0))


def draw(results: list[dict[str, Any]], folders: list[Path], path: Path) -> None:
    job = results[0]["job"]
    height = max(4.6, 2.6 + 0.5 * len(results))
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, height), width_ratios=(3, 2), layout="constrained")
        size = f"{results[0]['parameters'] / 1e6:.1f} M parameters"
        title = f"LLaMA {job['preset']}: {size}, {job['steps']:,} steps, {_mode(Job.from_dict(job))}"
        figure.suptitle(title, fontsize=13, fontweight="bold")
        for result, folder, color in zip(results, folders, _colors(len(results)), strict=True):
            _curve(left, result, [row["loss"] for row in read(folder / "log.jsonl")], color)
        _finish_curves(left)
        _bars(right, results)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _mode(job: Job) -> str:
    products = "" if job.amp == "none" else f" with {job.amp} products"
    return job.dtype + products + (", stepping in backward" if job.step_in_backward else "")


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _curve(axes: Axes, result: dict[str, Any], losses: list[float], color: str) -> None:
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color=color, alpha=0.15, linewidth=0.8)
    label = f"{result['label']}  ({result['validation_loss']:.3f})"
    axes.plot(steps, smooth(losses), color=color, linewidth=1.8, label=label)
    axes.plot(
        *zip(*result["validation"], strict=True), "o", color=color, markeredgecolor="white", markersize=6.5, zorder=3
    )


def smooth(losses: list[float], span: float = 0.015) -> list[float]:
    """Exponential average over about `span` of the run on either side, so that it does not lag."""
    keep = 1 - 1 / max(1.0, span * len(losses))
    back, ahead = _sums(losses, keep), _sums(losses[::-1], keep)[::-1]
    return [(s + t - x) / (v + w - 1) for (s, v), (t, w), x in zip(back, ahead, losses, strict=True)]


def _sums(losses: list[float], keep: float) -> list[tuple[float, float]]:
    """Weighted sum of all losses up to each one, and the sum of the weights."""
    total, weight, sums = 0.0, 0.0, []
    for loss in losses:
        total, weight = keep * total + loss, keep * weight + 1
        sums.append((total, weight))
    return sums


def _finish_curves(axes: Axes) -> None:
    axes.set(xlabel="step", ylabel="loss per token (nats)", title="Training loss (lines) and validation loss (dots)")
    axes.set_xlim(left=0)
    axes.legend(title="optimizer (final validation loss)", alignment="left")


def _bars(axes: Axes, results: list[dict[str, Any]]) -> None:
    """Weights, gradients and optimizer state side by side in one bar per run, the first run on top."""
    unit, name = _unit(max(map(_total, results)))
    widest = max(map(_total, results)) / unit
    for place, (result, color) in enumerate(zip(results, _colors(len(results)), strict=True)):
        start = 0.0
        for key, part, strength in PARTS:
            size = result["bytes"][key] / unit
            axes.barh(
                place, size, left=start, height=0.6, color=_tint(color, strength), edgecolor="white", linewidth=1.5
            )
            if size > 0.14 * widest:
                ink = "white" if strength == 1.0 else "black"
                axes.text(
                    start + size / 2, place, f"{part}\n{size:.1f}", ha="center", va="center", fontsize=8, color=ink
                )
            start += size
        axes.text(start + 0.01 * widest, place, f"{start:.1f}", va="center", fontweight="bold")
    axes.set(title="Memory beside activations", xlabel=name, xlim=(0, 1.1 * widest))
    axes.set_yticks(range(len(results)), [result["label"].replace(" ", "\n") for result in results])
    axes.set_ylim(max(len(results), 2) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _tint(color: str, strength: float) -> tuple[float, ...]:
    """Mixed with white; transparency would let the grid through."""
    return tuple(1 - strength * (1 - part) for part in to_rgb(color))


def _total(result: dict[str, Any]) -> float:
    return float(sum(result["bytes"][key] for key, _, _ in PARTS))


def _unit(size: float) -> tuple[float, str]:
    return (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
