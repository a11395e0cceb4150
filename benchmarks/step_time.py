"""The cost of a step beside torch's AdamW: `python -m benchmarks.step_time [--model 60m|h1024] [--all]`.

Without --all: GaLore, galore-torch and the kinds of AdamW, all of them alternately. With --all: every method with its
default options, each alternately with fused AdamW, so that only two are in memory.

All step in one process on the same gradients; the ratio to fused AdamW is taken round by round and its median reported,
so that a noisy machine disturbs all of them alike. A refresh step is one in which every basis is recomputed; amortised
over the gap, `steady + (refresh - steady) / gap`. Methods that refresh at each step by default are steady in that.
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
from benchmarks import llama, methods, peers, record
from benchmarks.peers import NEVER, Params

GAP = 200  # where a method has no default of its own
PRODUCTS = "its two products alone"
HEAD = 64  # columns of an attention head, for GaLore+
Make = Callable[[Params], Any]
Times = list[list[tuple[float, float]]]  # by round and contestant: wall, CPU

MODELS = {  # hidden, mlp, layers, vocabulary, rank
    "60m": (512, 1376, 8, 32000, 128),
    "h1024": (1024, 2736, 2, 256, 256),
    "tiny": (64, 128, 2, 256, 16),
}


class Products:
    """Stands in for GaLore's optimizer: `P^T G` and `W += P D` of each matrix and nothing else, which bounds a step."""

    def __init__(self, params: Params, rank: int) -> None:
        self.state: dict[Any, dict[str, Any]] = {}
        self.sides = []
        for key, p in params.items():
            if "_proj" in key:
                tall = p.shape[0] >= p.shape[1]
                w, g = (x.mT if tall else x for x in (p.detach(), p.grad))
                self.sides.append((w, g, torch.randn(w.shape[0], min(rank, w.shape[0])) / rank))

    def step(self) -> None:
        for w, g, basis in self.sides:
            w.addmm_(basis, basis.mT @ g, alpha=-1e-3)


class Contestant:
    """One optimizer on its own copy of the parameters, all with the same gradients; `gap` as it is used."""

    def __init__(self, name: str, grads: dict[str, torch.Tensor], make: Make, gap: int = GAP) -> None:
        self.name, self.gap = name, gap
        self.params = {key: nn.Parameter(torch.zeros_like(grad)) for key, grad in grads.items()}
        for key, p in self.params.items():
            p.grad = grads[key]
        self.optimizer = make(self.params)

    def step(self) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        self.optimizer.step()
        return time.perf_counter() - wall, time.process_time() - cpu

    def refresh(self) -> tuple[float, float]:
        """One step in which all bases are due, for those that have any."""
        if self.gap == 1:
            return self.step()
        self._make_due()
        took = self.step()
        for state in self.optimizer.state.values():
            if "projector" in state:
                state["projector"].update_proj_gap = NEVER
        return took

    def _make_due(self) -> None:
        for state in self.optimizer.state.values():
            if "projector" in state:  # galore-torch
                state["projector"].update_proj_gap = 1
            if "refreshed_at" in state:
                state["refreshed_at"].fill_(-1)


