"""The tables of docs/distributed.md: `python -m benchmarks.distributed_table` writes them into the page.

Numbers are estimates on the meta device (tests hold them against measured bytes), the matrix is filled by training in
two processes (tests/support/matrix.py): nothing here is written by hand.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import llama
from lowrank_optim import APOLLO, GaLoreAdamW, MemoryEstimate, estimate_memory
from lowrank_optim.memory import planned, planned_zero

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
_MATRIX = (4100, 4100, 1024)  # rows, columns, rank of the matrix whose traffic is shown; ZeRO-3 cuts within its rows
LAYOUTS = {'FSDP2, `"right"`': ("right", 0), 'FSDP2, `"left"`': ("left", 0), 'ZeRO-3, `"right"`': ("right", 3)}


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


def matrix() -> str:
    """{method} x {wrapper} as trained: yes, or why not. Takes minutes, and needs DeepSpeed."""
    from tests.support import matrix

    return matrix.table(matrix.run())


def traffic() -> str:
    """What one matrix sends, in percent of its float32 gradient, and the number of collectives."""
    from tests.cases import CASES

    head = ("method", *(f"{name}, {what}" for name in LAYOUTS for what in ("per step", "per refresh")))
    rows = [(f"`{case.make.__name__}`", *(cell for where in LAYOUTS for cell in _sent(case, where))) for case in CASES]
    return _table(head, rows, 1)


def _sent(case: Any, where: str) -> tuple[str, str]:
    m, n, rank = _MATRIX
    side, zero = LAYOUTS[where]
    if case.has("proj_type") and not case.has("proj_type", side):
        return "-", "-"
    own = {**case.kwargs, **case.fitting({"rank": rank, "proj_type": side})}
    optimizer = case.make([("w", torch.nn.Parameter(torch.empty(m, n, device="meta")))], **own)
    try:
        if zero:
            next(planned_zero.rank_by_rank(optimizer, zero, WORLD))
        else:
            planned.lay_out(optimizer, WORLD)
    except NotImplementedError:
        return "-", "-"
    one = planned.traffic(optimizer)
    return _share(one.per_step, one.messages), _share(one.per_refresh, one.refresh_messages)


def _share(size: float | None, messages: int) -> str:
    m, n, _ = _MATRIX
    return "?" if size is None else f"{size / (4 * m * n):.2%} in {messages}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], words: int = 2) -> str:
    """`words`: columns that are no numbers."""
    lines = [head, tuple("---" if i < words else "---:" for i in range(len(head))), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    **{f"numbers {model}": functools.partial(numbers, model) for model in MODELS},
    "traffic": traffic,
    "matrix": matrix,
}


def written(page: str, names: Iterable[str] | None = None) -> str:
    """The page with its tables, or some of them, made anew."""
    for name in TABLES if names is None else names:
        pattern = rf"(?s)(<!-- table: {name} -->\n).*?(\n<!-- end -->)"
        page, found = re.subn(pattern, lambda match, name=name: match[1] + TABLES[name]() + match[2], page)
        if found != 1:
            raise ValueError(f"the page has {found} places for the table {name!r}; expected <!-- table: {name} -->")
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    print(f"wrote the tables of {PAGE.relative_to(ROOT)}")
