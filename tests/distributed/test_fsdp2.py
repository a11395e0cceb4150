"""FSDP2: sharded parameters train like whole ones, with thin collectives only, or are refused with a reason.

One set of processes works through everything that needs two, because starting it takes longer than the work.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import lowrank_optim
from lowrank_optim import ops
from lowrank_optim.distributed.lockstep import Peers
from lowrank_optim.distributed.pieces import Piece
from lowrank_optim.distributed.shards import Meter, Shards, Traffic
from tests.cases import CASES, case_of, every_case
from tests.support.collectives import Counted
from tests.support.processes import message, spawn
from tests.support.selection import FEW, selected
from tests.support.sharded import (
    NEVER,
    ROWS,
    difference,
    saved,
    small,
    whole,
    whole_from,
)
from tests.support.wrapped import apart, steps

# -- what two processes do ---------------------------------------------------------------------------------------------


def two(rank, world, folder, names):
    mesh, results = init_device_mesh("cpu", (world,)), {}
    for case in map(case_of, names):
        results[case.name, "float32"] = difference(case, torch.float32, mesh)
        narrow = {"state_dtype": "bfloat16"} if case.has("state_dtype") else {}
        results[case.name, "bf16"] = difference(case, torch.bfloat16, mesh, side="right", last=9, **narrow)
    results["rank 0 alone"] = refusals(mesh)
    for name, check in (("counts", counts), ("decisions", decisions), ("layouts", layouts)):
        results[name] = check(rank, mesh)
    results["model"] = sharded_model(folder)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("two")
    return {**spawn(two, 2, str(folder), [case.name for case in selected(request, "case")]), "folder": folder}


@pytest.mark.few(case=FEW)
@every_case
def test_two_processes_equal_one(case, results):
    """Also where lengths are odd; state that is not cut is the same on both, bit for bit."""
    got, expected = results[case.name, "float32"], {**ROWS, **NEVER}.get(case.name)
    if expected:
        assert expected in got, got
        assert "DistributedDataParallel" in got
    else:
        assert got < (3e-6 if case.name == "ldadam" else 1e-6)  # which refits its basis at each of the steps


@pytest.mark.few(case=FEW)
@every_case
def test_bfloat16_weights_and_state_are_rounded_as_in_one_process(case, results):
    got = results[case.name, "bf16"]
    assert NEVER[case.name] in got if case.name in NEVER else got == 0


# -- traffic -----------------------------------------------------------------------------------------------------------


def counts(rank, mesh):
    """Elements sent at each of three steps, with one matrix; a refresh is before steps 0 and 2."""
    found = {}
    for side in ("right", "left"):
        torch.manual_seed(0)
        p = nn.Parameter(distribute_tensor(torch.randn(256, 96), mesh, [Shard(0)]))
        options = {"rank": 4, "proj_type": side, "update_proj_gap": 2, "stagger": False}
        optimizer, found[side] = lowrank_optim.GaLoreAdamW([("w", p)], **options), []
        for _ in range(3):
            p.grad = distribute_tensor(torch.randn(256, 96), mesh, [Shard(0)])
            with Counted() as counted:
                optimizer.step()
            found[side].append(counted.sizes)
    return found


def test_only_thin_collectives(results):
    sizes = results["counts"]
    norms = 2  # of one parameter: a sum of squares, and on how many ranks there is a gradient
    assert sizes["right"][1] == [norms], "nothing between refreshes but the norms of all gradients together"
    assert sizes["left"][1] == [norms, 4 * 96], "R, where the projected side is cut"
    for side in ("right", "left"):
        for step in (0, 2):
            width = 4 + 16
            assert max(sizes[side][step]) <= width * 96, "the longest sketch"
            assert sum(sizes[side][step]) < 256 * 96 / 3, "far less than one gradient"


# -- decisions in common -----------------------------------------------------------------------------------------------


def decisions(rank, mesh):
    """What happens where a gradient is odd on one rank alone."""
    found = {}

    def make(**options):
        torch.manual_seed(0)
        ps = [nn.Parameter(distribute_tensor(torch.randn(8, 6), mesh, [Shard(0)])) for _ in range(2)]
        return ps, lowrank_optim.GaLoreAdamW([("a", ps[0]), ("b", ps[1])], rank=2, proj_type="right", **options)

    (a, b), optimizer = make()
    for p in (a, b):
        p.grad = distribute_tensor(torch.zeros(8, 6), mesh, [Shard(0)])
    optimizer.step()
    found["zero first step"] = [float(optimizer.state[p]["step"]) for p in (a, b)]
    a.grad.to_local().fill_(float(rank == 1))  # rank 0 alone sees zeros
    b.grad = distribute_tensor(torch.randn(8, 6), mesh, [Shard(0)])
    if rank == 1:
        b.grad.to_local()[0, 0] = torch.nan
    optimizer.step()
    found["refreshes"] = [int(optimizer.state[p]["refreshes"]) for p in (a, b)]
    found["skipped"] = [int(optimizer.state[p]["skipped"]) for p in (a, b)]
    found["finite"] = bool(a.full_tensor().isfinite().all() and b.full_tensor().isfinite().all())

    (a, b), optimizer = make()
    a.grad = distribute_tensor(torch.randn(8, 6), mesh, [Shard(0)])
    b.grad = a.grad.clone() if rank == 0 else None
    found["one rank has a gradient"] = message(RuntimeError, optimizer.step)
    b.grad = a.grad.full_tensor()
    found["plain gradient"] = message(RuntimeError, optimizer.step)

    p = nn.Parameter(distribute_tensor(torch.randn(8, 6), mesh, [Shard(0)]))
    other = lowrank_optim.GaLoreAdamW([("a" if rank == 0 else "b", p)], rank=2)
    p.grad = torch.ones_like(p)
    found["other names"] = message(RuntimeError, other.step)
    return found


def test_ranks_decide_together(results):
    found = results["decisions"]
    assert found["zero first step"] == [0, 0]
    assert found["refreshes"] == [1, 0], "half a gradient of zeros has a basis all the same"
    assert found["skipped"] == [0, 1], "not finite on one rank is not finite"
    assert found["finite"]
    assert "b is sharded and has a gradient on 1 of 2 ranks" in found["one rank has a gradient"]
    assert "has the placements (Shard(dim=0),), and its gradient none" in found["plain gradient"]
    assert "ranks have different parameters" in found["other names"]


# -- what is refused ---------------------------------------------------------------------------------------------------


def refusals(mesh):
    def shard(*shape):
        return nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)]))

    p, galore = shard(8, 6), lowrank_optim.GaLoreAdamW
    model = nn.Sequential(nn.Linear(6, 8))
    model[0].weight, model[0].bias = p, shard(8)
    stepping = galore([("w", p)], rank=2, proj_type="right")
    q = copy.copy(stepping)
    refused = {
        "blocks": lambda: galore([("w", shard(80, 70))], rank=2, proj_type="right", state_dtype="int8"),
        "subsets": lambda: lowrank_optim.SubsetNormAdamW([("w", shard(6, 8))], subset_size=2),
        "capturable": lambda: galore([("w", p)], rank=2, capturable=True),
        "compile": q.compile,
        "backward": lambda: lowrank_optim.step_in_backward(model, galore(model.named_parameters(), rank=2)),
        "accumulation": lambda: lowrank_optim.CompressedAccumulation([("w", p)], rank=2),
        "estimate": lambda: lowrank_optim.estimate_memory(model, torch.optim.AdamW),
        "memory": lambda: lowrank_optim.memory_report(model, stepping),
        "weight space": lambda: lowrank_optim.ReLoRA(model, rank=2),
    }
    return {name: message(NotImplementedError, call) for name, call in refused.items()}


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("blocks", 'quantized in blocks that depend on the number of ranks.*"bfloat16"'),
        ("subsets", "take subset_size=None"),
        ("capturable", "capturable=True does not work for w, which is sharded"),
        ("compile", r"compile\(\) does not work for w"),
        ("backward", "step_in_backward does not work for 0.weight"),
        ("accumulation", "compressed accumulation does not know"),
        ("estimate", "estimate_memory of AdamW does not know"),
        ("memory", "memory_report does not know"),
        ("weight space", "is a DTensor; convert the bare model first"),
    ],
)
def test_refusals(what, said, results):
    assert re.search(said, results["rank 0 alone"][what]), results["rank 0 alone"][what]


# -- other layouts -----------------------------------------------------------------------------------------------------


def layouts(rank, mesh):
    """Differences from one process; of a few methods that use every operation there is."""
    flat, found = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")), {}
    for case in CASES:
        if case.name not in ("galore_adafactor", "fira", "ldadam", "flora"):
            continue
        found["columns", case.name] = difference(case, torch.float64, mesh, (Shard(1),))
    case = next(case for case in CASES if case.name == "galore_adafactor")
    found["hybrid"] = difference(case, torch.float64, flat, (Replicate(), Shard(0)))
    found["replicated"] = difference(case, torch.float64, mesh, (Replicate(),))
    part = nn.Parameter(DTensor.from_local(torch.randn(8, 6), mesh, [Partial()]))
    found["partial"] = message(NotImplementedError, lowrank_optim.GaLoreAdamW, [("w", part)], rank=2)
    case = next(case for case in CASES if case.name == "galore_adamw")
    found["stacked"] = difference(case, torch.float64, mesh, foreach=True)
    found["exact"] = max(sine_of(rank, mesh, cut) for cut in (-2, -1))
    # rounding to bfloat16 where the local part is columns of the weight and of its moments
    found["noise"] = difference(case, torch.bfloat16, mesh, (Shard(1),), "left", state_dtype="bfloat16")
    return found


def sine_of(rank, mesh, cut):
    """Of the largest angle between the leading singular vectors found on shards, and by a factorisation."""
    torch.manual_seed(0)
    whole, size = torch.randn(60, 80, dtype=torch.float64), 30 if cut == -2 else 40
    piece = Piece(2 * size, rank * size, size, size, rank, 2, Peers(mesh.get_group(), "cpu"))
    algebra = Shards({cut: piece}, None, Traffic([Meter()]))
    basis = algebra.leading(whole.split(size, cut)[rank], 5)
    exact = ops.leading_left_vectors(whole, 5)
    mine = exact.split(size)[rank] if cut == -2 else exact
    return algebra._angle(mine, basis).item()


def test_singular_vectors_of_shards(results):
    """With random matrices, whose singular values are close to each other."""
    assert results["layouts"]["exact"] < 1e-6


def test_other_layouts(results):
    found = results["layouts"]
    assert "only Shard and Replicate are supported" in found["partial"]
    assert found["noise"] == 0
    assert max(found[key] for key in found if key not in ("partial", "noise", "exact")) < 1e-12, found


# -- a model under fully_shard, and its checkpoints --------------------------------------------------------------------


def sharded_model(folder):
    """Train, save in the middle, and continue; then resume a second one from the saved state."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    model, optimizer = small(mesh)
    steps(model, optimizer, 0, 6, rank, world)
    dcp.save(saved(model, optimizer), checkpoint_id=f"{folder}/dcp")
    full = saved(model, optimizer, full_state_dict=True, cpu_offload=True)
    if rank == 0:
        torch.save(full, f"{folder}/full.pt")
    steps(model, optimizer, 6, 11, rank, world)
    again = whole_from(folder, mesh, rank, world)
    from_one = [sharded_from_one(mesh, way) for way in ("plain", "full")]
    rows, text = optimizer.report(), str(optimizer.report())
    kept = sum(
        (x.to_local() if isinstance(x, DTensor) else x).nbytes
        for state in optimizer.state.values()
        for x in state.values()
    )
    options = {"rank": 3, "update_proj_gap": 4, "moments": "rotate", "state_dtype": "bfloat16"}
    groups = [{"params": list(model.named_parameters())}]
    estimate = lowrank_optim.estimate_memory(groups, lowrank_optim.GaLoreAdamW, **options)
    here = sum(p.to_local().nbytes for p in model.parameters())
    found = {"rows": list(rows), "text": text, "kept": kept, "estimate": estimate, "here": here}
    return {"end": whole(model), "again": again, "from one": from_one, **found}


