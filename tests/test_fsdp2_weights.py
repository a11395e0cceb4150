"""Weight-space methods under fully_shard: convert, shard, then make the optimizer; merges send thin factors only."""

from __future__ import annotations

import re

import pytest
import torch
from processes import message, spawn
from test_fsdp2 import whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from wrapped import apart

import lowrank_optim

METHODS = {  # the optimizer and its options, and those of the layer
    "relora": (lowrank_optim.ReLoRA, {"merge_every": 3, "alpha": 7.0}, {"alpha": 7.0}),
    "low_rank": (
        lowrank_optim.LowRankAdamW,
        {"refactor_every": 3, "reset_every": 4, "alpha": 5.0},
        {"alpha": 5.0, "base": "none"},
    ),
    "sltrain": (
        lowrank_optim.SLTrain,
        {"refactor_every": 3, "reset_every": 4, "alpha": 5.0, "density": 0.07},
        {"alpha": 5.0, "density": 0.07},
    ),
}
USUAL = {"lr": 0.013, "betas": (0.83, 0.97), "rank": 4, "weight_decay": 0.1}


def net(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(18, 37), nn.Tanh(), nn.Linear(37, 25), nn.Tanh(), nn.Linear(25, 18)).to(dtype)


def train(model, optimizer, last=10, rank=0, world=1, first=0):
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        x = torch.randn(12, 18, generator=torch.Generator().manual_seed(step)).to(dtype).chunk(world)[rank]
        optimizer.zero_grad()
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()


def sharded(mesh, name, dtype, **more):
    make, options, how = METHODS[name]
    model = lowrank_optim.convert(net(dtype), make.layer, rank=4, **how)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model, make(model, **{**USUAL, **options, **more})


class Gathered:
    """Shapes of the DTensors that are gathered while it is entered; what FSDP gathers for a layer is not among them."""

    def __enter__(self):
        self.shapes, self.before = [], DTensor.full_tensor

        def full_tensor(x, **options):
            self.shapes.append(tuple(x.shape))
            return self.before(x, **options)

        DTensor.full_tensor = full_tensor
        return self

    def __exit__(self, *_):
        DTensor.full_tensor = self.before


def two(rank, world, folder):
    mesh, results = init_device_mesh("cpu", (world,)), {}
    for name in METHODS:
        model, optimizer = sharded(mesh, name, torch.float64)
        with Gathered() as gathered:
            train(model, optimizer, 10, rank, world)
        table = optimizer.report()
        results[name] = whole(model), gathered.shapes, [row.reason for row in table], [row.state_bytes for row in table]
    model, optimizer = sharded(mesh, "relora", torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.125)
    for layer in (model[0], model[2]):
        layer.merge_(1)
    results["bf16"] = whole(model)
    results["refused"] = refusals(mesh)
    if rank == 0:
        torch.save(results, f"{folder}/two.pt")


def refusals(mesh):
    def shard(how=None, **options):
        how = {"rank": 4, "alpha": 32.0} if how is None else how
        model = lowrank_optim.convert(net(torch.float32), lowrank_optim.LowRankLinear, **how)
        fully_shard(model, mesh=mesh)
        return lowrank_optim.ReLoRA(model, **{"rank": 4, **options})

    bare = net(torch.float32)
    fully_shard(bare, mesh=mesh)
    sparse = lowrank_optim.convert(net(torch.float32), lowrank_optim.SparseLowRankLinear, rank=4)
    fully_shard(sparse, mesh=mesh)
    both = NotImplementedError, ValueError
    return {
        "bare": message(both, lowrank_optim.ReLoRA, bare, rank=4),
        "rank": message(both, shard, rank=3),
        "alpha": message(both, shard, alpha=5.0),
        "reset": message(both, shard, reset="magnitude", reset_ratio=0.9),
        "include": message(both, shard, include=["0.weight"]),
        "none": message(both, shard, {"rank": 4, "base": "none"}),
        "density": message(both, lowrank_optim.SLTrain, sparse, rank=4, density=0.1),
        "sst": message(both, lowrank_optim.SST, sparse, rank=4),
        "merge": message(both, lowrank_optim.merge, sparse),
        "kind": message(both, lowrank_optim.ReLoRA, sparse, rank=4),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    spawn(two, 2, str(folder))
    return torch.load(folder / "two.pt")


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one(name, results):
    """Over three restarts."""
    make, options, _ = METHODS[name]
    model = net(torch.float64)
    optimizer = make(model, **USUAL, **options)
    train(model, optimizer)
    end, gathered, reasons, kept = results[name]
    assert apart(end, model.state_dict()) < 1e-9
    assert gathered, "restarts have sent something"
    assert max(min(shape) for shape in gathered) == USUAL["rank"], "and factors only"
    table = optimizer.report()
    assert reasons[:2] == [row.reason for row in table][:2]
    assert all(0 < ours < row.state_bytes for ours, row in zip(kept, table, strict=True))


def test_merged_weights_are_rounded_as_in_one_process(results):
    model = lowrank_optim.convert(net(torch.bfloat16), lowrank_optim.LowRankLinear, rank=4, alpha=7.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.125)
    for layer in (model[0], model[2]):
        layer.merge_(1)
    assert apart(results["bf16"], model.state_dict()) == 0


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("bare", "convert the bare model first .lowrank_optim.convert., shard it then, and make the optimizer last"),
        ("rank", "converted with rank=4, and ReLoRA was told 3"),
        ("alpha", "converted with alpha=32.0, and ReLoRA was told 5.0"),
        ("reset", 'Use reset="drop"'),
        ("include", "give it to convert"),
        ("none", "converted with base='none', and ReLoRA was told 'dense'"),
        ("density", "converted with density=0.03, and SLTrain was told 0.1"),
        ("sst", "ReLoRA, SLTrain and LowRankAdamW send thin factors only"),
        ("merge", "Save the full state dict"),
        ("kind", "which ReLoRA does not know"),
    ],
)
def test_refusals(what, said, results):
    assert re.search(said, results["refused"][what]), results["refused"][what]
