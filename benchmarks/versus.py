"""Each method beside the package of its paper: `python -m benchmarks.versus [--model 60m|h1024] [--only APOLLO,Flora]`.

In one process, on the same gradients, alternately: torch's fused AdamW, our method with its default options, the same
with what it can keep instead of compute, the published package, and what bounds our step: fused AdamW for all that is
not projected, and the products with a basis that the method cannot do without. Medians of ratios taken round by round,
of the CPU time and of wall time. Packages that are not installed are named and left out.

Both use their own defaults, at the same rank: ours a randomized basis where GaLore's, Fira's and sn-sm's have an SVD.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

import lowrank_optim
from benchmarks import peers, record
from benchmarks.peers import NEVER, PEERS, Params, Peer
from benchmarks.step_time import MODELS, Contestant, adamw, alternately, amortised, gradients, middle, of_method
from lowrank_optim import ops

FLOOR = "floor"
ONE_PRODUCT = ("APOLLO", "APOLLOMini")  # nothing goes back; all others need one each way
KEPT = {"APOLLO": "store_projection", "Flora": "store_projection"}


class Floor:
    """Stands in for an optimizer: AdamW in one kernel for what is not projected, and the products for what is."""

    def __init__(self, params: Params, rank: int, both: bool) -> None:
        self.state: dict[Any, dict[str, Any]] = {}
        rest, matrices = peers.split(params)
        self.rest, self.both = torch.optim.AdamW(rest["params"], fused=True), both
        self.sides = []
        for p in matrices["params"]:
            tall = p.shape[0] >= p.shape[1]
            w, g = (x.mT if tall else x for x in (p.detach(), p.grad))
            self.sides.append((w, g, torch.randn(w.shape[0], rank) / rank))

    def step(self) -> None:
        self.rest.step()
        for w, g, basis in self.sides:
            r = ops.product(basis.mT, g)
            if self.both:
                ops.add_product_(w, basis, r, -1e-3, 1.0)


class Guest(Contestant):
    """A published package, some of which drop gradients or write into them: it gets a copy of them before each step."""

    def __init__(self, name: str, grads: dict[str, torch.Tensor], peer: Peer, rank: int, gap: int) -> None:
        self.given = grads
        super().__init__(name, {key: grad.clone() for key, grad in grads.items()}, lambda p: peer.make(p, rank), gap)
        self.own = {key: p.grad for key, p in self.params.items()}

    def step(self) -> tuple[float, float]:
        for key, p in self.params.items():
            p.grad = self.own[key]
            p.grad.copy_(self.given[key])
        return super().step()

    def _make_due(self) -> None:
        super()._make_due()
        for group in self.optimizer.param_groups:
            if "kappa" in group:  # flora-opt
                group["kappa"] = 1

    def refresh(self) -> tuple[float, float]:
        took = super().refresh()
        for group in self.optimizer.param_groups:
            if "kappa" in group:
                group["kappa"] = NEVER
        return took


def field(name: str, model: str, grads: dict[str, torch.Tensor]) -> Iterator[Contestant]:
    """Fused AdamW, ours, the floor, ours with more kept and, if it is installed, the published package."""
    ours = of_method(name, model, grads)
    rank = 1 if name == "APOLLOMini" else MODELS[model][-1]
    yield adamw("fused", grads)
    yield ours
    yield Contestant(FLOOR, grads, lambda params: Floor(params, rank, name not in ONE_PRODUCT), NEVER)
    if name in KEPT:
        kept = of_method(name, model, grads, **{KEPT[name]: True})
        kept.name += f", {KEPT[name]}"
        yield kept
    try:
        yield Guest(PEERS[name].package, grads, PEERS[name], rank, ours.gap)
    except ImportError as error:
        print(f"{name}: {PEERS[name].package} is left out ({error}); see benchmarks/peers.txt")


def measure(name: str, model: str, rounds: int, refreshes: int) -> dict[str, Any]:
    """Of one method: a row per contestant, CPU and wall time over fused AdamW's, and over the package's."""
    everyone = list(field(name, model, gradients(model)))
    peer = len(everyone) - 1 if isinstance(everyone[-1], Guest) else None
    times, rows = alternately(everyone, rounds, refreshes), []
    for i, contestant in enumerate(everyone):
        row: dict[str, Any] = {"optimizer": contestant.name, "gap": contestant.gap}
        for kind, index in (("wall", 0), ("cpu", 1)):
            for over, label in ((0, "fused"), (peer, "peer")):
                if over is not None:
                    steady, refresh = (middle(some, i, over, index) for some in times)
                    row[f"{kind}_of_{label}"] = {"steady": steady, "refresh": refresh}
            usual, due = (middle(some, i, 0, index) for some in times)
            row[f"{kind}_of_fused"]["amortised"] = amortised(usual, due, contestant.gap)
        row["state_bytes"] = lowrank_optim.state_bytes(contestant.optimizer)
        rows.append(row)
    if peer is not None:
        whole = rows[peer]["cpu_of_fused"]["amortised"]
        for row in rows:
            row["cpu_of_peer"]["amortised"] = row["cpu_of_fused"]["amortised"] / whole
    return {"method": name, "package": PEERS[name].package if peer else None, "rows": rows}


def show(result: dict[str, Any]) -> None:
    for row in result["rows"][1:]:
        fused, peer = row["cpu_of_fused"], row.get("cpu_of_peer")
        line = f"{row['optimizer']:<36}{fused['steady']:>8.2f}x{fused['refresh']:>8.1f}x{fused['amortised']:>8.2f}x"
        if peer is not None:
            line += f"{peer['steady']:>10.2f}{peer['refresh']:>8.2f}{peer['amortised']:>8.2f}"
        print(line + f"{row['wall_of_fused']['steady']:>10.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="60m")
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(PEERS), help="methods, with commas")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--refreshes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{'CPU time':<36}{'over fused AdamW':>18}{'':>9}{'over the package':>26}{'wall':>11}")
    print(f"{'':<36}{'steady':>9}{'refresh':>9}{'amortised':>9}{'steady':>9}{'refresh':>8}{'amort.':>8}{'steady':>11}")
    results = []
    for name in arguments.only:
        results.append(measure(name, arguments.model, arguments.rounds, arguments.refreshes))
        show(results[-1])
    name = f"versus_{arguments.model}_{arguments.threads}threads"
    record.write(name, {"model": arguments.model, "rank": MODELS[arguments.model][-1], "methods": results})


if __name__ == "__main__":
    main()
