"""Speed and energy of the randomized basis beside exact SVD: `python -m benchmarks.subspace`.

Energy is what a basis captures, `||P^T G||^2`, over what the best basis of its rank does. Warm: started from the basis
of an older gradient that shares 70 % of its norm with this one, as after a refresh interval.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import nano, record
from lowrank_optim import GaLoreAdamW, backend_info, ops
from lowrank_optim.parts import SVD, SubspaceIteration
from lowrank_optim.recipe.algebra import WHOLE
from lowrank_optim.recipe.plan import resolve_rank
from lowrank_optim.recipe.recipe import Time


def spectrum(m: int, n: int, power: float) -> Tensor:
    """A random matrix with singular values 1, 2^-power, 3^-power, ..."""
    k = min(m, n)
    left, right = torch.linalg.qr(torch.randn(m, k))[0], torch.linalg.qr(torch.randn(n, k))[0]
    result: Tensor = (left * torch.arange(1, k + 1) ** -power) @ right.mT
    return result


NOW = Time(0, 0.0)


def draw(shape: tuple[int, ...], purpose: str = "", some: slice | None = None) -> Tensor:
    return ops.normal(shape, 1, (0, 0), some=some)


LLAMA = ((512, 512, 128), (512, 1376, 128), (1024, 1024, 256), (1024, 2736, 256), (2048, 2048, 512))  # 60M to 1B
THINNER = ((2048, 2048, 128), (1024, 4096, 128))


def compare(m: int, n: int, rank: int, power: float, repeats: int) -> dict[str, Any]:
    """Interleaved, and medians of ratios within a repeat: other work on the machine slows all methods alike."""
    g = spectrum(m, n, power)
    noise = torch.randn(m, n)
    older = 0.7 * g + 0.3 * noise * g.norm() / noise.norm()
    random, exact = SubspaceIteration(), SVD()
    previous = random.fit(WHOLE, older, None, rank, draw, NOW)
    methods: dict[str, Callable[[], Tensor]] = {
        "linalg.svd": lambda: exact.fit(WHOLE, g, None, rank, draw, NOW)["basis"],
        "svd_lowrank(niter=2)": lambda: torch.svd_lowrank(g, rank, niter=2)[0],
        "rsvd, cold": lambda: random.fit(WHOLE, g, None, rank, draw, NOW)["basis"],
        "rsvd, warm": lambda: random.fit(WHOLE, g, previous, rank, draw, NOW)["basis"],
    }
    times: dict[str, list[float]] = {name: [] for name in methods}
    energy: dict[str, float] = {}
    for _ in range(repeats):
        for name, method in methods.items():
            start = time.perf_counter()
            basis = method()
            times[name].append(time.perf_counter() - start)
            energy[name] = float((basis.mT @ g).square().sum())
    rows = {name: _beside(name, times, energy) for name in methods}
    return {"shape": [m, n], "rank": rank, "spectrum": f"k^-{power}", "methods": rows}


def _beside(name: str, times: dict[str, list[float]], energy: dict[str, float]) -> dict[str, float]:
    row = {"seconds": statistics.median(times[name])}
    for key, other in (("svd", "linalg.svd"), ("svd_lowrank", "svd_lowrank(niter=2)")):
        ratios = (theirs / ours for theirs, ours in zip(times[other], times[name], strict=True))
        row[f"speedup_over_{key}"] = statistics.median(ratios)
        row[f"energy_over_{key}"] = energy[name] / energy[other]
    return row


def energies(rank: float = 0.25, at: tuple[int, int] = (20, 40)) -> list[dict[str, Any]]:
    """Real gradients of the nano model: what the randomized basis captures over what exact SVD does, by matrix.

    Cold at the first step of `at`; warm at the second, from the basis of the first.
    """
    first, second = nano.gradients(list(at))
    rows = []
    for name in first:
        row: dict[str, Any] = {"matrix": name, "shape": list(first[name].shape)}
        old = None
        for kind, grad in (("cold", first[name]), ("warm", second[name])):
            g = grad.mT if grad.shape[0] >= grad.shape[1] else grad
            r = resolve_rank(rank, *g.shape)
            exact = SVD().fit(WHOLE, g, None, r, draw, NOW)["basis"]
            old = SubspaceIteration().fit(WHOLE, g, old, r, draw, NOW)
            captured, best = ((basis.mT @ g).square().sum() for basis in (old["basis"], exact))
            row[kind] = float(captured / best)
            row[f"{kind}_svd_of_all"] = float(best / g.square().sum())
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    GaLoreAdamW([torch.nn.Parameter(torch.zeros(8, 8))])  # loads the native kernels
    results = []
    for (m, n, rank), power in itertools.product((*LLAMA, *THINNER), (0.5, 1.0)):
        result = compare(m, n, rank, power, arguments.repeats)
        results.append(result)
        print(f"{m}x{n}, rank {rank}, singular values {result['spectrum']}")
        for name, row in result["methods"].items():
            fast = f"{row['speedup_over_svd']:7.1f}x svd, {row['speedup_over_svd_lowrank']:5.2f}x svd_lowrank"
            print(
                f"  {name:<22}{fast}; {row['energy_over_svd']:.4f}, {row['energy_over_svd_lowrank']:.4f} of its energy"
            )
    real = energies()
    for kind in ("cold", "warm"):
        worst = min(real, key=lambda row: row[kind])
        print(f"nano model, rank 1/4, {kind}: at least {worst[kind]:.4f} of SVD's energy ({worst['matrix']})")
    found = {"results": results, "nano_gradients": real}
    record.write(f"subspace_{arguments.threads}threads", {"kernels": backend_info()["cpu"].kernels, **found})


if __name__ == "__main__":
    main()
