"""What writing weights takes: `python -m benchmarks.apply [--rounds 9]`.

`W <- (1 - lr wd) W - lr P D`, on one thread, in its CPU time, in turns; ratios are taken round by round and their
median is reported. In float32 the one pass of `addmm_` beside three operations. In bfloat16 the blocks of the engine,
which compute in float32 and round once, beside two others: W in float32 as a whole, rounded back (what the engine did
before), and `addmm_` in bfloat16, which rounds P and D and cannot round stochastically. The last depends on the CPU's
units for bfloat16, so it runs in three processes: with what this CPU has, without its units for bfloat16, and without
oneDNN, which is what CPUs without AVX-512 get.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.native import Run, compared
from lowrank_optim import GaLoreAdamW, ops
from lowrank_optim.engine.write import apply_narrow_
from lowrank_optim.recipe.recipe import Update

SHAPES = [(1024, 4096, 128, "left"), (1024, 4096, 256, "right"), (4096, 4096, 128, "right"), (4096, 1024, 128, "left")]
LR, KEEP = 0.01, 0.999
WAYS: dict[str, dict[str, str]] = {
    "as this CPU does": {},
    "without units for bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "without oneDNN": {"LOWRANK_BENCHMARK_ONEDNN": "0"},
}


def blocks(m: int, n: int, rank: int, side: str, d: Tensor, how: str) -> tuple[Run, Tensor, Tensor]:
    """The engine's write of a bfloat16 matrix; and that matrix, turned, and P."""
    p = torch.nn.Parameter(torch.randn((n, m) if side == "right" else (m, n)).bfloat16())
    p.grad = torch.zeros_like(p)
    optimizer = GaLoreAdamW([p], rank=rank, proj_type=side, bf16_update=how)
    chunk = next(optimizer.stepper.chunks([optimizer.table.member(p, optimizer.param_groups[0], p.grad)]))
    state = chunk.open()
    state["basis"].copy_(torch.linalg.qr(torch.randn(m, rank))[0])
    like, change = chunk.blank(), Update(d, LR)
    run = lambda: apply_narrow_(chunk.recipe, chunk, like, state, change, KEEP)  # noqa: E731
    return run, p.detach().mT if side == "right" else p.detach(), state["basis"]


def whole(w: Tensor, basis: Tensor, d: Tensor, how: str) -> Run:
    """In float32 as a whole, and rounded back."""
    key, stream = ops.key_of(0, "w"), ops.stream_of("weight", 1)

    def run() -> None:
        x = w.float().addmm_(basis, d, beta=KEEP, alpha=-LR)
        w.copy_(ops.round_to_bfloat16(x, key, stream) if how == "stochastic" else x)

    return run


def bfloat16(m: int, n: int, rank: int, side: str, rounds: int) -> dict[str, float]:
    d, found = torch.randn(rank, n), {}
    for how in ("stochastic", "none"):
        run, w, basis = blocks(m, n, rank, side, d, how)
        found[f"whole_over_blocks_{how}"] = compared(run, whole(w, basis, d, how), rounds)["ratio"]
        narrow = basis.bfloat16(), d.bfloat16()
        row = compared(run, lambda w=w, x=narrow: w.addmm_(*x, beta=KEEP, alpha=-LR), rounds)
        found |= {f"addmm_over_blocks_{how}": row["ratio"], f"ms_{how}": row["ms"]}
    exact = basis.double() @ d.double()
    for name, product in (("blocks", basis @ d), ("addmm", narrow[0].double() @ narrow[1].double())):
        found[f"error_{name}"] = float((product - exact).norm() / exact.norm())
    return found


def float32(m: int, n: int, rank: int, rounds: int) -> float:
    """Three operations over one."""
    w, basis, d = torch.randn(m, n), torch.randn(m, rank), torch.randn(rank, n)

    def three() -> None:
        change = basis @ d
        w.mul_(KEEP)
        w.add_(change, alpha=-LR)

    return compared(lambda: w.addmm_(basis, d, beta=KEEP, alpha=-LR), three, rounds)["ratio"]


def measure(rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.backends.mkldnn.set_flags(os.environ.get("LOWRANK_BENCHMARK_ONEDNN") != "0")
    few = rounds if torch.backends.mkldnn.enabled else min(rounds, 3)  # a product then takes seconds
    rows = {f"{m} x {n}, rank {rank}, {side}": (m, n, rank, side) for m, n, rank, side in SHAPES}
    rows = rows if torch.backends.mkldnn.enabled else dict(list(rows.items())[:1])
    with torch.no_grad():
        found: dict[str, Any] = {name: bfloat16(*shape, few) for name, shape in rows.items()}
        for name, (m, n, rank, _) in rows.items():
            found[name]["three_operations_over_one"] = float32(m, n, rank, rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.rounds)))
        return
    found: dict[str, Any] = {"load_at_start": os.getloadavg()[0]}
    command = [sys.executable, "-m", "benchmarks.apply", "--here", "--rounds", str(arguments.rounds)]
    for name, environment in WAYS.items():
        done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True)
        found[name] = json.loads(done.stdout)
        print(f"{name}\n{'':34}{'ms':>7}  times as long: whole  (nearest)  bfloat16 addmm_  (nearest); float32: three")
        for shape, row in found[name].items():
            ratios = [f"{row[f'{what}_over_blocks_{how}']:.2f}" for what in ("whole", "addmm") for how in HOW]
            last = f"{row['three_operations_over_one']:.2f}"
            print(f"{shape:34}{row['ms_stochastic']:7.1f}" + "".join(f"{x:>15}" for x in [*ratios, last]))
    record.write("apply", found)


HOW = ("stochastic", "none")

if __name__ == "__main__":
    main()
