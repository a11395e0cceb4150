"""The learning-rate sweep behind the defaults of the main job, and the comparison it ends in.

    python -m benchmarks.quality sweep      every candidate of `GRID`, one seed
    python -m benchmarks.quality final      the best of each method, two seeds

Each run is `examples/pretrain.py` (preset nano, the default text, equal steps) in its own process with one thread.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record

ROOT = Path(__file__).parent.parent
SWEEP = record.RESULTS / "quality_sweep.json"

# method -> optimizer, and the candidates: (lr, keywords). Steps of 2x in lr.
GRID: dict[str, tuple[str, list[tuple[float, dict[str, Any]]]]] = {
    "GaLoreAdamW": (
        "galore",
        [(lr, {"scale": scale, "moments": "keep"}) for lr in (8e-3, 16e-3, 32e-3) for scale in (0.125, 0.25)]
        + [(16e-3, {"scale": scale, "moments": "rotate"}) for scale in (0.125, 0.25)]
        + [(lr, {"scale": 0.0625, "moments": "keep"}) for lr in (16e-3, 32e-3, 64e-3)]
        + [(32e-3, {"scale": 0.03125, "moments": "keep"})],
    ),
    "AdamW": ("adamw", [(lr, {"matrix_lr_scale": 1.0}) for lr in (1e-3, 2e-3, 4e-3, 8e-3)]),
    "AdamW, own lr for the matrices": (
        "adamw",
        [(lr, {"matrix_lr_scale": scale}) for lr in (8e-3, 16e-3, 32e-3) for scale in (0.0625, 0.125, 0.25)]
        + [(lr, {"matrix_lr_scale": 0.03125}) for lr in (16e-3, 32e-3, 64e-3)]
        + [(lr, {"matrix_lr_scale": 0.015625}) for lr in (32e-3, 64e-3)],
    ),
    "GaLoreAdafactor": (
        "galore_adafactor",
        [
            (lr, {"scale": scale, "beta1": 0.9, "relative_step": False, "scale_parameter": False})
            for lr, scale in ((4e-3, 1.0), (8e-3, 1.0), (8e-3, 0.25), (16e-3, 0.125))
        ],
    ),
}


def run(optimizer: str, lr: float, keywords: dict[str, Any], seed: int, steps: int | None) -> dict[str, Any]:
    """One training run in a process of its own; its row of summary.json."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--optimizer", optimizer, "--lr", str(lr)]
        command += ["--seed", str(seed), "--out", f"{folder}/run"]
        command += ["--steps", str(steps)] if steps else []
        command += ["--set", *(f"{key}={value}" for key, value in keywords.items())] if keywords else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1] if done.stderr else f"exit code {done.returncode}"}
        return dict(json.loads((Path(folder) / "run" / "summary.json").read_text())["runs"][0])


def _done() -> list[dict[str, Any]]:
    """Rows of earlier sweeps; a run is a function of its arguments, so none is made twice."""
    return [row for row in json.loads(SWEEP.read_text())["rows"] if row["validation_loss"]] if SWEEP.exists() else []


def sweep(workers: int, steps: int | None) -> None:
    rows = _done()
    known = [(row["method"], row["lr"], row["keywords"]) for row in rows]
    jobs = [(method, name, lr, kw) for method, (name, candidates) in GRID.items() for lr, kw in candidates]
    jobs = [job for job in jobs if (job[0], *job[2:]) not in known]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(run, name, lr, kw, 0, steps): (method, name, lr, kw) for method, name, lr, kw in jobs}
        for future in concurrent.futures.as_completed(futures):
            method, name, lr, kw = futures[future]
            loss = future.result().get("validation_loss")
            rows.append({"method": method, "optimizer": name, "lr": lr, "keywords": kw, "validation_loss": loss})
            print(f"{method:<32}{lr:<8g}{kw!s:<60}{loss}", flush=True)
            rows.sort(key=lambda row: (row["method"], row["validation_loss"] or 1e9))
            record.write(SWEEP.stem, {"seed": 0, "rows": rows})


def final(workers: int, steps: int | None, seeds: int) -> None:
    """The best candidate of each method with more seeds; seed 0 is the sweep's own run."""
    best: dict[str, dict[str, Any]] = {}
    for row in _done():
        best.setdefault(row["method"], row)  # sorted by loss within a method
    results = []
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {
            method: [
                pool.submit(run, row["optimizer"], row["lr"], row["keywords"], seed, steps) for seed in range(1, seeds)
            ]
            for method, row in best.items()
        }
        for method, row in best.items():
            losses = [row["validation_loss"], *(future.result()["validation_loss"] for future in futures[method])]
            results.append({**row, "validation_loss": statistics.mean(losses), "losses": losses})
            print(f"{method:<32}{row['lr']:<8g}{statistics.mean(losses):.4f}  {losses}", flush=True)
    baseline = min(row["validation_loss"] for row in results if row["optimizer"] == "adamw")
    for row in results:
        row["over_better_adamw"] = row["validation_loss"] / baseline
    record.write("quality", {"seeds": seeds, "rows": results})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sweep", "final"])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, help="default: the preset's")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.what == "sweep":
        sweep(arguments.workers, arguments.steps)
    else:
        final(arguments.workers, arguments.steps, arguments.seeds)


if __name__ == "__main__":
    main()
