"""What a step costs where tensors are so small that only Python counts: `python -m benchmarks.host_time [--rounds 41]`.

Microseconds per tensor, of one thread's CPU time: 200 matrices 16 x 32 at rank 4 between refreshes, and 200 vectors of
512 elements, beside torch's fused AdamW and galore-torch, where that is installed. All in one process, in turns; ratios
are taken round by round and their median reported.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_optim
from benchmarks import peers, record
from benchmarks.native import seconds

COUNT = 200
GAP = 10**6
KINDS: dict[str, tuple[int, ...]] = {"matrices": (16, 32), "vectors": (512,)}
OURS: dict[str, dict[str, Any]] = {
    "GaLoreAdamW": {},
    "GaLoreAdamW, bfloat16 weights": {"dtype": torch.bfloat16},
    "FiraAdamW": {},
    "APOLLO": {},
    "APOLLOMini": {},
    "Flora": {},
    "SNSMAdamW": {},
    "FRUGAL": {},
    "DCTAdamW": {},
    "LDAdamW": {},
}


def contestants(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    found = {"AdamW(fused)": _step(functools.partial(torch.optim.AdamW, lr=1e-3, fused=True), shape)}
    for name, options in OURS.items():
        method = getattr(lowrank_optim, name.split(",")[0])
        found[name] = _step(lambda params, method=method: method(_groups(params), lr=1e-3), shape, **options)
    try:
        theirs = peers.galore_torch().GaLoreAdamW
        found["galore-torch"] = _step(
            lambda params: theirs(_groups(params), lr=1e-3, no_deprecation_warning=True), shape
        )
    except ImportError:
        pass
    return found


def _step(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Callable[[], Any]:
    params: list[Tensor] = [nn.Parameter(torch.randn(shape, dtype=dtype)) for _ in range(COUNT)]
    for p in params:
        p.grad = torch.randn_like(p)
    step: Callable[[], Any] = make(params).step
    step()
    return step


def _groups(params: list[Tensor]) -> list[dict[str, Any]]:
    """Of matrices, or of vectors and the one matrix that a low-rank optimizer wants, without a gradient."""
    projected = {"rank": 4, "update_proj_gap": GAP, "scale": 1.0, "proj_type": "std"}
    if params[0].dim() > 1:
        return [{"params": params, **projected}]
    return [{"params": [nn.Parameter(torch.randn(16, 32, dtype=params[0].dtype))], **projected}, {"params": params}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Any] = {"count": COUNT}
    for kind, shape in KINDS.items():
        runs = contestants(shape)
        rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(arguments.rounds)]
        base = "galore-torch" if "galore-torch" in runs else "AdamW(fused)"
        found[kind] = {}
        for name in runs:
            each = 1e6 / COUNT * statistics.median(row[name] for row in rounds)
            ratio = statistics.median(row[name] / row[base] for row in rounds)
            found[kind][name] = {"us": each, f"over {base}": ratio}
            print(f"{kind:10}{name:32}{each:8.1f} us each, {ratio:.2f} of {base}", flush=True)
    record.write("host_time", found)


if __name__ == "__main__":
    main()
