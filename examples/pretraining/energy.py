"""How much of each gradient the subspaces capture, matrix by matrix, as one PNG."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure

from .log import read
from .plot import STYLE

NAME = re.compile(r"^captured_energy/.*?\.(\d+)\..*?(\w+?)(?:_proj)?\.weight$")  # its layer and its kind
KINDS = ("q", "k", "v", "o", "gate", "up", "down")  # in the order in which a layer uses them
DEPTH = LinearSegmentedColormap.from_list("depth", ["#efb118", "#ff725c", "#a463f2", "#27408b"])  # of plot.COLORS
LEAST_LOST = 1e-4  # the picture ends at a share of 99.99 %

Point = tuple[int, float]  # (step, captured energy)
Curves = dict[str, dict[int, list[Point]]]  # by kind of matrix, then by layer


def draw(results: list[dict[str, Any]], folders: list[Path], path: Path) -> bool:
    """One row of panels per optimizer that tells its captured energy; False, and no file, if none does."""
    found = [
        (result, curves(read(folder / "statistics.jsonl"))) for result, folder in zip(results, folders, strict=True)
    ]
    found = [(result, panels) for result, panels in found if panels]
    if found:
        with plt.rc_context(STYLE):
            figure = _figure(found)
            figure.savefig(path, dpi=150)
            plt.close(figure)
    return bool(found)


def curves(rows: list[dict[str, Any]]) -> Curves:
    """One point per refresh: between two of them the number stays what it was."""
    found: Curves = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for key, value in row.items():
            name = NAME.match(key)
            if name is None:
                continue
            points = found[name[2]][int(name[1])]
            if not points or points[-1][1] != value:
                points.append((row["step"], value))
    return found


def _figure(found: list[tuple[dict[str, Any], Curves]]) -> Figure:
    kinds = sorted({kind for _, panels in found for kind in panels}, key=lambda kind: (_place(kind), kind))
    layers = 1 + max(layer for _, panels in found for lines in panels.values() for layer in lines)
    size = (1.2 + 1.75 * len(kinds), 1.2 + 2.1 * len(found))
    figure, grid = plt.subplots(
        len(found), len(kinds), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    figure.suptitle("Energy of the gradients that their subspaces capture, at each refresh", fontweight="bold")
    for row, (result, panels) in zip(grid, found, strict=True):
        row[0].set_ylabel(result["label"].replace(" ", "\n"))
        for axes, kind in zip(row, kinds, strict=True):
            _panel(axes, panels[kind], layers)
    _shares_axis(grid[0][0])
    for axes, kind in zip(grid[0], kinds, strict=True):
        axes.set_title(kind)
    for axes in grid[-1]:
        axes.set(xlabel="step", xlim=(0, found[0][0]["job"]["steps"]))
    _depth_bar(figure, grid, layers)
    return figure


def _place(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def _panel(axes: Axes, lines: dict[int, list[Point]], layers: int) -> None:
    for layer, points in sorted(lines.items()):
        steps, shares = zip(*points, strict=True)
        lost = [max(1 - share, LEAST_LOST) for share in shares]
        look: Any = {"color": _shade(layer, layers), "linewidth": 1.4, "markersize": 3.5, "markeredgewidth": 0.4}
        axes.plot(steps, lost, "o-", markeredgecolor="white", clip_on=False, **look)


def _shares_axis(axes: Axes) -> None:
    """Logarithmic in what is lost, since most shares are near 1; more is still higher."""
    axes.set(yscale="log", ylim=(1, LEAST_LOST))
    axes.set_yticks([1, 1e-1, 1e-2, 1e-3, 1e-4], ["0", "90 %", "99 %", "99.9 %", "99.99 %"])
    axes.set_yticks([0.5], ["50 %"], minor=True)
    axes.tick_params(axis="y", which="both", length=0)


def _shade(layer: int, layers: int) -> Any:
    return DEPTH(layer / max(1, layers - 1))


def _depth_bar(figure: Figure, grid: Any, layers: int) -> None:
    shades = ListedColormap([_shade(layer, layers) for layer in range(layers)])
    edges = BoundaryNorm([layer - 0.5 for layer in range(layers + 1)], layers)
    bar = figure.colorbar(ScalarMappable(edges, shades), ax=grid, label="layer", pad=0.01, aspect=15 * len(grid))
    bar.set_ticks(range(0, layers, max(1, layers // 8)))
    bar.minorticks_off()
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
