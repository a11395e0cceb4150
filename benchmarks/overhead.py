"""What it costs to ask an optimizer, and what compiling it gains: `python -m benchmarks.overhead [--model 60m|tiny]`.

All of it in one process, alternately; ratios are taken round by round and their median reported, so that a noisy
machine disturbs both sides alike.

- asking: `stats()`, and `report()` with its table as text, each once per step, over a GaLore step without a refresh.
- noting: what `stats()` needs to have been noted. A step in which every basis is refitted, with captured energies
  noted, over one without; amortised over the gap, in parts of a usual step.
- compiling: a step after `optimizer.compile()` over an eager one, with torch's default backend (inductor), for methods
  of which more or less of a step is in the graph; and what the first compiled step takes longer than an eager first
  one, without inductor's caches, but for its own start (`start_seconds`).
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch

from benchmarks import record, step_time

METHODS = ("GaLoreAdamW", "FiraAdamW", "APOLLO")
Grads = dict[str, torch.Tensor]


def asking(model: str, grads: Grads, rounds: int) -> dict[str, Any]:
    contestant = step_time.of_method(METHODS[0], model, grads)
    optimizer = contestant.optimizer
    contestant.refresh()  # from here on there are captured energies to tell
    questions = {"stats": optimizer.stats, "report": lambda: str(optimizer.report())}
    rows = []
    for _ in range(rounds):
        rows.append({"step": contestant.step()[0]} | {name: _seconds(ask) for name, ask in questions.items()})
    found: dict[str, Any] = {"step_ms": _median_ms(row["step"] for row in rows)}
    for name in questions:
        ratio = statistics.median(row[name] / row["step"] for row in rows)
        found[name] = {"ms": _median_ms(row[name] for row in rows), "of_a_step": ratio}
    return found


def noting(model: str, grads: Grads, rounds: int, step_ms: float) -> dict[str, Any]:
    contestant = step_time.of_method(METHODS[0], model, grads)
    contestant.step()
    extra, refreshes = [], []
    for number in range(rounds):
        took = {}
        for noted in (True, False) if number % 2 else (False, True):
            with nullcontext() if noted else mock.patch("lowrank_optim.engine.update.note_captured"):
                took[noted] = contestant.refresh()[0]
        extra.append(took[True] / took[False] - 1)
        refreshes.append(took[False])
    of_a_refresh = statistics.median(extra)
    amortised = of_a_refresh * _median_ms(refreshes) / step_ms / step_time.GAP
    return {"of_a_refresh": of_a_refresh, "amortised_of_a_step": amortised, "gap": step_time.GAP}


def compiling(name: str, model: str, grads: Grads, rounds: int) -> dict[str, Any]:
    eager, compiled = (step_time.of_method(name, model, grads) for _ in range(2))
    compiled.optimizer.compile()
    first = eager.step()[0], compiled.step()[0]
    steps = [(eager.step()[0], compiled.step()[0]) for _ in range(rounds)]
    return {
        "optimizer": name,
        "graphs": len(compiled.optimizer.stepper.move.graphs),
        "compile_seconds": first[1] - first[0],
        "eager_ms": _median_ms(one for one, _ in steps),
        "compiled_of_eager": statistics.median(two / one for one, two in steps),
    }


def _seconds(ask: Callable[[], object]) -> float:
    start = time.perf_counter()
    ask()
    return time.perf_counter() - start


def _median_ms(seconds: Any) -> float:
    return 1e3 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=step_time.MODELS, default="60m")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--refreshes", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.compiler.config.force_disable_caches = True
    warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
    grads = step_time.gradients(arguments.model)
    asked = asking(arguments.model, grads, arguments.rounds)
    for name in ("stats", "report"):
        print(f"{name + '()':<14}{asked[name]['ms']:>9.2f} ms, {asked[name]['of_a_step']:.2%} of a step", flush=True)
    noted = noting(arguments.model, grads, arguments.refreshes, asked["step_ms"])
    print(f"{'noting':<14}{noted['of_a_refresh']:.2%} of a refresh, {noted['amortised_of_a_step']:.3%} of a step")
    start = _seconds(lambda: torch.compile(torch.square)(torch.ones(8)))
    rows = []
    for name in METHODS:
        rows.append(compiling(name, arguments.model, grads, arguments.rounds))
        row = rows[-1]
        print(f"{name:<14}compiled in {row['compile_seconds']:.1f} s ({row['graphs']} graphs), ", end="")
        print(f"then {row['compiled_of_eager']:.2f} of an eager step ({row['eager_ms']:.1f} ms)", flush=True)
    result = {"model": arguments.model, "rounds": arguments.rounds, "asking": asked, "noting": noted}
    result |= {"start_seconds": start, "compiling": rows}
    record.write(f"overhead_{arguments.model}_{arguments.threads}threads", result)


if __name__ == "__main__":
    main()
