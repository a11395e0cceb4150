"""The learning-rate sweep behind the defaults of the main job, and the comparison it ends in.

    python -m benchmarks.quality sweep      for each method its relative step of the matrices, one seed
    python -m benchmarks.quality final      the best of each method, two seeds; and GaLore with its state in few bits

Each run is `examples/pretrain.py` (preset nano, the default text, equal steps) in its own process with one thread. A
run is a function of its arguments: one that is in results/quality_sweep.json is not made again.

The sweep has one rule for all. From the preset's value it goes downhill in steps of a factor, until the best value has
a worse neighbour on each side; `LIMIT` values at most. Everything that is not projected keeps the preset's lr, as does
what weight-space methods do not convert (`rest_lr`): their lr is that of the matrices.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lowrank_optim
from benchmarks import nano, record

SWEEP = record.RESULTS / "quality_sweep.json"
PRESET = nano.example("presets").PRESETS["nano"]
LIMIT = 7  # values of one method
BYTES = {"state": "optimizer", "weights": "weights", "gradients": "gradients"}  # ours -> the example's, as measured
SIGNS = "diverged", "non-finite weights"  # of a run that failed because its step was too long

Row = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """An optimizer of the preset, the keyword that is swept and by which factor, and keywords that stay.

    `start`: where the preset's own value is not the place to start.
    """

    optimizer: str
    swept: str = "scale"
    factor: float = 2.0
    keywords: Row = field(default_factory=dict)
    start: float | None = None

    @property
    def first(self) -> float:
        return float(self.start or PRESET.optimizers[self.optimizer][self.swept])

    def candidate(self, value: float) -> tuple[float, Row]:
        """lr and keywords of one run."""
        if self.swept == "lr":
            return value, dict(self.keywords)
        return float(PRESET.optimizers[self.optimizer]["lr"]), {self.swept: value, **self.keywords}


_FACTORED = {"beta1": 0.9, "relative_step": False, "scale_parameter": False}
METHODS = {
    "AdamW": Method("AdamW", "lr", keywords={"matrix_lr_scale": 1.0}, start=0.002),
    "AdamW, own lr for the matrices": Method("AdamW", "matrix_lr_scale"),
    "Adafactor": Method("Adafactor", "matrix_lr_scale"),
    "Muon": Method("Muon", "matrix_lr_scale"),
    "GaLoreAdamW": Method("GaLoreAdamW", keywords={"moments": "keep"}),
    "GaLoreAdafactor": Method("GaLoreAdafactor", keywords=_FACTORED),
    "GaLorePlusAdamW": Method("GaLorePlusAdamW"),
    "QGaLoreAdamW": Method("QGaLoreAdamW"),
    "FiraAdamW": Method("FiraAdamW"),
    "APOLLO": Method("APOLLO", factor=4.0),  # whose scale acts by its square root
    "APOLLOMini": Method("APOLLOMini", factor=4.0),
    "LDAdamW": Method("LDAdamW"),
    "FRUGAL": Method("FRUGAL"),
    "GoLoreAdamW": Method("GoLoreAdamW"),
    "DCTAdamW": Method("DCTAdamW"),
    "Flora": Method("Flora"),
    "SubsetNormAdamW": Method("SubsetNormAdamW"),
    "SubspaceMomentum": Method("SubspaceMomentum", "lr", factor=4.0),  # SGD everywhere, so one lr
    "SNSMAdamW": Method("SNSMAdamW"),
}
_CONVERTING = "ReLoRA", "LTE", "SLTrain", "LoQT", "SST", "LowRankAdamW"
METHODS |= {
    name: Method(name, "lr", keywords={"rest_lr": PRESET.optimizers[name]["rest_lr"]})
    for name in _CONVERTING
    if hasattr(lowrank_optim, name)
}
BASELINES = "AdamW", "AdamW, own lr for the matrices"
# Not swept: the best of another method, with other keywords.
VARIANTS: dict[str, tuple[str, Row]] = {
    "GaLoreAdamW, int8 state": ("GaLoreAdamW", {"state_dtype": "int8"}),
    "GaLoreAdamW, int4 state": ("GaLoreAdamW", {"state_dtype": "int4"}),
    "ReLoRA, after 50 steps of AdamW": ("ReLoRA", {"--warm-start": 50}),
    "LoQT, dense": ("LoQT", {"base": "dense"}),
}


def run(optimizer: str, lr: float, keywords: Row, seed: int, steps: int) -> Row:
    """One training run in a process of its own: its loss (None if it diverged), its bytes and what it was made with."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(nano.ROOT / "examples" / "pretrain.py"), "--optimizer", optimizer]
        command += ["--lr", str(lr), "--seed", str(seed), "--steps", str(steps), "--out", f"{folder}/run"]
        flags = {key: value for key, value in keywords.items() if key.startswith("--")}
        command += [f"{key}={value}" for key, value in flags.items()]
        settings = [f"{key}={value}" for key, value in keywords.items() if key not in flags]
        command += ["--set", *settings] if settings else []
        # The package beside this file, not one that is installed from elsewhere.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(nano.ROOT)}
        done = subprocess.run(command, env=environment, cwd=nano.ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            if any(sign in done.stderr for sign in SIGNS):
                return {"validation_loss": None}
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr.strip()}")
        result = json.loads((Path(folder) / "run" / "summary.json").read_text())["runs"][0]
    job, size = result["job"], {f"{ours}_bytes": result["bytes"][f"{key}_measured"] for ours, key in BYTES.items()}
    made_with = {key: job[key] for key in ("lr", "matrix_lr_scale", "keywords")}
    return {"validation_loss": result["validation_loss"], **size, "job": made_with}


