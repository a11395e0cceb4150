"""estimate_memory for several processes: what it says is what they hold and send."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import lowrank_optim
from lowrank_optim import ddp_project, estimate_memory, param_groups, state_bytes
from lowrank_optim.memory import planned
from lowrank_optim.ops import linalg
from tests.cases import CASES, Net, every_case
from tests.support.collectives import Counted
from tests.support.processes import message, spawn
from tests.weight_cases import net

SHAPES = {"tall": (24, 10), "wide": (9, 22), "square": (12, 12), "uneven": (31, 16), "bias": (13,), "stack": (5, 6, 4)}
SIDES, DTYPES = ("left", "right"), (torch.float32, torch.bfloat16)
OTHERS = {  # that are in no case
    "both sides": (lowrank_optim.GaLoreAdamW, {"rank": 3, "proj_type": "full", "stagger": False}),
    "heads": (
        lowrank_optim.GaLorePlusAdamW,
        {"rank": 3, "density": 0.0, "heads": 2, "proj_type": "left", "stagger": False},
    ),
}
GALORE = next(case for case in CASES if case.name == "galore_adamw")


def options_of(case, side):
    wanted = {"rank": 3, "proj_type": side, "update_proj_gap": 100, "stagger": False, "basis": "rsvd"}
    return {**case.kwargs, **case.fitting(wanted)}


def refit(optimizer):
    """Makes all bases due that there are."""
    for state in optimizer.state.values():
        if "refreshed_at" in state:
            state["refreshed_at"].fill_(-1)


def deltas(meters):
    """Of one more step each time it is called: (between refreshes, in refreshes), of all parameters."""
    before = [0.0, 0.0]

    def call():
        now = [sum(meter.between for meter in meters), sum(meter.refreshing for meter in meters)]
        change = [a - b for a, b in zip(now, before, strict=True)]
        before[:] = now
        return change

    return call


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


def measured(make, mesh, dtype, options):
    """(state bytes here, sent per step, sent by a later refresh), or what was refused."""
    torch.manual_seed(0)
    params = [(name, nn.Parameter(distribute_tensor(torch.randn(shape).to(dtype), mesh, [Shard(0)])))
              for name, shape in SHAPES.items()]  # fmt: skip
    try:
        optimizer = make(params, **options, bf16_update="kahan")
    except NotImplementedError as error:
        return str(error)
    last = deltas([layout.meter for layout in optimizer.table.layouts.values()])
    sent = []
    for due in (True, False, True):
        if due:
            refit(optimizer)
        for _, p in params:
            p.grad = distribute_tensor(torch.randn(p.shape).to(dtype), mesh, [Shard(0)])
        optimizer.step()
        sent.append(last())
    return sum(row.state_bytes for row in optimizer.report()), sent[1][0], sent[2][1]


def collectives(case, mesh, side):
    """How many one matrix takes, besides that of norms: in a step without a refresh, and more in a later one."""
    p = nn.Parameter(distribute_tensor(torch.randn(24, 10), mesh, [Shard(0)]))
    try:
        optimizer = case.make([("w", p)], **options_of(case, side))
    except NotImplementedError:
        return None
    found = []
    for due in (True, False, True):
        if due:
            refit(optimizer)
        p.grad = distribute_tensor(torch.randn(24, 10), mesh, [Shard(0)])
        with Counted() as counted:
            optimizer.step()
        found.append(len(counted.sizes))
    return found[1] - 1, found[2] - found[1]


# -- DDP ---------------------------------------------------------------------------------------------------------------


def hooked():
    """The same of a model under DistributedDataParallel with our hook."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Net(), gradient_as_bucket_view=True)
    optimizer = GALORE.make(param_groups(model, min_dim=4, verbose=False), **options_of(GALORE, "std"))
    handle = ddp_project(model, optimizer)
    last, sent = deltas(handle.meters.values()), []
    for due in (True, False, True):
        if due:
            refit(optimizer)
        tokens = torch.randint(0, 11, (4, 9))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        sent.append(last())
    return state_bytes(optimizer), sent[1][0], sent[2][0] + sent[2][1] - sent[1][0]


