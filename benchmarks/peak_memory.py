"""Peak memory of one training step of the paper's LLaMA of 60M parameters: `python -m benchmarks.peak_memory`.

Each configuration runs in processes of its own, on one short sequence, so that activations do not drown the rest; at
rank 128, float32, all bases refitted in the first step and in none of the others. Measured are

- gradients: the most bytes of gradients alive at once, p.grad and accumulated coordinates, looked at as each one comes;
- tensors: weights, optimizer state, and the most bytes of all tensors that a step made (as `memory_report` counts);
- resident: the process, at its highest during the step, less what it had before the model was made. In a process apart,
  where nothing counts tensors; larger blocks go back to the system at once, so that freed memory is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_optim
from benchmarks import nano, record
from benchmarks.memory import SIZES, table
from lowrank_optim.memory.peak import measure

SIZE, HEADS, SEQUENCE, VOCABULARY = "60M", 8, 64, 32000
LOW_RANK = {"rank": SIZES[SIZE][3], "stagger": False}
MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """An optimizer, and how it is stepped."""

    make: type[torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    backward: dict[str, Any] | None = None  # options of step_in_backward

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        ours = issubclass(self.make, lowrank_optim.LowRankOptimizer)
        params = lowrank_optim.param_groups(model, verbose=False) if ours else model.parameters()
        optimizer = self.make(params, **self.options)
        if self.backward is not None:
            lowrank_optim.step_in_backward(model, optimizer, self.micro_batches, **self.backward)
        return optimizer

    def predicted(self) -> lowrank_optim.MemoryEstimate:
        with torch.device("meta"):
            model = build()
        during = {"step_in_backward": self.backward is not None, "accumulation_steps": self.micro_batches}
        return lowrank_optim.estimate_memory(model, self.make, **during, **self.options)


_ADAMW, _GALORE, _GALORE8 = torch.optim.AdamW, lowrank_optim.GaLoreAdamW, lowrank_optim.GaLoreAdamW8bit
SETTINGS = {
    "torch AdamW": Setting(_ADAMW, {"foreach": False}),
    "torch AdamW, foreach": Setting(_ADAMW, {"foreach": True}),
    "GaLoreAdamW": Setting(_GALORE, LOW_RANK),
    "GaLoreAdamW, in backward": Setting(_GALORE, LOW_RANK, 1, {}),
    "GaLoreAdamW8bit, in backward": Setting(_GALORE8, LOW_RANK, 1, {}),
    "GaLoreAdamW, 4 micro-batches": Setting(_GALORE, LOW_RANK, 4),
    "GaLoreAdamW, 4 in backward": Setting(_GALORE, LOW_RANK, 4, {}),
    "GaLoreAdamW, 4 in backward, basis of one": Setting(_GALORE, LOW_RANK, 4, {"basis_from": "micro-batch"}),
}


def build() -> nn.Module:
    hidden, mlp, layers, _ = SIZES[SIZE]
    shape = {"hidden": hidden, "mlp": mlp, "layers": layers, "heads": HEADS, "vocab": VOCABULARY, "sequence": SEQUENCE}
    device = torch.get_default_device().type
    job = SimpleNamespace(**shape, seed=0, device=device, dtype="fp32")
    model: nn.Module = nano.example("model").build(job)
    return model


# -- in a process of its own -------------------------------------------------------------------------------------------


def resident(setting: Setting) -> dict[str, Any]:
    import transformers.models.llama.modeling_llama  # noqa: F401  the library is no part of the model

    tokens = _tokens()
    before = _status("VmRSS")
    model = build()
    optimizer = setting.build(model)
    step = _step(setting, model, optimizer, tokens)
    first = _highest(step)
    step()
    return {"first": first - before, "steady": _highest(step) - before}


def tensors(setting: Setting) -> dict[str, Any]:
    model = build()
    optimizer = setting.build(model)
    step = _step(setting, model, optimizer, _tokens())

    def sums() -> list[Tensor]:
        handle = getattr(optimizer, "_in_backward", None)
        return [] if handle is None else list(handle.sums())

    weights = sum(p.nbytes for p in model.parameters())
    found: dict[str, Any] = {"weights": weights}
    for name in ("first", "steady"):
        state = lowrank_optim.state_bytes(optimizer)  # torch makes its state within the first step
        peak = measure(step, optimizer, torch.device("cpu"), sums)
        found[name] = {"gradients": peak.gradients, "tensors": weights + state + peak.whole}
        step()
    return found | {"optimizer": lowrank_optim.state_bytes(optimizer)}


def _step(setting: Setting, model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> Callable[[], None]:
    def step() -> None:
        for part in tokens[: setting.micro_batches]:
            model(part[None], labels=part[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _tokens() -> Tensor:
    return torch.randint(VOCABULARY, (4, SEQUENCE), generator=torch.Generator().manual_seed(0))


def _highest(step: Callable[[], None]) -> int:
    """The most resident bytes of this process while it runs."""
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


# -- the parent --------------------------------------------------------------------------------------------------------


def run(name: str) -> dict[str, Any]:
    setting = SETTINGS[name]
    planned = setting.predicted()
    row: dict[str, Any] = {"setting": name, "micro_batches": setting.micro_batches}
    row["predicted"] = {"gradients": planned.gradients, "optimizer": planned.optimizer, "total": planned.total}
    return row | _child(name, "tensors") | {"resident": _child(name, "resident")}


def _child(name: str, how: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.peak_memory", "--only", name, "--measure", how]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def cells(row: dict[str, Any]) -> list[str]:
    first, steady = row["first"], row["steady"]
    figures = [row["predicted"]["gradients"], steady["gradients"], first["gradients"], row["optimizer"]]
    figures += [steady["tensors"], first["tensors"], row["resident"]["steady"], row["resident"]["first"]]
    return [row["setting"], *(f"{x / MIB:.0f}" for x in figures)]


HEAD = ["MiB", "gradients, predicted", "steady", "first step", "optimizer state"]
HEAD += ["all tensors, steady", "first step", "resident, steady", "first step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SETTINGS, help="one of them, in this process, without writing results")
    parser.add_argument("--measure", choices=("tensors", "resident"), default="tensors")
    arguments = parser.parse_args()
    if arguments.only:
        what = {"tensors": tensors, "resident": resident}[arguments.measure]
        print(json.dumps(what(SETTINGS[arguments.only])))
        return
    rows = [run(name) for name in SETTINGS]
    largest = VOCABULARY * SIZES[SIZE][0] * 4
    print(f"Weights {rows[0]['weights'] / MIB:.0f} MiB; the largest gradient, of the embeddings, {largest / MIB:.1f}\n")
    print(table(HEAD, [cells(row) for row in rows]))
    about = {"model": SIZE, "dtype": "float32", "batch": 1, "sequence": SEQUENCE, "options": LOW_RANK}
    record.write("peak_memory", {**about, "largest_gradient": largest, "rows": rows})


if __name__ == "__main__":
    main()