class Store:
    """All runs there are, in one file; threads may ask for runs at the same time."""

    def __init__(self, steps: int) -> None:
        self.steps, self.lock = steps, threading.Lock()
        rows = json.loads(SWEEP.read_text())["rows"] if SWEEP.exists() else []
        self.rows: list[Row] = [{"seed": 0, "steps": PRESET.steps, **row} for row in rows]

    def of(self, method: str, seed: int = 0) -> list[Row]:
        """The runs of one method, best first."""
        same = {"method": method, "seed": seed, "steps": self.steps}
        return sorted((row for row in self.rows if same.items() <= row.items()), key=loss)

    def get(self, method: str, optimizer: str, lr: float, keywords: Row, seed: int = 0) -> Row:
        """One run; made now if it is not there."""
        for row in self.of(method, seed):
            if (row["lr"], row["keywords"]) == (lr, keywords):
                return row
        row = {"method": method, "optimizer": optimizer, "lr": lr, "keywords": keywords}
        row |= {"seed": seed, "steps": self.steps, **run(optimizer, lr, keywords, seed, self.steps)}
        with self.lock:
            self.rows = sorted([*self.rows, row], key=lambda row: (row["method"], row["seed"], loss(row)))
            record.write(SWEEP.stem, {"rows": self.rows}, quiet=True)
        print(f"{method:<32}seed {seed}  lr {lr:<8g}{keywords!s:<60}{row['validation_loss']}", flush=True)
        return row


def loss(row: Row) -> float:
    """Infinite for a run that diverged."""
    return math.inf if row["validation_loss"] is None else float(row["validation_loss"])


def search(store: Store, name: str) -> None:
    """Downhill from the first value to one whose neighbours are both worse."""
    method, tried = METHODS[name], _tried(store, name)
    while (values := _untried(method, tried)) and len(tried) < LIMIT:
        tried[values[0]] = loss(store.get(name, method.optimizer, *method.candidate(values[0])))
    if values:
        print(f"{name}: the best of {len(tried)} values is at their edge", flush=True)


def _tried(store: Store, name: str) -> dict[float, float]:
    """value -> loss, of the runs that differ in nothing else."""
    method, found = METHODS[name], {}
    for row in store.of(name):
        value = row["lr"] if method.swept == "lr" else row["keywords"][method.swept]
        if method.candidate(value) == (row["lr"], row["keywords"]):
            found[value] = loss(row)
    return found


