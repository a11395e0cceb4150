"""THE matrix: every method, in every way to use two processes, trains as in one, or says why it cannot.

Its rows are those of cases.py and weight_cases.py. `run()` fills all of it; test_matrix.py looks at what came out, and
`python -m benchmarks.distributed_table` writes it into docs/distributed.md.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import CASES, Case, gradients
from processes import same_everywhere
from test_zero import Weights, groups_of, initialized, spawn
from test_zero import weights as gathered
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from weight_cases import WEIGHT_CASES, WeightCase

from lowrank_optim import convert, ddp_project

STEPS = 20  # refreshes before steps 0, 7 and 14 for most methods, or restarts after each third step
WORLD = 2
DTYPES = (torch.float32, torch.bfloat16)
COLUMNS = {
    "ddp": "DDP",
    "ddp_project": "`ddp_project`",
    "fsdp2": "FSDP2",
    "fsdp2 right": 'FSDP2, `"right"`',
    "zero0": "ZeRO-0",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}


class Projecting:
    """A method of cases.py, on weights whose gradients are chosen. Those of ranks differ, and have an exact mean."""

    def __init__(self, case: Case) -> None:
        self.case, self.name, self.method = case, case.name, case.make.__name__
        torch.manual_seed(1)
        self.grads = [gradients(tuple(p.shape), STEPS) for p in Weights().parameters()]

    def columns(self) -> list[str]:
        return [column for column in COLUMNS if column != "fsdp2 right" or self.case.has("proj_type", "right")]

    def model(self) -> nn.Module:
        return Weights()

    def sharded(self, model: nn.Module) -> nn.Module:
        return model

    def optimizer(self, model: nn.Module, side: str) -> Any:
        return self.case.build(groups_of(model, self.case, side))

    def loss(self, model: nn.Module, step: int, dtype: torch.dtype, rank: int, world: int) -> Tensor:
        shift = (-1) ** rank / 8 if world > 1 else 0.0
        mean = [(some[step] * 8).round().clamp(-60, 60) / 8 for some in self.grads]
        return model([(g + shift).to(dtype) for g in mean])


class Converting:
    """A method of weight_cases.py, on a small network with data: ranks have half of what each head sees.

    In bfloat16 they have the same half, because gradients of halves would be rounded to other means than those of both.
    And eps is well above the rounding of gradients in float32, which Adam divides by the gradients' own size.
    """

    def __init__(self, case: WeightCase) -> None:
        self.case, self.name, self.method = case, case.name, case.make.__name__

    def columns(self) -> list[str]:
        return [column for column in COLUMNS if column != "fsdp2 right"]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        layers = (nn.Linear(18, 37), nn.Tanh(), nn.Linear(37, 25, bias=False), nn.Tanh(), nn.Linear(25, 25))
        return nn.Sequential(*layers, nn.LayerNorm(25), nn.Linear(25, 18))

    def sharded(self, model: nn.Module) -> nn.Module:
        """Converted before it is sharded, as the method would convert it."""
        (layer, *_) = self.optimizer(self.model(), "")._conversion.layers.values()
        options = {key: self.case.kwargs[key] for key in self.case.make.layer_options if key in self.case.kwargs}
        return convert(
            model, self.case.make.layer, **{"rank": self.case.common["rank"], **options, **layer.made_with()}
        )

    def optimizer(self, model: nn.Module, side: str) -> Any:
        return self.case.build(model, eps=1e-3)

    def loss(self, model: nn.Module, step: int, dtype: torch.dtype, rank: int, world: int) -> Tensor:
        x = torch.randn(2, 6, 18, generator=torch.Generator().manual_seed(step))
        if dtype != torch.float32:
            rank, world = 0, 2
        x = x.chunk(world, dim=1)[rank].flatten(0, 1).to(dtype)
        return (model(x) - x.flip(-1)).float().square().mean()


ROWS = [*map(Projecting, CASES), *map(Converting, WEIGHT_CASES)]


# -- one cell ----------------------------------------------------------------------------------------------------------


def alone(row: Any, dtype: torch.dtype, side: str = "std") -> list[Tensor]:
    """The weights after training in this process."""
    model = row.model().to(dtype)
    optimizer = row.optimizer(model, side)
    _train(row, model, optimizer, dtype)
    return [p.detach() for p in model.parameters()]


def together(row: Any, column: str, dtype: torch.dtype) -> list[Tensor] | str:
    """The whole weights after training in several, or what was said instead."""
    try:
        return _zero(row, int(column[-1]), dtype) if column.startswith("zero") else _torch(row, column, dtype)
    except (NotImplementedError, ValueError) as error:
        return str(error)


def _torch(row: Any, column: str, dtype: torch.dtype) -> list[Tensor]:
    model = row.model().to(dtype)
    if column.startswith("fsdp2"):
        model = row.sharded(model)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for one in (*(child for child in model.children() if list(child.parameters())), model):
            fully_shard(one, mesh=mesh)
        optimizer = row.optimizer(model, column.partition(" ")[2] or "std")
        _train(row, model, optimizer, dtype, dist.get_rank(), dist.get_world_size())
        return [p.full_tensor().detach() for p in model.parameters()]
    optimizer = row.optimizer(model, "std")
    wrapped = DistributedDataParallel(model)
    if column == "ddp_project":
        ddp_project(wrapped, optimizer)
    _train(row, wrapped, optimizer, dtype, dist.get_rank(), dist.get_world_size())
    assert same_everywhere(model.parameters()), "ranks differ"
    return [p.detach() for p in model.parameters()]


def _zero(row: Any, stage: int, dtype: torch.dtype) -> list[Tensor]:
    model = row.model()
    engine = initialized(model, row.optimizer(model, "std"), stage, dtype)
    for step in range(STEPS):
        engine.backward(row.loss(engine, step, dtype, dist.get_rank(), dist.get_world_size()))
        engine.step()
    return gathered(engine, stage)


def _train(row: Any, model: nn.Module, optimizer: Any, dtype: torch.dtype, rank: int = 0, world: int = 1) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        row.loss(model, step, dtype, rank, world).backward()
        optimizer.step()


# -- all of them -------------------------------------------------------------------------------------------------------

Filled = dict[tuple[str, str, torch.dtype], "list[Tensor] | str"]


def worker(rank: int, world: int, folder: str, rows: list[str], columns: list[str]) -> None:
    filled = {}
    for row in (row for row in ROWS if row.name in rows):
        for column in (column for column in row.columns() if column in columns):
            for dtype in DTYPES:
                filled[row.name, column, dtype] = together(row, column, dtype)
    if rank == 0:
        torch.save(filled, f"{folder}/filled.pt")


def run(world: int = WORLD, columns: list[str] | None = None, rows: list[str] | None = None) -> Filled:
    """What `together` says for each row, column and dtype."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(worker, world, folder, rows or [row.name for row in ROWS], columns or list(COLUMNS))
        return torch.load(Path(folder) / "filled.pt")


# -- as a table --------------------------------------------------------------------------------------------------------


def table(filled: Filled) -> str:
    """In markdown; "no" has the number of its reason, and reasons are listed below."""
    reasons: list[str] = []
    lines = ["| method | " + " | ".join(COLUMNS.values()) + " |", "| --- " * (1 + len(COLUMNS)) + "|"]
    for row in ROWS:
        cells = (_cell([filled.get((row.name, column, dtype), "-") for dtype in DTYPES], reasons) for column in COLUMNS)
        lines.append(f"| `{row.method}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


def _cell(both: list[Any], reasons: list[str]) -> str:
    words = [_word(one, reasons) for one in both]
    return words[0] if words[0] == words[1] else f"{words[0]}; bfloat16: {words[1]}"


def _word(one: Any, reasons: list[str]) -> str:
    if not isinstance(one, str) or one == "-":
        return one if isinstance(one, str) else "yes"
    reason = beginning(one)
    if reason not in reasons:
        reasons.append(reason)
    return f"no ({reasons.index(reason) + 1})"


def beginning(refusal: str) -> str:
    """Why, without which parameter it was and what to do instead."""
    said = refusal.partition(". ")[0]
    return re.sub(r"^\w+ cannot update .*?: ", "", said)
