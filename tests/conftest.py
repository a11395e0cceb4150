from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lowrank_optim.ops import native

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent)]  # tests import the table, the references and the benchmarks by name

native.load()  # else the kernels would change under the tests, with the first optimizer
torch.set_num_threads(1)  # on matrices this small a second thread only costs time


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same numbers, and must not depend on what ran before it."""
    torch.manual_seed(0)
