"""THE matrix: every method, in every way to use two processes, trains as in one, or says why it cannot.

Its rows are those of cases.py and weight_cases.py. `run()` fills all of it; test_matrix.py looks at what came out, and
`python -m benchmarks.distributed_table` writes it into docs/distributed.md.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lowrank_optim import convert, ddp_project
from tests.cases import CASES, Case, gradients
from tests.support.processes import same_everywhere
from tests.support.zero import Weights, groups_of, initialized, spawn
from tests.support.zero import weights as gathered
from tests.weight_cases import WEIGHT_CASES, WeightCase

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
# name, shape, rank: tall, wide, square, a stack; in full space. Halves end within rows.
WEIGHTS = [
    ("tall", (25, 10), 4), ("wide", (9, 22), 3), ("square", (13, 13), 5), ("stack", (3, 5, 16), 2),
    ("bias", (13,), None),
]  # fmt: skip
GRID = {torch.float32: 2**10, torch.bfloat16: 2**5}  # g is a multiple of 1 / grid: so are g - 1/8 and g + 1/8, exactly
LARGE = ("large", (61, 70), 3)  # enough to be quantized


class Projecting:
    """A method of cases.py, on weights whose gradients are chosen. Those of ranks differ, and have an exact mean."""

    def __init__(self, case: Case) -> None:
        self.case, self.name, self.method = case, case.name, case.make.__name__
        self.weights = [*WEIGHTS, LARGE] if case.has("basis_dtype") else WEIGHTS  # then quantized by default
        self.grads = [gradients(tuple(p.shape), STEPS) for p in self.model().parameters()]  # which sets the seed

    def columns(self) -> list[str]:
        return [column for column in COLUMNS if column != "fsdp2 right" or self.case.has("proj_type", "right")]

    def model(self) -> nn.Module:
        return Weights(self.weights)

    def sharded(self, model: nn.Module) -> nn.Module:
        return model

    def optimizer(self, model: nn.Module, side: str) -> Any:
        return self.case.build(groups_of(model, self.case, side, self.weights))

    def loss(self, model: nn.Module, step: int, dtype: torch.dtype, rank: int, world: int) -> Tensor:
        shift, grid = (-1) ** rank / 8 if world > 1 else 0.0, GRID[dtype]
        mean = [(some[step] * grid).round().clamp(-7.5 * grid, 7.5 * grid) / grid for some in self.grads]
        return model([(g + shift).to(dtype) for g in mean])

    def output(self, model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        return []

    def compared(self, got: list[Tensor]) -> list[Tensor]:
        """What does not depend on signs and bases that a method is free to choose."""
        return got


class Converting:
    """A method of weight_cases.py, on a small network with data: ranks have half of what each head sees.

    In bfloat16 they have the same half, as gradients of halves would be rounded to other means than those of both.
    And eps is well above the rounding of gradients in float32: Adam divides gradients by their own size, and
    restarts with each restart, so rounding errors of gradients that have hardly a size would be whole steps of weights.
    """

    def __init__(self, case: WeightCase) -> None:
        self.case, self.name, self.method = case, case.name, case.make.__name__

    def columns(self) -> list[str]:
        return [column for column in COLUMNS if column != "fsdp2 right"]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Linear(18, 37), nn.Tanh(), nn.Linear(37, 25, bias=False), nn.Tanh(), nn.LayerNorm(25)
        model = nn.Sequential(*layers, nn.Linear(25, 18))
        with torch.no_grad():
            for w in (model[0].weight, model[2].weight, model[5].weight):  # whose singular values are far apart
                spread = torch.linspace(1.5, 0.5, min(w.shape))
                nn.init.orthogonal_(w).mul_(spread if w.shape[0] > w.shape[1] else spread[:, None])
        return model

    def sharded(self, model: nn.Module) -> nn.Module:
        """Converted before it is sharded, as the method would convert it."""
        (layer, *_) = self.optimizer(self.model(), "").conversion.layers.values()
        options = {key: self.case.kwargs[key] for key in self.case.make.layer_options if key in self.case.kwargs}
        return convert(
            model, self.case.make.layer, **{"rank": self.case.common["rank"], **options, **layer.made_with()}
        )

    def optimizer(self, model: nn.Module, side: str) -> Any:
        return self.case.build(model, lr=0.004, eps=0.1)

    def loss(self, model: nn.Module, step: int, dtype: torch.dtype, rank: int, world: int) -> Tensor:
        if dtype == torch.bfloat16:
            rank, world = 0, WORLD
        x = self._data(step).chunk(world, dim=1)[rank].flatten(0, 1).to(dtype)
        return (model(x) - x.flip(-1)).to(torch.promote_types(dtype, torch.float32)).square().mean()

    def output(self, model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        with torch.no_grad():
            return [model(self._data(STEPS).flatten(0, 1).to(dtype)).clone()]

    def compared(self, got: list[Tensor]) -> list[Tensor]:
        return got[-1:]

    def _data(self, step: int) -> Tensor:
        return torch.randn(2, 6, 18, generator=torch.Generator().manual_seed(step))


ROWS = [*map(Projecting, CASES), *map(Converting, WEIGHT_CASES)]


# -- one cell ----------------------------------------------------------------------------------------------------------


def alone(row: Any, dtype: torch.dtype, side: str = "std") -> list[Tensor]:
    """The weights after training in this process, and what the network then says."""
    model = row.model().to(dtype)
    optimizer = row.optimizer(model, side)
    _train(row, model, optimizer, dtype)
    return [p.detach() for p in model.parameters()] + row.output(model, dtype)


def together(row: Any, column: str, dtype: torch.dtype) -> list[Tensor] | str:
    """The same of several processes, weights whole; or what was said instead."""
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
        return [p.full_tensor().detach() for p in model.parameters()] + row.output(model, dtype)
    optimizer = row.optimizer(model, "std")
    wrapped = DistributedDataParallel(model)
    if column == "ddp_project":
        ddp_project(wrapped, optimizer)
    _train(row, wrapped, optimizer, dtype, dist.get_rank(), dist.get_world_size())
    assert same_everywhere(model.parameters()), "ranks differ"
    return [p.detach() for p in model.parameters()] + row.output(model, dtype)


def _zero(row: Any, stage: int, dtype: torch.dtype) -> list[Tensor]:
    model = row.model()
    engine = initialized(model, row.optimizer(model, "std"), stage, dtype)
    for step in range(STEPS):
        engine.backward(row.loss(engine, step, dtype, dist.get_rank(), dist.get_world_size()))
        engine.step()
    return gathered(engine, stage) + row.output(engine, dtype)


def _train(row: Any, model: nn.Module, optimizer: Any, dtype: torch.dtype, rank: int = 0, world: int = 1) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        row.loss(model, step, dtype, rank, world).backward()
        optimizer.step()


# -- all of them -------------------------------------------------------------------------------------------------------

Filled = dict[tuple[str, str, torch.dtype], "list[Tensor] | str"]


def worker(rank: int, world: int, rows: list[str], columns: list[str]) -> Filled:
    filled = {}
    for row in (row for row in ROWS if row.name in rows):
        for column in (column for column in row.columns() if column in columns):
            for dtype in DTYPES:
                filled[row.name, column, dtype] = together(row, column, dtype)
    return filled


def run(world: int = WORLD, columns: list[str] | None = None, rows: list[str] | None = None) -> Filled:
    """What `together` says for each row, column and dtype."""
    return spawn(worker, world, rows or [row.name for row in ROWS], columns or list(COLUMNS))


# -- as a table --------------------------------------------------------------------------------------------------------


def table(filled: Filled) -> str:
    """In markdown; "no" has the number of its reason, and reasons are listed below."""
    reasons: list[str] = []
    lines = ["| method | " + " | ".join(COLUMNS.values()) + " |", "| --- " * (1 + len(COLUMNS)) + "|"]
    for row in ROWS:
        both = ([filled.get((row.name, column, dtype), "-") for dtype in DTYPES] for column in COLUMNS)
        lines.append(f"| `{row.method}` | " + " | ".join(_cell(some, row.method, reasons) for some in both) + " |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


def _cell(both: list[Any], method: str, reasons: list[str]) -> str:
    words = [_word(one, method, reasons) for one in both]
    return words[0] if words[0] == words[1] else f"{words[0]}; bfloat16: {words[1]}"


def _word(one: Any, method: str, reasons: list[str]) -> str:
    if not isinstance(one, str) or one == "-":
        return one if isinstance(one, str) else "yes"
    reason = beginning(one, method)
    if reason not in reasons:
        reasons.append(reason)
    return f"no ({reasons.index(reason) + 1})"


def beginning(refusal: str, method: str) -> str:
    """Why, without which method and parameter it was, and what to do instead."""
    said = refusal.partition(". ")[0]
    return re.sub(r"^\w+ (cannot update .*?|needs whole gradients): ", "", said).replace(method, "...")
