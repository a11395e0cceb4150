"""Optimizer memory at the paper's sizes, on the meta device: `python -m benchmarks.memory`.

Beside it the optimizer memory that the GaLore paper publishes, which its configurations do not reproduce
(jiaweizzhao/GaLore issue 67).
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import llama, record
from lowrank_optim import GaLoreAdafactor, GaLoreAdamW, estimate_memory

# hidden, mlp, layers, rank, GB of optimizer states in the paper's table 2 (bfloat16)
SIZES: dict[str, tuple[int, int, int, int, float | None]] = {
    "60M": (512, 1376, 8, 128, 0.13),
    "130M": (768, 2048, 12, 256, 0.28),
    "350M": (1024, 2736, 24, 256, 0.54),
    "1B": (2048, 5461, 24, 512, 1.78),
    "7B": (4096, 11008, 32, 1024, None),
}


def main() -> None:
    rows: list[dict[str, Any]] = []
    print("GiB, all in bfloat16  weights  AdamW  GaLoreAdamW  GaLoreAdafactor  (paper's GaLore, GB)")
    for size, (hidden, mlp, layers, rank, published) in SIZES.items():
        model, common = llama.shapes(hidden, mlp, layers), {"dtype": torch.bfloat16}
        low = {**common, "rank": rank, "state_dtype": "bfloat16"}
        adamw = estimate_memory(model, torch.optim.AdamW, **common)
        galore, factored = (estimate_memory(model, method, **low) for method in (GaLoreAdamW, GaLoreAdafactor))
        row = {"weights": adamw.weights, "adamw": adamw.optimizer, "galore_adamw": galore.optimizer}
        row |= {"galore_adafactor": factored.optimizer}
        rows.append({"size": size, "rank": rank, "published_gb": published, "bytes": row})
        print(f"{size:<20}", *(f"{value / 2**30:9.2f}" for value in row.values()), f"   ({published})")
    record.write("memory", {"rows": rows})


if __name__ == "__main__":
    main()
