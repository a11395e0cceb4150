"""Sums over ranks: as few collectives as there are kinds of sums, however many matrices there are."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import lowrank_optim
from lowrank_optim.distributed import lockstep
from lowrank_optim.distributed.lockstep import Peers
from tests.support.collectives import Counted
from tests.support.processes import spawn

LAYERS = 4
# Between refreshes; one collective has the norms of all gradients.
THIN = {("GaLoreAdamW", "right"): 1, ("GaLoreAdamW", "left"): 2, ("FRUGAL", "right"): 2}
# attention and the gated layers of a LLaMA block, and a norm
BLOCK = {
    "q": (24, 24), "k": (24, 24), "v": (24, 24), "o": (24, 24), "gate": (40, 24), "up": (40, 24), "down": (24, 40),
    "norm": (24,),
}  # fmt: skip
METHODS = {"GaLoreAdamW": {}, "FiraAdamW": {}, "LDAdamW": {}, "FRUGAL": {}, "Flora": {"update_proj_gap": 30}}


def two(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    results = {"column-major": column_major(rank, mesh), "errors": errors(mesh), "nested": nested(mesh)}
    for name, options in METHODS.items():
        for side in ("left", "right"):
            results[name, side] = [calls(mesh, name, layers, proj_type=side, **options) for layers in (1, LAYERS)]
    return results


@pytest.fixture(scope="module")
def results():
    return spawn(two, 2)


def calls(mesh, name, layers, **options):
    """Collectives of each of four steps; refreshes are before steps 0 and 3, and at first a few things are decided."""
    torch.manual_seed(0)
    named = [(f"{layer}.{key}", shape) for layer in range(layers) for key, shape in BLOCK.items()]
    params = [(key, nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)]))) for key, shape in named]
    make = getattr(lowrank_optim, name)
    known = {"update_proj_gap": 3, "stagger": False} if name != "LDAdamW" else {}
    optimizer, found = make(params, rank=4, **{**known, **options}), []
    for _ in range(4):
        for _, p in params:
            p.grad = distribute_tensor(torch.randn(p.shape), mesh, [Shard(0)])
        with Counted() as counted:
            optimizer.step()
        found.append(len(counted.sizes))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", METHODS)
def test_collectives_do_not_grow_with_the_number_of_matrices(name, side, results):
    few, many = results[name, side]
    first = slice(1 if name == "LDAdamW" else 0, None)  # whose first basis takes rounds until the slowest matrix stays
    assert few[first] == many[first], "of 7 matrices, and of 28"
    between, refresh = many[1:3], many[3]
    assert max(between) <= THIN.get((name, side), 8)
    assert refresh <= 17


def column_major(rank, mesh):
    """One rank has a tensor as LAPACK returns them, the others zeros as torch makes them."""
    x = torch.arange(12.0).view(4, 3).mT if rank == 0 else torch.zeros(3, 4)
    return lockstep.total(x, Peers(mesh.get_group(), "cpu"))


@pytest.mark.slow
def test_sums_are_of_elements_and_not_of_memory(results):
    assert torch.equal(results["column-major"], torch.arange(12.0).view(4, 3).mT)


def nested(mesh):
    """Tasks that begin tasks: what was sent together, and what each got."""
    peers, got = Peers(mesh.get_group(), "cpu"), {}

    def leaf(i):
        got[i] = lockstep.total(torch.full((2,), float(i)), peers).tolist()
        got[-i] = lockstep.total(torch.full((3,), float(-i)), peers).tolist()

    def branch(i):
        lockstep.together([lambda: leaf(10 * i), lambda: leaf(10 * i + 1)])
        lockstep.total(torch.zeros(1), peers)

    with Counted() as counted:
        lockstep.together([lambda: branch(1), lambda: branch(2), lambda: leaf(5)])
    return got, counted.sizes


@pytest.mark.slow
def test_tasks_begin_tasks(results):
    got, sizes = results["nested"]
    assert sizes == [5 * 2, 5 * 3, 2 * 1]
    assert got == {k: [2.0 * k] * (2 if k > 0 else 3) for i in (10, 11, 20, 21, 5) for k in (i, -i)}


def errors(mesh):
    """The first error ends all tasks, at once, and nothing is left of them."""
    peers, ended = Peers(mesh.get_group(), "cpu"), []

    def waits(i):
        try:
            lockstep.total(torch.zeros(1), peers)
        finally:
            ended.append(i)

    def fails():
        raise ValueError("no")

    try:
        lockstep.together([lambda: waits(1), lambda: lockstep.together([lambda: waits(2), fails]), lambda: waits(3)])
    except ValueError as error:
        said = str(error)
    grad = []
    with torch.no_grad():
        lockstep.together([lambda: grad.append(torch.is_grad_enabled()) for _ in range(2)])
    dist.barrier()
    return said, sorted(ended), grad


@pytest.mark.slow
def test_an_error_ends_all_tasks(results):
    assert results["errors"] == ("no", [1, 2, 3], [False, False])
