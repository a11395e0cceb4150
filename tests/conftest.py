from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from lowrank_optim.ops import native

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # where `pretrain` is
pytest.register_assert_rewrite("tests.support")

native.load()  # else the kernels would change under the tests, with the first optimizer
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # more only cost time on matrices this small


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same numbers, and must not depend on what ran before it."""
    torch.manual_seed(0)
