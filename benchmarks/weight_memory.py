"""Weights, gradients and state of methods that change how weights are kept: `python -m benchmarks.weight_memory`.

The paper's LLaMA on the meta device: weights, gradients and state in bfloat16, quantized bases in NF4. Beside it what
papers publish: weights and state, in GB or in GiB, whichever their figures turn out to be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lowrank_optim
from benchmarks import llama, record
from benchmarks.memory import SIZES, table

METHODS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "torch AdamW": (torch.optim.AdamW, {}),
    "GaLoreAdamW": (lowrank_optim.GaLoreAdamW, {}),
    "ReLoRA": (lowrank_optim.ReLoRA, {}),
    "ReLoRA, NF4": (lowrank_optim.ReLoRA, {"base": "nf4"}),
    "LTE, one head": (lowrank_optim.LTE, {"heads": 1}),
    "SST, rank 64 (7B: 256)": (lowrank_optim.SST, {}),
    "SLTrain": (lowrank_optim.SLTrain, {"density": 0.03}),
    "LowRankAdamW": (lowrank_optim.LowRankAdamW, {}),
    "LoQT": (lowrank_optim.LoQT, {}),
    "LoQT, dense": (lowrank_optim.LoQT, {"base": "dense"}),
}
GB, GIB = 1e9, 2.0**30
# Weights and state; method, unit, figures from 60M to 1B, source.
PUBLISHED = [
    ("torch AdamW", GB, (0.35, 0.81, 2.21, 8.04), "SLTrain, arXiv 2406.02214"),
    ("LowRankAdamW", GB, (0.26, 0.56, 1.11, 3.66), "SLTrain"),
    ("SLTrain", GB, (0.26, 0.60, 1.24, 4.16), "SLTrain; 8 bytes per place, ours 4"),
    ("ReLoRA", GB, (0.36, 0.80, 1.76, 6.17), "GaLore, arXiv 2403.03507"),
    ("LoQT", GIB, (0.23, 0.49, 0.98, 3.16), "LoQT, arXiv 2405.16528"),
    ("LoQT, dense", GIB, (0.28, 0.63, 1.47, 5.11), "LoQT"),
]


class Shapes(nn.Module):
    """A model of the right shapes: linear layers, an embedding, norms."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            kind = name.replace(".", "_")
            if len(shape) == 1:
                self.register_parameter(kind, nn.Parameter(torch.empty(shape)))
            else:
                make = nn.Embedding(*shape) if "embed" in name else nn.Linear(shape[1], shape[0], bias=False)
                self.add_module(kind, make)


def estimate(size: str, name: str) -> dict[str, Any]:
    """Bytes of one method at one size."""
    hidden, mlp, layers, rank = SIZES[size]
    optimizer, options = METHODS[name]
    if issubclass(optimizer, lowrank_optim.LowRankOptimizer):
        options = {**options, "rank": max(64, rank // 4) if name.startswith("SST") else rank}
        options["state_dtype"] = "bfloat16"
    with torch.device("meta"):
        model = Shapes(llama.shapes(hidden, mlp, layers))
    found = lowrank_optim.estimate_memory(model, optimizer, dtype=torch.bfloat16, **options)
    row = {"size": size, "method": name, "options": options, "weights": found.weights, "optimizer": found.optimizer}
    return row | {"gradients": _kept_gradients(size, name, found.gradients)}


def _kept_gradients(size: str, name: str, all_at_once: int) -> int:
    """Of a step without a new subspace: LoQT's first step has gradients of whole weights as well."""
    if not name.startswith("LoQT"):
        return all_at_once
    hidden, mlp, layers, _ = SIZES[size]
    whole = [shape for shape in llama.shapes(hidden, mlp, layers).values() if len(shape) == 2][1:-1]
    return all_at_once - 2 * sum(m * n for m, n in whole)


def main() -> None:
    sizes = [size for size in SIZES if size != "130M"]  # which is there for what is published
    rows = [estimate(size, name) for name in METHODS for size in SIZES]
    found = {(row["method"], row["size"]): row for row in rows}

    def cell(row: dict[str, Any]) -> str:
        parts = [row[key] / GIB for key in ("weights", "gradients", "optimizer")]
        return f"{sum(parts):.2f} ({' + '.join(f'{part:.2f}' for part in parts)})"

    print("Weights + gradients + state, GiB; all in bfloat16, quantized bases in NF4\n")
    print(table(["", *sizes], [[name, *(cell(found[name, size]) for size in sizes)] for name in METHODS]), "\n")
    print("Weights and state, published beside ours\n")
    published = []
    for name, unit, figures, source in PUBLISHED:
        for size, figure in zip(("60M", "130M", "350M", "1B"), figures, strict=True):
            row = found[name, size]
            ours = (row["weights"] + row["optimizer"]) / unit
            published.append({"method": name, "size": size, "ours": ours, "published": figure, "source": source})
    lines = [
        [row["method"], row["size"], f"{row['ours']:.2f}", f"{row['published']:.2f}", row["source"]]
        for row in published
    ]
    print(table(["", "size", "ours", "published", "where"], lines))
    record.write("weight_memory", {"rows": rows, "published": published})


if __name__ == "__main__":
    main()
