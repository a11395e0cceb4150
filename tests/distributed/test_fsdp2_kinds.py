"""FSDP2: stacks of experts, two-sided bases, heads, and the policies of fully_shard."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

import lowrank_optim
from tests.cases import CASES, gradients
from tests.support.processes import message, spawn
from tests.support.sharded import laid_out
from tests.support.wrapped import Small

pytestmark = pytest.mark.slow  # its processes take long

STEPS = 15
USUAL = ("galore_adamw", "q_galore", "golore", "dct", "frugal")  # of the default run; the slow one has all methods


class Experts(nn.Module):
    """Two stacks of experts, one of fewer than there may be ranks."""

    def __init__(self):
        super().__init__()
        self.many = nn.Parameter(torch.randn(5, 12, 18) / 4)
        self.few = nn.Parameter(torch.randn(1, 20, 16) / 4)


def experts(make, dtype, mesh=None, dim=0):
    """The model and its optimizer; sharded along one dimension if there is a mesh."""
    torch.manual_seed(0)
    model = Experts().to(dtype)
    for name, p in list(model.named_parameters()) if mesh is not None else ():
        setattr(model, name, nn.Parameter(laid_out(p.detach(), mesh, (Shard(dim),))))
    return model, make(model.named_parameters())


def give(p, g):
    p.grad = laid_out(g, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else g


def train(model, optimizer, first=0, last=STEPS):
    torch.manual_seed(1)
    grads = [gradients(tuple(p.shape), STEPS, p.dtype) for p in model.parameters()]
    for step in range(first, last):
        for p, some in zip(model.parameters(), grads, strict=True):
            g = some[step].clone()
            if step < 3:
                g[2:3] = 0  # an expert that no token came to: it gets a basis with its first gradient
            give(p, g)
        optimizer.step()


def apart(ours, theirs):
    """The largest difference between weights; sharded ones are gathered."""
    whole = [p.full_tensor() if hasattr(p, "device_mesh") else p for p in ours.parameters()]
    return max((p - q).abs().max().item() for p, q in zip(whole, theirs.parameters(), strict=True))


def counts(model, optimizer):
    states = [optimizer.state[p] for p in model.parameters()]
    kept = ("step", "refreshes", "refreshed_at", "refresh_gap")
    return [state[key].tolist() for state in states for key in kept if key in state]


def stacks(mesh, dim, names, dtype=torch.float64, **options):
    """By method: the difference from one process, and whether ranks count alike; or what was said."""
    found = {}
    for case in CASES:
        if case.name not in names:
            continue

        def make(params, case=case):
            return case.build(params, rank=3, **options)

        said = message(NotImplementedError, experts, make, dtype, mesh, dim)
        if said:
            found[case.name] = said
            continue
        (model, ours), (one, theirs) = experts(make, dtype, mesh, dim), experts(make, dtype)
        train(model, ours)
        train(one, theirs)
        found[case.name] = apart(model, one), counts(model, ours) == counts(one, theirs)
    return found


def resharded(mesh, folder):
    """Experts of which each rank has some, saved, and loaded where each has some rows of all, and whole."""
    case = next(case for case in CASES if case.name == "q_galore")
    model, ours = experts(case.build, torch.float64, mesh, 0)
    train(model, ours, 0, 8)
    state = {"weights": model.state_dict(), "state": get_optimizer_state_dict(model, ours)}
    dcp.save(state, checkpoint_id=f"{folder}/experts")
    train(model, ours, 8)
    again, theirs = experts(case.build, torch.float64, mesh, 1)
    state = {"weights": again.state_dict(), "state": get_optimizer_state_dict(again, theirs)}
    dcp.load(state, checkpoint_id=f"{folder}/experts")
    set_optimizer_state_dict(again, theirs, state["state"])
    train(again, theirs, 8)
    whole, one = experts(case.build, torch.float64)
    train(whole, one)
    return apart(model, whole), apart(again, whole), counts(again, theirs) == counts(whole, one)


def matrices(mesh, placements, make, shape=(12, 20), masked=False):
    """The difference from one process of one matrix, of which a third may have no gradient at first."""
    params, ends = [], []
    for sharded in (True, False):
        torch.manual_seed(0)
        w = torch.randn(shape, dtype=torch.float64)
        p = nn.Parameter(laid_out(w, mesh, placements) if sharded else w)
        optimizer = make([("w", p)])
        for step, g in enumerate(gradients(shape, STEPS, torch.float64)):
            if masked and step < 10:
                g[: shape[0] // 3] = 0
                g[:, : shape[1] // 2] = 0
            give(p, g)
            optimizer.step()
        params.append(p)
        ends.append(p.full_tensor() if sharded else p.detach())
    return (ends[0] - ends[1]).abs().max().item()


BOTH = {
    "full": lambda params: lowrank_optim.GaLoreAdamW(
        params, rank=3, proj_type="full", moments="rotate", update_proj_gap=7, weight_decay=0.1
    ),
    "full, exact": lambda params: lowrank_optim.GaLoreAdafactor(
        params, rank=3, proj_type="full", basis="svd", update_proj_gap=7
    ),
}


def heads(side, count, rank=3):
    def make(params):
        options = {"update_proj_gap": 7, "density": 0.0, "moments": "rotate", "proj_type": side}
        return lowrank_optim.GaLorePlusAdamW(params, rank=rank, heads=count, **options)

    return make


def policy(mesh, **options):
    """The difference of a model under fully_shard from one that is given the same gradients in one process."""
    torch.manual_seed(0)
    model, one = Small(), Small()
    one.load_state_dict(model.state_dict())
    for layer in (model.up, model.down, model):
        fully_shard(layer, mesh=mesh, **options)
    kwargs = {"lr": 0.01, "rank": 3, "update_proj_gap": 4, "weight_decay": 0.1}
    ours, theirs = (lowrank_optim.GaLoreAdamW(m.named_parameters(), **kwargs) for m in (model, one))
    for step in range(9):
        tokens = torch.randint(0, 11, (12, 9), generator=torch.Generator().manual_seed(step))
        tokens = tokens.chunk(mesh.size())[mesh.get_rank()]
        ours.zero_grad()
        model(tokens).float().square().mean().backward()
        for p, q in zip(model.parameters(), one.parameters(), strict=True):
            q.grad = p.grad.full_tensor()
        ours.step()
        theirs.step()
    return apart(model, one), {str(p.dtype) for p in model.parameters()}


def two(rank, world, folder):
    mesh, results = init_device_mesh("cpu", (world,)), {}
    for dim in (0, 1, 2):
        results["stacks", dim] = stacks(mesh, dim, USUAL)
    results["bf16"] = stacks(mesh, 1, ("galore_adamw",), torch.bfloat16, state_dtype="bfloat16")
    results["int8"] = stacks(mesh, 0, ("galore_adamw",), torch.bfloat16, state_dtype="int8")
    results["resharded"] = resharded(mesh, folder)
    for dim in (0, 1):
        for name, make in BOTH.items():
            results[name, dim] = matrices(mesh, (Shard(dim),), make, (13, 9))
        for side in ("left", "right"):
            for count, rank_ in ((4, 2), (4, 5)):  # one head; two side by side
                results["heads", dim, side, rank_] = matrices(
                    mesh, (Shard(dim),), heads(side, count, rank_), masked=True
                )
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results["mixed precision"] = policy(mesh, mp_policy=mixed)
    results["offload"] = policy(mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return spawn(two, 2, str(tmp_path_factory.mktemp("kinds")))


def check(found, dim):
    for name, got in found.items():
        if isinstance(got, str):
            assert dim > 0, got
            assert name in ("dct", "galore_plus"), got
        else:
            assert got[0] < 1e-9, name
            assert got[1], f"{name}: ranks count otherwise"


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_stacks_of_experts(dim, results):
    """Cut along the experts, whose refreshes all ranks then count, or within each of them."""
    check(results["stacks", dim], dim)
    assert len(results["stacks", dim]) == len(USUAL)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_stacks_in_few_bits_are_rounded_as_in_one_process(kind, results):
    assert results[kind] == {"galore_adamw": (0.0, True)}


def test_stacks_are_saved_and_sharded_along_another_dimension(results):
    ours, again, same = results["resharded"]
    assert ours < 1e-12
    assert again < 1e-12
    assert same


def test_both_sides_and_heads(results):
    """Bases of both sides; the subspace of one head or of two, of which some have no gradient at first."""
    found = {key: got for key, got in results.items() if key[0] in ("heads", *BOTH)}
    assert len(found) == 12
    assert max(found.values()) < 1e-9, found


@pytest.mark.parametrize("name", ["mixed precision", "offload"])
def test_policies(name, results):
    difference, dtypes = results[name]
    assert difference < 1e-6
    assert dtypes == {"torch.float32"}


def three(rank, world):
    flat, results = init_device_mesh("cpu", (world,)), {}
    names = [case.name for case in CASES if case.make.ranked]
    for dim in (0, 1, 2):
        results[dim] = stacks(flat, dim, names)
    return results


@pytest.mark.slow
def test_stacks_of_all_methods_on_three_processes():
    """Of which two have nothing of a stack of one expert."""
    for dim, found in spawn(three, 3).items():
        check(found, dim)
