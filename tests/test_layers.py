"""The house: a file imports only from floors below its own, and nobody reads an optimizer's private attributes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "lowrank_optim"

# From the ground up. An entry is a folder, or a file directly in the package. Files of one floor import each other
# within their folder only.
FLOORS = [
    ("ops", "hyperparameters"),
    ("recipe",),
    ("parts", "checks", "distributed"),
    ("engine",),
    ("reports", "wrappers", "layers", "groups", "schedules"),
    ("optimizer",),
    ("modes", "weight_space", "full_state", "accumulate"),
    ("memory", "methods"),
    ("__init__",),
    ("build",),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Pairs of rooms on one floor of which the first may import the second.
NEIGHBOURS = {("layers", "groups")}
OWN = {"optimizer.py", "weight_space.py", "methods"}  # may read private attributes of optimizers


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room(module: str) -> str:
    """The folder directly in the package, or the file, that a module is in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(path: Path) -> str:
    parts = [*path.relative_to(ROOT.parent).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module of the package) of every import, those for types only and within functions included."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.name.startswith(ROOT.name))
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            if target.split(".")[0] == ROOT.name:
                for name in node.names:
                    inner = f"{target}.{name.name}"
                    found = (ROOT.parent / inner.replace(".", "/")).with_suffix(".py").exists() or (
                        ROOT.parent / inner.replace(".", "/") / "__init__.py"
                    ).exists()
                    yield node.lineno, inner if found else target


def upward(path: Path) -> Iterator[str]:
    own = room(module_of(path))
    for line, target in imports(path):
        other = room(target)
        higher = FLOOR[other] > FLOOR[own]
        neighbour = FLOOR[other] == FLOOR[own] and other != own and (own, other) not in NEIGHBOURS
        if higher or neighbour:
            yield f"{path.relative_to(ROOT)}:{line} ({own}) imports {target} ({other})"


def test_files_import_only_downwards():
    assert [line for path in files() for line in upward(path)] == []


def test_an_upward_import_is_found(tmp_path, monkeypatch):
    """Also under TYPE_CHECKING, also within a function."""
    for source in (
        "from ..optimizer import LowRankOptimizer\n",
        "if TYPE_CHECKING:\n    from .. import optimizer\n",
        "def f():\n    import lowrank_optim.optimizer\n",
        "from lowrank_optim.optimizer import LowRankOptimizer\n",
    ):
        path = ROOT / "engine" / "chunk.py"
        monkeypatch.setattr(Path, "read_text", lambda self, source=source: source)
        assert len(list(upward(path))) == 1, source


def private_reads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, attribute) of each read of `optimizer._name`, whatever object the optimizer is an attribute of."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("_optimizer_"):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if name in ("optimizer", "instance", "method") and not node.attr.startswith("__"):
                yield node.lineno, node.attr


def test_private_attributes_of_an_optimizer_are_not_read():
    found = []
    for path in files():
        if not OWN & set(path.relative_to(ROOT).parts):
            reads = private_reads(ast.parse(path.read_text()))
            found += [f"{path.relative_to(ROOT)}:{line} reads {name}" for line, name in reads]
    assert found == []


def test_a_private_read_is_found():
    source = "optimizer._plans\nself.optimizer._step()\noptimizer.table\ntable.method._x\noptimizer.__class__"
    assert sorted(line for line, _ in private_reads(ast.parse(source))) == [1, 2, 4]


def test_few_files_are_directly_in_the_package():
    assert len(list(ROOT.glob("*.py"))) <= 12
