"""A job: everything that one training run depends on, as plain numbers and strings."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import PretrainError

# These may differ between a run and its continuation: they change what is recorded or where, never the weights.
FREE = frozenset({"preset", "label", "device", "eval_every", "save_every", "corpus"})
WHOLE = ("single", "ddp")  # strategies in which every process has the whole model


@dataclass(frozen=True)
class Job:
    """Equal jobs on the same machine give equal weights, bit for bit."""

    preset: str
    label: str  # the run's name in the table, the plot and the file system
    optimizer: str  # class name
    lr: float
    hidden: int
    mlp: int
    layers: int
    heads: int
    vocab: int
    sequence: int
    steps: int
    batch: int
    micro_batch: int
    warmup: float
    clip: float
    dtype: str
    seed: int
    corpus: str  # folder written by corpus.prepare
    corpus_digest: str
    eval_every: int
    save_every: int
    device: str
    keywords: dict[str, Any] = field(default_factory=dict)
    matrix_lr_scale: float = 1.0
    amp: str = "none"
    step_in_backward: bool = False
    clip_by: str = "global"
    accumulate: str = "projected"  # this and the next: with step_in_backward
    basis_from: str = "window"
    restart_warmup: int = 0  # updates of the ramp of lr after each restart of all layers
    warm_start: int = (
        0  # updates of the dense model, by AdamW with the lr and keywords of `dense`, before it is converted
    )
    dense: dict[str, Any] = field(default_factory=dict)
    strategy: str = "single"
    world: int = 1  # processes, each of which trains on an equal share of every batch

    @property
    def share(self) -> int:
        """Sequences per update and process."""
        return self.batch // self.world

    @property
    def micro_batches(self) -> int:
        """Per step, of each process; the last one may be smaller."""
        return math.ceil(self.share / self.micro_batch)

    @property
    def layout(self) -> tuple[str, int | None]:
        """What checkpoints depend on: DeepSpeed's also on the number of processes."""
        if self.strategy.startswith("zero"):
            return self.strategy, self.world
        return ("whole" if self.strategy in WHOLE else self.strategy), None

    @property
    def before(self) -> Job:
        """What trains during the warm start."""
        return dataclasses.replace(self, optimizer="AdamW", **self.dense)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Job:
        # JSON has no tuples, and optimizers ask for tuples (betas).
        keywords = {key: tuple(v) if isinstance(v, list) else v for key, v in values["keywords"].items()}
        return cls(**{**values, "keywords": keywords})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Job:
        return cls.from_dict(json.loads(path.read_text()))

    def check_continues(self, earlier: Job) -> None:
        """Refuse to continue `earlier` with arguments that would have led it elsewhere."""
        old, new = earlier.to_dict(), self.to_dict()
        free = FREE | {"strategy", "world"} if self.layout == earlier.layout else FREE
        changed = [f"{k} was {old[k]!r}, is {new[k]!r}" for k in new if k not in free and old[k] != new[k]]
        if changed:
            raise PretrainError(
                f"cannot resume {self.label}: these arguments changed since the run began: {'; '.join(changed)}. "
                "Give the old values back, or start afresh with another --out"
            )
