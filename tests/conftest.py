from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from lowrank_optim.ops import native
from tests.support import selection

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # where `pretrain` is

native.load()  # else the kernels would change under the tests, with the first optimizer
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # more only cost time on matrices this small


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-combination", action="store_true", help="run all rows of products of parameters")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run some rows of a product of parameters, most of them in the slow run only; see `tests.support.selection`."""
    if not config.getoption("every_combination"):
        items[:], left_out = selection.select(items)
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same numbers, and must not depend on what ran before it."""
    torch.manual_seed(0)