def sharded_from_one(mesh, way):
    """Goes on with what one process has left: its `state_dict()`, or a full one by torch's helpers."""
    one, before = small()
    steps(one, before, 0, 6)
    model, optimizer = small(mesh)
    full = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, copy.deepcopy(one.state_dict()), options=full)
    if way == "plain":
        optimizer.load_state_dict(before.state_dict())
    else:
        state = copy.deepcopy(get_optimizer_state_dict(one, before, options=full))
        set_optimizer_state_dict(model, optimizer, state, options=full)
    steps(model, optimizer, 6, 11, dist.get_rank(), dist.get_world_size())
    return whole(model)


def test_a_model_under_fully_shard_equals_one_process(results):
    model, optimizer = small()
    steps(model, optimizer, 0, 11)
    assert apart(results["model"]["end"], model.state_dict()) < 1e-6


def test_the_report_describes_the_local_part_and_the_traffic(results):
    found = results["model"]
    rows = {row.name: row for row in found["rows"]}
    assert sum(row.state_bytes for row in found["rows"]) == found["kept"]
    assert found["estimate"].optimizer == found["kept"]
    assert found["estimate"].weights == found["here"]
    up, down, norm = rows["up.weight"], rows["down.weight"], rows["norm.weight"]
    assert (up.layout, up.side, up.sent_per_step) == ("11 of 21 rows", "right", 0)
    assert up.sent_per_refresh > 0
    assert (down.layout, down.side, down.sent_per_step) == ("6 of 12 rows", "left", 4 * 3 * 21)
    assert (norm.sent_per_step, norm.sent_per_refresh) == (0, None)
    assert up.full_bytes == 2 * 4 * 11 * 12
    assert "11 of 21 rows" in found["text"]
    assert f"norms of gradients: {16 * len(rows)} B sent per step" in found["text"]


