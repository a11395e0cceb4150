"""The tables of docs/distributed.md: `python -m benchmarks.distributed_table` writes them into the page.

Numbers are estimates on the meta device (tests hold them against measured bytes), support is what the code itself
refuses: nothing here is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import llama
from lowrank_optim import APOLLO, GaLoreAdamW, MemoryEstimate, estimate_memory

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "distributed.md"
WORLD, GAP = 8, 200
MODELS = {  # shapes, rank
    "7B": (llama.shapes(4096, 11008, 32), 1024),
    "70B": (llama.shapes(8192, 28672, 80, keys=1024), 2048),
}
STRATEGIES = {
    "ddp": "DDP",
    "ddp_project": "DDP, `ddp_project`",
    "fsdp2": "FSDP2",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "torch AdamW": (torch.optim.AdamW, {}),
    "GaLoreAdamW": (GaLoreAdamW, {"state_dtype": "bfloat16"}),
    'GaLoreAdamW, `proj_type="right"`': (GaLoreAdamW, {"state_dtype": "bfloat16", "proj_type": "right"}),
    'APOLLO, `proj_type="right"`': (APOLLO, {"state_dtype": "bfloat16", "proj_type": "right"}),
}
_MATRIX = (4096, 4096, 1024)  # rows, columns, rank of the matrix whose traffic is shown


def numbers(model: str) -> str:
    shapes, rank = MODELS[model]
    head = ("method", "strategy", "weights", "gradients", "masters", "state", "sent per step", "with refreshes")
    rows = []
    for method, (make, options) in METHODS.items():
        for strategy, name in STRATEGIES.items():
            own = {} if make is torch.optim.AdamW else {**options, "rank": rank}
            if strategy != "ddp_project" or make is GaLoreAdamW:
                sharing: dict[str, Any] = {"world_size": WORLD, "strategy": strategy, "dtype": torch.bfloat16}
                rows.append((method, name, *_sizes(estimate_memory(shapes, make, **sharing, **own))))
    return _table(head, rows)


def _sizes(one: MemoryEstimate) -> Iterator[str]:
    step, refresh = one.sent_per_step, one.sent_per_refresh
    average = None if step is None or refresh is None else step + refresh / GAP
    for size in (one.weights, one.gradients, one.masters, one.optimizer, step, average):
        yield "?" if size is None else f"{size / 2**30:.2f}"


def support() -> str:
    """{method} x {wrapper}: yes, or why not."""
    sys.path[:0] = [str(ROOT / "tests")]
    from cases import CASES

    head = ("method", "DDP", "`ddp_project`", "FSDP2", 'FSDP2, `proj_type="right"`', "sent per step", "per refresh")
    rows = []
    for case in CASES:
        answers = [_answer(case, strategy) for strategy in ("ddp", "ddp_project", "fsdp2")]
        right = _answer(case, "fsdp2", proj_type="right") if case.has("proj_type", "right") else "-"
        rows.append((f"`{case.make.__name__}`", *answers, right, *(_sent(case) if right == "yes" else ("-", "-"))))
    return _table(head, rows, 5)


def _answer(case: Any, strategy: Any, **options: Any) -> str:
    own = {**case.kwargs, **case.fitting({"rank": 16, **options})}
    refusal = ValueError if strategy == "ddp_project" else NotImplementedError
    try:
        estimate_memory({"tall": (96, 64), "wide": (64, 96)}, case.make, world_size=2, strategy=strategy, **own)
    except refusal as error:
        return "no: " + str(error).partition(": ")[2].partition(". ")[0]
    return "yes"


def _sent(case: Any) -> tuple[str, ...]:
    """Under FSDP2 with the right side, as parts of a float32 gradient."""
    m, n, rank = _MATRIX
    own = {**case.kwargs, **case.fitting({"rank": rank, "proj_type": "right"})}
    one = estimate_memory({"w": (m, n)}, case.make, world_size=WORLD, strategy="fsdp2", **own)
    sizes = one.sent_per_step, one.sent_per_refresh
    return tuple("?" if size is None else f"{size / (4 * m * n):.2%}" for size in sizes)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], words: int = 2) -> str:
    """`words`: columns that are no numbers."""
    lines = [head, tuple("---" if i < words else "---:" for i in range(len(head))), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def written(page: str) -> str:
    """The page with its tables made anew."""
    tables = {**{f"numbers {model}": lambda model=model: numbers(model) for model in MODELS}, "support": support}
    for name, make in tables.items():
        pattern = rf"(?s)(<!-- table: {name} -->\n).*?(\n<!-- end -->)"
        page, found = re.subn(pattern, lambda match, make=make: match[1] + make() + match[2], page)
        if found != 1:
            raise ValueError(f"the page has {found} places for the table {name!r}; expected <!-- table: {name} -->")
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    print(f"wrote the tables of {PAGE.relative_to(ROOT)}")