def worker(rank, world):
    mesh, found = init_device_mesh("cpu", (world,)), {}
    found["cpu"] = measured(GALORE.make, mesh, torch.float32, options_of(GALORE, "left"))
    linalg._looks = lambda x: False  # from here on as on an accelerator
    for case in CASES:
        for side in SIDES:
            found["collectives", case.name, side] = collectives(case, mesh, side)
            for dtype in DTYPES:
                found[case.name, side, dtype] = measured(case.make, mesh, dtype, options_of(case, side))
    for name, (make, options) in OTHERS.items():
        for dtype in DTYPES:
            found[name, dtype] = measured(make, mesh, dtype, options)
    found["hook"] = hooked()
    shard = nn.Parameter(distribute_tensor(torch.randn(6, 4), mesh, [Shard(0)]))
    sharing = {"rank": 2, "world_size": world, "strategy": "fsdp2"}
    found["twice"] = message(ValueError, estimate_memory, [{"params": [("shard", shard)]}], GALORE.make, **sharing)
    return found


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request):
    return {"world": request.param, **spawn(worker, request.param)}


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("side", SIDES)
def test_shards_hold_and_send_what_was_estimated(case, side, found):
    """Or are refused for the same reason."""
    for dtype in DTYPES:
        options = {**options_of(case, side), "bf16_update": "kahan", "dtype": dtype}
        sharing = {"world_size": found["world"], "strategy": "fsdp2"}
        got = found[case.name, side, dtype]
        if isinstance(got, str):
            with pytest.raises(NotImplementedError, match=re.escape(got)):
                estimate_memory(SHAPES, case.make, **sharing, **options)
        else:
            one = estimate_memory(SHAPES, case.make, **sharing, **options)
            assert (one.optimizer, one.sent_per_step, one.sent_per_refresh) == got
            lines = sum(torch.empty(shape)[: -(-shape[0] // found["world"])].numel() for shape in SHAPES.values())
            assert one.weights == one.gradients == lines * dtype.itemsize


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("side", SIDES)
def test_one_matrix_takes_as_many_collectives_as_were_planned(case, side, found):
    got = found["collectives", case.name, side]
    if got is not None:
        empty = nn.Parameter(torch.empty(24, 10, device="meta"))
        optimizer = case.make([("w", empty)], **options_of(case, side))
        planned.lay_out(optimizer, found["world"])
        one = planned.traffic(optimizer)
        assert (one.messages, one.refresh_messages) == got


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_so_do_other_options(name, found):
    make, options = OTHERS[name]
    for dtype in DTYPES:
        sharing = {"world_size": found["world"], "strategy": "fsdp2", "dtype": dtype, "bf16_update": "kahan"}
        one = estimate_memory(SHAPES, make, **sharing, **options)
        assert (one.optimizer, one.sent_per_step, one.sent_per_refresh) == found[name, dtype]


@pytest.mark.slow
def test_refreshes_on_cpu_send_less(found):
    held, per_step, per_refresh = found["cpu"]
    sharing = {"world_size": found["world"], "strategy": "fsdp2"}
    one = estimate_memory(SHAPES, GALORE.make, **sharing, **options_of(GALORE, "left"), bf16_update="kahan")
    assert (one.optimizer, one.sent_per_step) == (held, per_step)
    assert 0 < per_refresh < one.sent_per_refresh


@pytest.mark.slow
def test_a_model_that_is_sharded_says_so_itself(found):
    """Without a strategy; with one it would be shared twice."""
    assert "is a DTensor" in found["twice"]


@pytest.mark.slow
def test_the_hook_sends_what_was_estimated(found):
    with torch.device("meta"):
        groups = param_groups(Net(), min_dim=4, verbose=False)
    options = {"world_size": found["world"], **options_of(GALORE, "std")}
    one = estimate_memory(groups, GALORE.make, strategy="ddp_project", **options)
    assert (one.optimizer, one.sent_per_step, one.sent_per_refresh) == found["hook"]
    plain = estimate_memory(groups, GALORE.make, strategy="ddp", **options)
    assert plain.optimizer == one.optimizer
    assert plain.sent_per_step == one.sent_per_step + one.sent_per_refresh == one.gradients


# -- what is measured in test_zero.py, and what is not -----------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_deepspeed_shares_everything_but_border_rows(strategy):
    """Matrices of 30 rows over three ranks: a border row on each side of a cut."""
    shapes, options = {"a": (30, 8), "b": (30, 8)}, {"rank": 2, "proj_type": "right"}
    one = estimate_memory(shapes, lowrank_optim.GaLoreAdamW, world_size=3, strategy=strategy, **options)
    elements = 2 * 30 * 8
    assert one.weights == 4 * elements // (3 if strategy == "zero3" else 1)
    assert one.gradients == 4 * elements // (1 if strategy == "zero1" else 3)
    assert one.masters == 4 * elements // 3
    rows = 20 if strategy != "zero3" else 10 + 10  # stages 1 and 2: rank 1 has 10 rows of each; all have 20 in all
    counters = 2 * (4 + 8 + 8 + 8)
    assert one.states == 2 * 4 * 2 * rows + counters
    assert one.bases == 2 * 4 * 8 * 2
    assert one.sent_per_step == 0, "cuts are between rows"
    assert one.total > one.weights + one.gradients + one.masters + one.optimizer
    cut = estimate_memory({"a": (31, 8)}, lowrank_optim.GaLoreAdamW, world_size=3, strategy=strategy, **options)
    assert cut.states == 2 * 4 * 2 * 11 + counters // 2, "83 of 248 elements, ten rows and some more"
    within = 2 if strategy == "zero3" else 1  # 83 and 166 elements; 84 and 168, of which the last is 21 rows
    assert cut.sent_per_step == within * 8 * 4


def test_configurations_that_deepspeed_refuses_are_refused():
    options = {"rank": 2, "world_size": 2, "proj_type": "left"}
    with pytest.raises(NotImplementedError, match="all of them together are as large as the gradient"):
        estimate_memory({"a": (30, 8)}, lowrank_optim.DCTAdamW, strategy="zero3", **options)
    whole = {"a": (30, 8), "b": (30, 8)}  # one on each rank
    assert estimate_memory(whole, lowrank_optim.DCTAdamW, strategy="zero1", **options).sent_per_step == 0


def test_one_rank_of_deepspeed_holds_what_one_process_does():
    shapes = {"a": (30, 8), "b": (8, 31), "bias": (7,)}
    for strategy in ("zero1", "zero2", "zero3"):
        for case in CASES:
            options = {**case.kwargs, **case.fitting({"rank": 2})}
            alone = estimate_memory(shapes, case.make, **options)
            one = estimate_memory(shapes, case.make, world_size=1, strategy=strategy, **options)
            assert (one.weights, one.gradients, one.optimizer) == (alone.weights, alone.gradients, alone.optimizer)


def test_optimizers_of_torch():
    shapes, adamw = {"a": (31, 8), "bias": (7,)}, torch.optim.AdamW
    whole = estimate_memory(shapes, adamw)
    assert estimate_memory(shapes, adamw, world_size=4, strategy="ddp").optimizer == whole.optimizer
    shards = estimate_memory(shapes, adamw, world_size=4, strategy="fsdp2")
    assert shards.optimizer == 2 * 4 * (8 * 8 + 2) + 2 * 4
    zero = estimate_memory(shapes, adamw, world_size=4, strategy="zero3")
    assert zero.optimizer == -(-whole.optimizer // 4)
    narrow = estimate_memory(shapes, adamw, world_size=4, strategy="zero1", dtype=torch.bfloat16)
    assert narrow.optimizer == zero.optimizer, "DeepSpeed's optimizers update float32 masters"
    assert narrow.weights == 2 * (31 * 8 + 7)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"world_size": 2}, ValueError, "world_size=2 needs a strategy: one of ddp, ddp_project"),
        ({"world_size": 0, "strategy": "ddp"}, ValueError, "world_size must be an int >= 1, got 0"),
        ({"strategy": "fsdp"}, ValueError, "strategy must be one of 'ddp'.*got 'fsdp'"),
        ({"strategy": "ddp", "step_in_backward": True}, NotImplementedError, "is for one process"),
    ],
)
def test_errors(options, kind, said):
    with pytest.raises(kind, match=said):
        estimate_memory({"a": (30, 8)}, lowrank_optim.GaLoreAdamW, rank=2, **options)


def test_methods_are_refused_where_they_cannot_work():
    with pytest.raises(ValueError, match="FiraAdamW needs whole gradients"):
        estimate_memory({"a": (30, 8)}, lowrank_optim.FiraAdamW, rank=2, world_size=2, strategy="ddp_project")
    with pytest.raises(NotImplementedError, match="ReLoRA with strategy='fsdp2' is not estimated"):
        estimate_memory(net(), lowrank_optim.ReLoRA, rank=2, world_size=2, strategy="fsdp2")
    one = estimate_memory(net(), lowrank_optim.ReLoRA, rank=2, world_size=2, strategy="ddp")
    assert one.sent_per_step == one.gradients


def test_the_cost_of_exact_singular_vectors_is_unknown():
    one = estimate_memory({"a": (30, 8)}, GALORE.make, rank=2, basis="svd", world_size=2, strategy="fsdp2")
    assert one.sent_per_refresh is None
    assert "sent per refresh" not in str(one)
