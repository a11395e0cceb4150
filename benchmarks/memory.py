"""Optimizer memory at the paper's sizes, on the meta device: `python -m benchmarks.memory`.

Weights and state in bfloat16, but for methods whose state is int8 by themselves. Beside it what papers publish: their
own estimates, of which GaLore's are not what its configurations give (jiaweizzhao/GaLore issue 67).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import llama, methods, record
from lowrank_optim import estimate_memory
from lowrank_optim.layers.quantized import Int8Weight
from lowrank_optim.recipe.plan import names_say

SIZES = {  # hidden, mlp, layers, rank
    "60M": (512, 1376, 8, 128),
    "130M": (768, 2048, 12, 256),
    "350M": (1024, 2736, 24, 256),
    "1B": (2048, 5461, 24, 512),
    "7B": (4096, 11008, 32, 1024),
}
# Beside the defaults: bfloat16 for what a method keeps in a dtype of its own.
OPTIONS: dict[str, dict[str, Any]] = {"LDAdamW": {"error_feedback": "bfloat16"}}
INT8_WEIGHTS = "QGaLoreAdamW"  # trains weights of linear layers in int8
OPTIMIZER, BOTH = "optimizer", "weights + optimizer"


@dataclass(frozen=True)
class Published:
    """Figures by size in "G", as the papers write; whether GB or GiB they do not say."""

    method: str
    what: str
    figures: dict[str, float]
    source: str
    rank: float = 1.0  # times the size's, where it is another one


def _four(*figures: float) -> dict[str, float]:
    return dict(zip(("60M", "130M", "350M", "1B"), figures, strict=True))


_GALORE, _APOLLO, _QGALORE = "arXiv 2403.03507", "arXiv 2412.05270", "arXiv 2407.08296"
_COAP, _SNSM = "README of COAP's examples", "README of the code of arXiv 2411.07120"
PUBLISHED = [
    Published("torch AdamW", BOTH, _four(0.36, 0.76, 2.06, 7.80), _GALORE),
    Published("torch AdamW", OPTIMIZER, {"1B": 4.99}, _SNSM),
    Published("GaLoreAdamW", BOTH, _four(0.24, 0.52, 1.22, 4.38), _GALORE),
    Published("GaLoreAdamW", OPTIMIZER, _four(0.13, 0.28, 0.54, 1.78), _GALORE),
    Published("GaLoreAdamW", OPTIMIZER, {"1B": 1.94}, _COAP),
    Published("GaLoreAdamW8bit", BOTH, {"7B": 18.0}, _GALORE),
    Published("GaLoreAdamW8bit", OPTIMIZER, {"7B": 5.25}, _COAP),
    Published("QGaLoreAdamW", BOTH, {**_four(0.18, 0.39, 0.88, 3.08), "7B": 15.0}, _QGALORE),
    Published("APOLLO", BOTH, _four(0.24, 0.52, 1.22, 4.38), _APOLLO),
    Published("APOLLO", BOTH, _four(0.18, 0.39, 0.95, 3.49), f"{_APOLLO}, half the rank", 0.5),
    Published("APOLLO", OPTIMIZER, {"7B": 1.6}, f"{_APOLLO}, rank 256", 0.25),
    Published("APOLLOMini", BOTH, _four(0.12, 0.25, 0.69, 2.60), _APOLLO),
    Published("APOLLOMini", OPTIMIZER, {"7B": 0.0}, _APOLLO),
    Published("SubsetNormAdamW", OPTIMIZER, {"1B": 2.62}, _SNSM),
    Published("SNSMAdamW", OPTIMIZER, {"1B": 0.84}, f"{_SNSM}; without its bases"),
]


def estimate(size: str, name: str, share: float = 1.0) -> dict[str, Any]:
    """Bytes of one method at one size; `share` of the size's rank."""
    hidden, mlp, layers, rank = SIZES[size]
    shapes = llama.shapes(hidden, mlp, layers)
    optimizer, options = {**methods.TORCH, **methods.OURS}[name]
    options = {**options, **OPTIONS.get(name, {})}
    if methods.ranked(optimizer):
        options["rank"] = round(rank * share)
    if methods.default(optimizer, "state_dtype") == "float32":
        options["state_dtype"] = "bfloat16"
    found = estimate_memory(shapes, optimizer, dtype=torch.bfloat16, **options)
    shared = getattr(found, "shared", 0)
    weights = _int8_weights(shapes) if name == INT8_WEIGHTS else found.weights
    row = {"size": size, "method": name, "options": options, "weights": weights}
    row |= {"states": found.states, "bases": found.bases, "shared": shared}
    return row | {"optimizer": found.states + found.bases + shared}


def _int8_weights(shapes: dict[str, tuple[int, ...]]) -> int:
    """Of `quantize_weights`: linear layers but the head in int8, the rest in bfloat16."""
    total = 0
    for name, shape in shapes.items():
        weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        quantized = len(shape) == 2 and not names_say(name)
        total += Int8Weight.quantize(weight).stored_bytes() if quantized else weight.nbytes
    return total


def compare(published: Published) -> list[dict[str, Any]]:
    """One row per size, with our bytes of the same thing."""
    rows = []
    for size, figure in published.figures.items():
        row = estimate(size, published.method, published.rank)
        ours = row["optimizer"] + (row["weights"] if published.what == BOTH else 0)
        about = {"size": size, "method": published.method, "what": published.what, "options": row["options"]}
        rows.append({**about, "bytes": ours, "published_g": figure, "source": published.source})
    return rows


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _figures(row: dict[str, Any]) -> list[str]:
    return [f"{x:.2f}" for x in (row["bytes"] / 2**30, row["bytes"] / 1e9, row["published_g"])]


def main() -> None:
    sizes = [size for size in SIZES if size != "130M"]  # which is there for what is published
    names = [*methods.TORCH, *methods.OURS]
    rows = [estimate(size, name) for name in names for size in sizes]
    for row in rows:
        adamw = next(r for r in rows if (r["size"], r["method"]) == (row["size"], "torch AdamW"))
        row["over_adamw"] = row["optimizer"] / adamw["optimizer"]
    found = {(row["method"], row["size"]): row for row in rows}
    ranks = [f"{size}, rank {SIZES[size][3]}" for size in sizes]
    print(
        "Optimizer memory, GiB (over that of AdamW); weights and state in bfloat16, or int8 where the method has it\n"
    )
    cells = [
        [
            name,
            *(f"{row['optimizer'] / 2**30:.2f} ({row['over_adamw']:.3f})" for row in (found[name, s] for s in sizes)),
        ]
        for name in names
    ]
    weights = ["weights", *(f"{found[names[0], size]['weights'] / 2**30:.2f}" for size in sizes)]
    print(table(["", *ranks], [weights, *cells]), "\n")
    shared = [f"{row['size']} {row['shared'] / 2**20:.0f} MiB" for row in rows if row["shared"]]
    print(f"of which dictionaries that matrices share: {', '.join(shared)}\n" if shared else "", end="")
    print("Published beside ours\n")
    comparison = [row for published in PUBLISHED for row in compare(published)]
    cells = [[row["method"], row["size"], row["what"], *_figures(row), row["source"]] for row in comparison]
    print(table(["", "size", "of", "ours, GiB", "GB", "published, G", "where"], cells))
    record.write("memory", {"rows": rows, "published": comparison})


if __name__ == "__main__":
    main()
