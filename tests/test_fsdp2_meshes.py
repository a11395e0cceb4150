"""Sharded over two dimensions of a mesh: tensor parallelism with FSDP2."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from test_fsdp2 import NEVER, ROWS, difference, spawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

LAYOUTS = {"row": (Shard(0), Shard(1)), "column": (_StridedShard(0, split_factor=2), Shard(0))}


def every(rank, world, folder):
    mesh, results = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), {}
    for case in CASES:
        for name, placements in LAYOUTS.items():
            results[case.name, name] = difference(case, torch.float64, mesh, placements)
    if rank == 0:
        torch.save(results, f"{folder}/every.pt")


@pytest.mark.slow
def test_every_method(tmp_path):
    """Matrices whose rows and columns are cut, or whose rows are cut twice; of odd lengths, some shards empty."""
    spawn(every, 4, str(tmp_path))
    for name, got in torch.load(tmp_path / "every.pt").items():
        expected = {**NEVER, **ROWS}.get(name[0])
        assert expected in got if expected else got < 1e-9, name