def test_resume_is_exact_on_as_many_ranks(results):
    assert apart(results["model"]["end"], results["model"]["again"]) == 0


def test_state_of_one_process_resumes_sharded(results):
    for end in results["model"]["from one"]:
        assert apart(results["model"]["end"], end) < 1e-6


def test_a_sharded_checkpoint_resumes_in_one_process(results):
    assert apart(results["model"]["end"], whole_from(results["folder"], None, 0, 1)) < 1e-6


def test_a_full_state_dict_resumes_in_one_process(results):
    full = torch.load(results["folder"] / "full.pt")
    model, optimizer = small()
    set_model_state_dict(model, full["model"])
    set_optimizer_state_dict(model, optimizer, full["optimizer"])
    steps(model, optimizer, 6, 11)
    assert apart(results["model"]["end"], model.state_dict()) < 1e-6


# -- more ranks --------------------------------------------------------------------------------------------------------


def three(rank, world, folder):
    mesh = init_device_mesh("cpu", (world,))
    results = {"from two": whole_from(folder, mesh, rank, world)}
    for case in CASES:
        results[case.name] = difference(case, torch.float64, mesh, side="right")
    return results


@pytest.mark.slow
def test_three_processes(results):
    """What two have saved, and shards of which the last is smaller."""
    found = spawn(three, 3, str(results["folder"]))
    assert apart(results["model"]["end"], found.pop("from two")) < 1e-6
    for name, got in found.items():
        assert NEVER[name] in got if name in NEVER else got < 1e-9, name


def four(rank, world):
    mesh, results = init_device_mesh("cpu", (world,)), {}
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for case in CASES:
        results[case.name] = difference(case, torch.float64, mesh, side="std")
        if case.name in ("galore_adamw", "flora"):
            results[case.name, "hybrid"] = difference(case, torch.float64, hybrid, (Replicate(), Shard(0)))
    return results


@pytest.mark.slow
def test_four_processes_with_empty_shards():
    """A matrix of three rows; and two groups of two ranks that have the same shards."""
    for name, got in spawn(four, 4).items():
        expected = {**NEVER, **ROWS}.get(name)
        assert expected in got if expected else got < 1e-9, name
