"""Sharded over two dimensions of a mesh: tensor parallelism with FSDP2."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import lowrank_optim
from tests.cases import CASES
from tests.support.processes import spawn
from tests.support.sharded import NEVER, ROWS, difference, saved, small, whole, whole_from
from tests.support.wrapped import Small, apart, steps

pytestmark = pytest.mark.slow  # its processes take long

LAYOUTS = {"row": (Shard(0), Shard(1)), "column": (_StridedShard(0, split_factor=2), Shard(0))}
USUAL = ("galore_adamw", "frugal")  # of the default run; the slow one has all methods
HIDDEN = 22  # tensor parallelism wants equal parts of it; FSDP makes unequal ones of these
OPTIONS = {"lr": 0.01, "rank": 3, "update_proj_gap": 4, "moments": "rotate", "state_dtype": "bfloat16"}


def parallel(mesh):
    """As in test_fsdp2, with a layer whose rows are cut twice, and one whose rows and columns are."""
    torch.manual_seed(0)
    model = Small(HIDDEN)
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    for layer in (model.up, model.down, model):
        fully_shard(layer, mesh=mesh["dp"])
    return model, lowrank_optim.GaLoreAdamW(model.named_parameters(), **OPTIONS)


def model_of_four(mesh, folder):
    rank, world = mesh["dp"].get_local_rank(), mesh["dp"].size()
    model, optimizer = parallel(mesh)
    steps(model, optimizer, 0, 6, rank, world)
    dcp.save(saved(model, optimizer), checkpoint_id=f"{folder}/dcp")
    steps(model, optimizer, 6, 11, rank, world)
    states = {name: optimizer.state[p] for name, p in model.named_parameters()}
    placed = {
        (name, key): str(states[name][key].placements)
        for name in ("up.weight", "down.weight")
        for key in ("basis", "exp_avg")
        if hasattr(states[name][key], "placements")
    }
    again, other = parallel(mesh)
    state = saved(again, other)
    dcp.load(state, checkpoint_id=f"{folder}/dcp")
    set_model_state_dict(again, state["model"])
    set_optimizer_state_dict(again, other, state["optimizer"])
    steps(again, other, 6, 11, rank, world)
    rows = {row.name: (row.layout, row.side, row.sent_per_step) for row in optimizer.report()}
    flat = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = whole_from(folder, flat, dist.get_rank(), dist.get_world_size(), HIDDEN)
    return {"end": whole(model), "again": whole(again), "fsdp": sharded, "placed": placed, "rows": rows}


def four(rank, world, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    results = {
        (case.name, name): difference(case, torch.float64, mesh, placements)
        for case in CASES
        for name, placements in LAYOUTS.items()
        if case.name in USUAL
    }
    case = next(case for case in CASES if case.name == "galore_adamw")
    results["noise"] = difference(case, torch.bfloat16, mesh, LAYOUTS["row"], state_dtype="bfloat16", last=9)
    results["model"] = model_of_four(mesh, folder)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return {**spawn(four, 4, str(folder)), "folder": folder}


def test_four_processes_equal_one(results):
    for name in USUAL:
        assert max(results[name, layout] for layout in LAYOUTS) < 1e-9, name


def test_bfloat16_is_rounded_as_in_one_process(results):
    """Random numbers are those of the places of elements, where the local part is columns of several rows."""
    assert results["noise"] == 0


def test_a_model_equals_one_process(results):
    model, optimizer = small(hidden=HIDDEN)
    steps(model, optimizer, 0, 11)
    assert apart(results["model"]["end"], model.state_dict()) < 1e-6


def test_state_is_sharded_like_its_matrix(results):
    placed = results["model"]["placed"]
    assert placed["up.weight", "exp_avg"] == "(_StridedShard(dim=1, sf=2), Shard(dim=1))", "n is of rows of the weight"
    assert ("up.weight", "basis") not in placed
    assert placed["down.weight", "basis"] == "(Shard(dim=0), Replicate())"
    assert placed["down.weight", "exp_avg"] == "(Replicate(), Shard(dim=1))"
    rows = results["model"]["rows"]
    assert rows["up.weight"] == ("6 of 22 rows", "right", 0)
    assert rows["down.weight"] == ("6 of 12 rows, 11 of 22 columns", "left", 4 * 3 * 11)


def test_a_checkpoint_resumes_on_another_mesh(results):
    """On the same mesh, on one without tensor parallelism, and in one process."""
    end = results["model"]["end"]
    assert apart(end, results["model"]["again"]) == 0
    assert apart(end, results["model"]["fsdp"]) < 1e-6
    assert apart(end, whole_from(results["folder"], None, 0, 1, HIDDEN)) < 1e-6


def every(rank, world):
    mesh, results = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), {}
    for case in CASES:
        for name, placements in LAYOUTS.items():
            results[case.name, name] = difference(case, torch.float64, mesh, placements)
    return results


@pytest.mark.slow
def test_every_method():
    """Matrices whose rows and columns are cut, or whose rows are cut twice; of odd lengths, some shards empty."""
    for name, got in spawn(every, 4).items():
        expected = {**NEVER, **ROWS}.get(name[0])
        assert expected in got if expected else got < 1e-9, name
