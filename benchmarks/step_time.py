"""The cost of a step beside torch's AdamW and galore-torch: `python -m benchmarks.step_time [--model 60m|h1024]`.

All optimizers step alternately in one process on the same gradients; the ratio to fused AdamW is taken round by round
and its median reported, so that a noisy machine disturbs all of them alike. A refresh step is one in which every basis
is recomputed; amortised over the gap, `steady + (refresh - steady) / gap`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import lowrank_optim
from benchmarks import llama, peers, record

GAP = 200
NEVER = 10**9
MODELS = {  # hidden, mlp, layers, vocabulary, rank
    "60m": (512, 1376, 8, 32000, 128),
    "h1024": (1024, 2736, 2, 256, 256),
    "tiny": (64, 128, 2, 256, 16),
}


class Contestant:
    """One optimizer on its own copy of the parameters, all with the same gradients."""

    def __init__(self, name: str, grads: dict[str, torch.Tensor], make: Callable[[Any, int], Any]) -> None:
        self.name = name
        self.params = {key: nn.Parameter(torch.zeros_like(grad)) for key, grad in grads.items()}
        for key, p in self.params.items():
            p.grad = grads[key]
        self.optimizer = make(self.params, GAP)

    def step(self) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        self.optimizer.step()
        return time.perf_counter() - wall, time.process_time() - cpu

    def refresh(self) -> tuple[float, float]:
        """One step in which all bases are due, for those that have any."""
        self._set_gap(1)
        took = self.step()
        self._set_gap(NEVER)
        return took

    def _set_gap(self, gap: int) -> None:
        for group in self.optimizer.param_groups:
            if "update_proj_gap" in group:
                group["update_proj_gap"] = gap
        for state in self.optimizer.state.values():
            if "projector" in state:  # galore-torch copies the number into an object
                state["projector"].update_proj_gap = gap


def contestants(model: str, grads: dict[str, torch.Tensor]) -> Iterable[Contestant]:
    rank = MODELS[model][-1]
    low = {"rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}

    def split(params: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
        matrices = [p for key, p in params.items() if "_proj" in key]
        return [{"params": [p for key, p in params.items() if "_proj" not in key]}, {"params": matrices, **low}]

    def ours(basis: str) -> Callable[[Any, int], Any]:
        return lambda params, gap: lowrank_optim.GaLoreAdamW(split(params), lr=1e-3, basis=basis, stagger=False)

    for kind in ("fused", "foreach", "loop"):
        options = {} if kind == "loop" else {kind: True}
        yield Contestant(f"torch.AdamW({kind})", grads, lambda p, _, o=options: torch.optim.AdamW(p.values(), **o))
    yield Contestant("GaLoreAdamW(basis='rsvd')", grads, ours("rsvd"))
    yield Contestant("GaLoreAdamW(basis='svd')", grads, ours("svd"))
    try:
        theirs = peers.galore_torch().GaLoreAdamW
    except ImportError:
        print("galore-torch is not installed: left out. pip install --no-deps galore-torch==1.0")
        return
    yield Contestant(
        "galore-torch", grads, lambda params, _: theirs(split(params), lr=1e-3, no_deprecation_warning=True)
    )


def measure(model: str, rounds: int, refreshes: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    shapes = llama.shapes(*MODELS[model][:4])
    grads = {key: torch.randn(shape, generator=generator) / 100 for key, shape in shapes.items()}
    field = list(contestants(model, grads))
    for contestant in field:
        contestant.step()  # the first step makes state and, where there is one, the first basis
    steady = [[contestant.step() for contestant in field] for _ in range(rounds)]
    refresh = [[contestant.refresh() for contestant in field] for _ in range(refreshes)]
    parameters = sum(grad.nbytes for grad in grads.values())
    rows = []
    for i, contestant in enumerate(field):
        row: dict[str, Any] = {"optimizer": contestant.name}
        for kind, index in (("wall", 0), ("cpu", 1)):
            usual = statistics.median(times[i][index] / times[0][index] for times in steady)
            due = statistics.median(times[i][index] / times[0][index] for times in refresh)
            row[kind] = {"steady": usual, "refresh": due, "amortised": usual + max(0.0, due - usual) / GAP}
        row["step_ms"] = 1e3 * statistics.median(times[i][0] for times in steady)
        row["refresh_ms"] = 1e3 * statistics.median(times[i][0] for times in refresh)
        row["state_over_parameters"] = lowrank_optim.state_bytes(contestant.optimizer) / parameters
        row["state_bytes"] = lowrank_optim.state_bytes(contestant.optimizer)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'optimizer':<28}{'steady':>9}{'refresh':>10}{'amortised':>11}{'(cpu)':>9}{'state/params':>14}")
    for row in rows:
        wall = row["wall"]
        print(
            f"{row['optimizer']:<28}{wall['steady']:>8.2f}x{wall['refresh']:>9.1f}x{wall['amortised']:>10.2f}x"
            f"{row['cpu']['amortised']:>8.2f}x{row['state_over_parameters']:>14.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="60m")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--refreshes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = measure(arguments.model, arguments.rounds, arguments.refreshes)
    show(rows)
    amortised = {row["optimizer"]: row["step_ms"] + (row["refresh_ms"] - row["step_ms"]) / GAP for row in rows}
    summary = {}
    if "galore-torch" in amortised:
        ours = [name for name in amortised if name.startswith("GaLore")]
        summary = {name: amortised[name] / amortised["galore-torch"] for name in ours}
        print("amortised, of galore-torch:", ", ".join(f"{name} {value:.2f}" for name, value in summary.items()))
    name = f"step_time_{arguments.model}_{arguments.threads}threads"
    record.write(name, {"gap": GAP, "model": arguments.model, "rows": rows, "amortised_of_galore_torch": summary})


if __name__ == "__main__":
    main()