def _untried(method: Method, tried: dict[float, float]) -> list[float]:
    """The first value, then unknown neighbours of the best one; the best is the least as long as all diverge."""
    if not tried:
        return [method.first]
    best = min(tried, key=lambda value: (tried[value], value))
    return [value for value in (best / method.factor, best * method.factor) if value not in tried]


def inside(store: Store, name: str) -> bool:
    """Has the best value a worse neighbour on each side? Known for methods that were swept."""
    return not _untried(METHODS[name], _tried(store, name))


def sweep(store: Store, names: list[str], workers: int) -> None:
    _together(workers, [lambda name=name: search(store, name) for name in names])  # type: ignore[misc]


def final(store: Store, names: list[str], workers: int, seeds: int) -> None:
    """The best candidate of each method with more seeds; seed 0 is the sweep's own run."""
    best: dict[str, tuple[str, float, Row]] = {}
    for name in names:
        source, changed = VARIANTS.get(name, (name, {}))
        found = store.of(source)
        if not found or math.isinf(loss(found[0])):
            print(f"{name}: no run in {SWEEP.name}; sweep it first. Left out")
            continue
        best[name] = found[0]["optimizer"], found[0]["lr"], {**found[0]["keywords"], **changed}
    jobs = [(name, *settings, seed) for name, settings in best.items() for seed in range(seeds)]
    _together(workers, [lambda job=job: store.get(*job) for job in jobs])  # type: ignore[misc]
    rows = [_summary(store, name, *settings, seeds) for name, settings in best.items()]
    baseline = min((row["validation_loss"] for row in rows if row["method"] in BASELINES), default=math.nan)
    state = next((row["state_bytes"] for row in rows if row["method"] in BASELINES), math.nan)
    for row in rows:
        row["over_better_adamw"] = row["validation_loss"] / baseline
        row["state_over_adamw"] = row["state_bytes"] / state
    show(rows)
    record.write("quality", {"seeds": seeds, "steps": store.steps, "rows": rows})


def _summary(store: Store, name: str, optimizer: str, lr: float, keywords: Row, seeds: int) -> Row:
    runs = [store.get(name, optimizer, lr, keywords, seed) for seed in range(seeds)]
    losses = [loss(row) for row in runs]
    row: Row = {"method": name, "optimizer": optimizer, "lr": lr, "keywords": keywords}
    row |= {"validation_loss": statistics.mean(losses), "losses": losses}
    # Older rows know the state's bytes alone, and those of runs that diverged none.
    found = {key: one[key] for one in runs for key in one if key.endswith("_bytes")}
    row |= {"state_bytes": math.nan, **found}
    return row | {"inside": inside(store, name) if name in METHODS else None}


def show(rows: list[Row]) -> None:
    print("| method | lr | keywords | loss | over that of the better AdamW | state, MiB | of AdamW's | total, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        settings = ", ".join(f"{key} {value}" for key, value in row["keywords"].items())
        settings += " (at the edge)" if row["inside"] is False else ""
        numbers = f"{row['validation_loss']:.4f} | {row['over_better_adamw']:.4f} | {row['state_bytes'] / 2**20:.2f}"
        size = [row.get(f"{what}_bytes") for what in BYTES]
        total = "-" if None in size else f"{sum(size) / 2**20:.2f}"
        print(f"| {row['method']} | {row['lr']:g} | {settings} | {numbers} | {row['state_over_adamw']:.3f} | {total} |")


def _together(workers: int, jobs: list[Callable[[], Any]]) -> None:
    """All jobs, a few at a time; the first failure ends them when those that run are done."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sweep", "final"])
    parser.add_argument("--only", nargs="+", choices=[*METHODS, *VARIANTS], metavar="METHOD", help="default: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=PRESET.steps)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    store = Store(arguments.steps)
    names = arguments.only or [*METHODS, *VARIANTS]
    if arguments.what == "sweep":
        sweep(store, [name for name in names if name in METHODS], arguments.workers)
    else:
        final(store, names, arguments.workers, arguments.seeds)


if __name__ == "__main__":
    main()