def contestants(model: str, grads: dict[str, torch.Tensor]) -> Iterable[Contestant]:
    rank = MODELS[model][-1]
    low = {"rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}

    def split(params: Params) -> list[dict[str, Any]]:
        matrices = [p for key, p in params.items() if "_proj" in key]
        return [{"params": [p for key, p in params.items() if "_proj" not in key]}, {"params": matrices, **low}]

    def ours(basis: str) -> Make:
        return lambda params: lowrank_optim.GaLoreAdamW(split(params), lr=1e-3, basis=basis, stagger=False)

    yield from (adamw(kind, grads) for kind in ("fused", "foreach", "loop"))
    yield Contestant("GaLoreAdamW(basis='rsvd')", grads, ours("rsvd"))
    yield Contestant("GaLoreAdamW(basis='svd')", grads, ours("svd"))
    yield Contestant(PRODUCTS, grads, lambda params: Products(params, rank))
    try:
        theirs = peers.galore_torch().GaLoreAdamW
    except ImportError:
        print("galore-torch is not installed: left out. pip install --no-deps galore-torch==1.0")
        return
    yield Contestant("galore-torch", grads, lambda params: theirs(split(params), lr=1e-3, no_deprecation_warning=True))


def adamw(kind: str, grads: dict[str, torch.Tensor]) -> Contestant:
    options: dict[str, Any] = {} if kind == "loop" else {kind: True}
    return Contestant(f"torch.AdamW({kind})", grads, lambda params: torch.optim.AdamW(params.values(), **options))


def of_method(name: str, model: str, grads: dict[str, torch.Tensor], **more: Any) -> Contestant:
    """One of `methods` with its defaults and `more` options, at the rank of the model."""
    optimizer, options = {**methods.TORCH, **methods.OURS}[name]
    gap = methods.default(optimizer, "update_proj_gap") or GAP
    wanted = {"lr": 1e-3, "stagger": False, "update_proj_gap": 1 if gap == 1 else NEVER}
    options = {**options, **{k: v for k, v in wanted.items() if methods.default(optimizer, k) is not None}}
    if methods.ranked(optimizer):
        more["rank"] = MODELS[model][-1]

    def make(params: Params) -> torch.optim.Optimizer:
        return optimizer(list(_groups(params, methods.default(optimizer, "heads") is not None)), **options, **more)

    return Contestant(name, grads, make, gap)


def _groups(params: Params, by_heads: bool) -> Iterable[dict[str, Any]]:
    """The named parameters; those of the attention with their heads, if the method knows what these are."""
    heads: dict[str, list[tuple[str, nn.Parameter]]] = {"": [], "right": [], "left": []}
    for name, p in params.items():
        last = name.split(".")[-1]
        side = {"q_proj": "right", "k_proj": "right", "v_proj": "right", "o_proj": "left"}.get(last, "")
        heads[side if by_heads else ""].append((name, p))
    for side, members in heads.items():
        if members:
            yield {"params": members} | ({"heads": members[0][1].shape[0] // HEAD, "proj_type": side} if side else {})


def gradients(model: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = llama.shapes(*MODELS[model][:4])
    return {key: torch.randn(shape, generator=generator) / 100 for key, shape in shapes.items()}


def alternately(field: list[Contestant], rounds: int, refreshes: int) -> tuple[Times, Times]:
    """Times of usual steps, and of such in which all bases are due."""
    for contestant in field:
        contestant.step()  # the first step makes state and, where there is one, the first basis
    steady = [[contestant.step() for contestant in field] for _ in range(rounds)]
    return steady, [[contestant.refresh() for contestant in field] for _ in range(refreshes)]


def middle(times: Times, i: int, over: int, index: int) -> float:
    """The median ratio of contestant i to another, of wall (0) or CPU time (1)."""
    return statistics.median(row[i][index] / row[over][index] for row in times)


def amortised(usual: float, due: float, gap: int) -> float:
    return usual if gap == 1 else usual + max(0.0, due - usual) / gap


def race(field: list[Contestant], rounds: int, refreshes: int) -> list[dict[str, Any]]:
    """One row for each; times over those of the first."""
    steady, refresh = alternately(field, rounds, refreshes)
    rows = []
    for i, contestant in enumerate(field):
        row: dict[str, Any] = {"optimizer": contestant.name, "gap": contestant.gap}
        for kind, index in (("wall", 0), ("cpu", 1)):
            usual, due = (middle(times, i, 0, index) for times in (steady, refresh))
            row[kind] = {"steady": usual, "refresh": due, "amortised": amortised(usual, due, contestant.gap)}
        row["step_ms"] = 1e3 * statistics.median(times[i][0] for times in steady)
        row["refresh_ms"] = 1e3 * statistics.median(times[i][0] for times in refresh)
        row["state_bytes"] = lowrank_optim.state_bytes(contestant.optimizer)
        row["state_over_parameters"] = row["state_bytes"] / sum(p.nbytes for p in contestant.params.values())
        rows.append(row)
    return rows


def measure_all(model: str, rounds: int, refreshes: int) -> list[dict[str, Any]]:
    """Every method in turn beside the same fused AdamW."""
    grads = gradients(model)
    first = adamw("fused", grads)
    rows: list[dict[str, Any]] = []
    for name in [*methods.TORCH, *methods.OURS]:
        rows.append(race([first, of_method(name, model, grads)], rounds, refreshes)[1])
        show(rows[-1:], head=len(rows) == 1)
    return rows


def show(rows: list[dict[str, Any]], head: bool = True) -> None:
    if head:
        print(f"{'optimizer':<28}{'steady':>9}{'refresh':>10}{'amortised':>11}{'(cpu)':>9}{'state/params':>14}")
    for row in rows:
        wall = row["wall"]
        print(
            f"{row['optimizer']:<28}{wall['steady']:>8.2f}x{wall['refresh']:>9.1f}x{wall['amortised']:>10.2f}x"
            f"{row['cpu']['amortised']:>8.2f}x{row['state_over_parameters']:>14.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="60m")
    parser.add_argument("--all", action="store_true", help="every method")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--refreshes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.all:
        rows = measure_all(arguments.model, arguments.rounds, arguments.refreshes)
        name = f"step_time_all_{arguments.model}_{arguments.threads}threads"
        record.write(name, {"model": arguments.model, "rank": MODELS[arguments.model][-1], "rows": rows})
        return
    field = list(contestants(arguments.model, gradients(arguments.model)))
    rows = race(field, arguments.rounds, arguments.refreshes)
    show(rows)
    whole = {row["optimizer"]: amortised(row["step_ms"], row["refresh_ms"], GAP) for row in rows}
    summary = {}
    usual = {row["optimizer"]: row["step_ms"] for row in rows}
    share = usual[PRODUCTS] / usual["GaLoreAdamW(basis='rsvd')"]
    print(f"the two products are {share:.0%} of a step between refreshes")
    if "galore-torch" in whole:
        ours = [name for name in whole if name.startswith("GaLore")]
        summary = {name: whole[name] / whole["galore-torch"] for name in ours}
        print("amortised, of galore-torch:", ", ".join(f"{name} {value:.2f}" for name, value in summary.items()))
    name = f"step_time_{arguments.model}_{arguments.threads}threads"
    record.write(
        name,
        {
            "gap": GAP,
            "model": arguments.model,
            "rows": rows,
            "share_of_products": share,
            "amortised_of_galore_torch": summary,
        },
    )


if __name__ == "__main__":
    main()
