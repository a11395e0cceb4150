"""DeepSpeed ZeRO: every stage trains like one process, without a whole gradient travelling, or says why it cannot.

DeepSpeed runs here on the CPU, in two processes that work through everything, because to start them takes longer.
"""

from __future__ import annotations

import functools
import os
import re
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lowrank_optim import estimate_memory
from lowrank_optim.ops import linalg
from tests.cases import CASES, every_case, gradients
from tests.distributed.test_fsdp2 import Counted
from tests.support import processes

pytestmark = pytest.mark.slow  # its processes take long

pytest.importorskip("deepspeed")

STEPS = 15  # refreshes before steps 0, 7 and 14, for most methods
# name, shape, rank: tall, wide, square, of lengths that no number of ranks divides; in full space; few rows
WEIGHTS = [
    ("tall", (24, 10), 4), ("wide", (9, 22), 3), ("square", (12, 12), 5), ("uneven", (31, 6), 2), ("low", (7, 40), 3),
    ("few", (3, 40), 2), ("stack", (3, 5, 16), 2), ("table", (11, 8), None), ("bias", (13,), None), ("one", (1,), None),
]  # fmt: skip


# -- processes ---------------------------------------------------------------------------------------------------------


def spawn(worker, world, *args):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return processes.spawn(worker, world, *args, meet=functools.partial(_meet, port))


def _meet(port, rank, world, folder):
    own = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in own.items()}, MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu")
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a collective is compiled first
    deepspeed.init_distributed(dist_backend="gloo")


# -- one optimizer, under DeepSpeed or not -----------------------------------------------------------------------------


class Weights(nn.Module):
    """Parameters whose gradients are what the test says."""

    def __init__(self, some=WEIGHTS):
        super().__init__()
        torch.manual_seed(0)
        for name, shape, _ in some:
            setattr(self, name, nn.Parameter(torch.randn(shape) / 4))

    def forward(self, grads):
        return sum((p * g).sum() for p, g in zip(self.parameters(), grads, strict=True))


def build(model, case, side="std", **options):
    return case.build(groups_of(model, case, side), **options)


def groups_of(model, case, side="std", weights=WEIGHTS):
    """Projected ones together, as is usual under ZeRO, and the others."""
    ranks = sorted({str(rank) for _, _, rank in weights})
    groups = []
    for rank in ranks:
        some = [(name, getattr(model, name)) for name, _, own in weights if str(own) == rank]
        group = {"params": some, "rank": None if rank == "None" else int(rank), "as_matrix": "batch"}
        groups.append({**group, "proj_type": side} if case.has("proj_type", side) else group)
    return groups


def whole_gradients(dtype):
    torch.manual_seed(1)
    some = [gradients(shape, STEPS, dtype) for _, shape, _ in WEIGHTS]
    return [[one[step] for one in some] for step in range(STEPS)]


def alone(case, grads, **options):
    """The weights after training in this process."""
    model = Weights()
    optimizer = build(model, case, **options)
    for step in grads:
        for p, g in zip(model.parameters(), step, strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def initialized(model, optimizer, stage, dtype=torch.float32, zero=None, **config):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0, **(zero or {}),
        },
        **config,
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine, grads):
    for step in grads:
        engine.backward(engine(step))
        engine.step()


def weights(engine, stage):
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        return [p.detach().clone() for p in engine.module.parameters()]


def under_zero(case, stage, grads, dtype=torch.float32, zero=None, config=None, **options):
    model = Weights()
    engine = initialized(model, build(model, case, **options), stage, dtype, zero, **(config or {}))
    train(engine, grads)
    return weights(engine, stage)


def apart(some, others):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(some, others, strict=True))


# -- what two processes do ---------------------------------------------------------------------------------------------

STAGES = (0, 1, 2, 3)
ACCUMULATED_IN_FLOAT32 = {"data_types": {"grad_accum_dtype": "fp32"}}  # stage 1 in bfloat16 is another class then
CLIPPED = 0.3


def of(name):
    return next(case for case in CASES if case.name == name)


def two(rank, world, folder):
    return {check.__name__: check(folder) for check in (stages, narrow, ways, resumed, traffic, refused)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return spawn(two, 2, str(tmp_path_factory.mktemp("zero")))


def stages(folder):
    """Differences from one process."""
    case, grads = of("galore_adamw"), whole_gradients(torch.float32)
    one = alone(case, grads, moments="rotate")
    return {stage: apart(one, under_zero(case, stage, grads, moments="rotate")) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_equals_one_process(stage, results):
    assert results["stages"][stage] < 1e-6


def narrow(folder):
    """Weights in bfloat16, whose master copies are in float32."""
    case, grads = of("galore_adamw"), whole_gradients(torch.bfloat16)
    found = {stage: under_zero(case, stage, grads, torch.bfloat16) for stage in STAGES}
    found["accumulated in float32"] = under_zero(case, 1, grads, torch.bfloat16, config=ACCUMULATED_IN_FLOAT32)
    return found


@pytest.mark.parametrize("stage", [1, 2, 3, "accumulated in float32"])
def test_stages_in_bfloat16_are_equal_bit_for_bit(stage, results):
    assert apart(results["narrow"][0], results["narrow"][stage]) == 0


def ways(folder):
    """Differences from one process of other ways to run a stage."""
    case, grads = of("galore_adafactor"), whole_gradients(torch.float32)
    one, found = alone(case, grads), {}
    cpu = {"offload_optimizer": {"device": "cpu"}}
    for stage in (1, 3):
        found["offload", stage] = apart(one, under_zero(case, stage, grads, zero=cpu))
    found["sub-groups"] = apart(one, under_zero(case, 3, grads, zero={"sub_group_size": 300}))
    found["born sharded"] = born_sharded(case)
    found["clipped"] = clipped_and_accumulated()
    return found


def born_sharded(case):
    """Under `zero.Init` parameters have no elements when the optimizer is made. The difference from stage 3 without."""
    import deepspeed

    grads = whole_gradients(torch.bfloat16)
    with deepspeed.zero.Init(dtype=torch.bfloat16):
        model = Weights()
    optimizer = build(model, case)
    assert not optimizer.state, "nothing of the size of what is not here"
    engine = initialized(model, optimizer, 3, torch.bfloat16)
    train(engine, grads)
    return apart(under_zero(case, 3, grads, torch.bfloat16), weights(engine, 3))


def clipped_and_accumulated():
    case, grads = of("galore_adamw"), whole_gradients(torch.float32)
    pairs = list(zip(grads[::2], grads[1::2], strict=False))
    means = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in pairs]
    norms = [torch.stack([g.norm() for g in step]).norm() for step in means]
    shortened = [[g * min(1.0, CLIPPED / (norm + 1e-6)) for g in step] for step, norm in zip(means, norms, strict=True)]
    assert all(norm > CLIPPED for norm in norms)
    config = {"gradient_clipping": CLIPPED, "gradient_accumulation_steps": 2}
    micro = [step for pair in pairs for step in pair]
    return apart(alone(case, shortened), under_zero(case, 2, micro, config=config))


@pytest.mark.parametrize("way", [("offload", 1), ("offload", 3), "sub-groups", "born sharded", "clipped"], ids=str)
def test_a_way_to_run_a_stage_equals_one_process(way, results):
    assert results["ways"][way] < 1e-6


# -- checkpoints and the report ----------------------------------------------------------------------------------------


def resumed(folder):
    """Trains, saves in the middle, and goes on; then a second engine goes on from what was saved."""
    case, found = of("fira"), {}
    for stage, dtype in ((0, torch.bfloat16), (1, torch.float32), (2, torch.bfloat16), (3, torch.bfloat16)):
        grads, path, end = whole_gradients(dtype), f"{folder}/{stage}", []
        for again in (False, True):
            model = Weights()
            engine = initialized(model, build(model, case), stage, dtype)
            if again:
                engine.load_checkpoint(path)
            else:
                train(engine, grads[:8])
                engine.save_checkpoint(path)
            train(engine, grads[8:])
            end.append(weights(engine, stage))
        found[stage] = apart(*end)
        table = engine.optimizer.optimizer.report()
        found[stage, "rows"], found[stage, "text"] = [None] * dist.get_world_size(), str(table)
        dist.all_gather_object(found[stage, "rows"], [row.name for row in table])
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_the_checkpoints_of_deepspeed_go_on_exactly(stage, results):
    assert results["resumed"][stage] == 0


def test_the_reports_have_what_is_here(results):
    found, names = results["resumed"], {name for name, *_ in WEIGHTS}
    for stage in STAGES:
        rows = [{name.split(".")[0] for name in here} for here in found[stage, "rows"]]
        assert set.union(*rows) == names
    assert all(set(here) < names for here in found[1, "rows"]), "and nothing that is on the other rank alone"
    assert "120 of 240 elements" in found[3, "text"]


# -- traffic -----------------------------------------------------------------------------------------------------------

SPARSE = {"update_proj_gap": 100, "stagger": False, "basis": "rsvd"}


def traffic(folder):
    """Of every method: what it holds and sends in a step without a refresh, and in a later one with all of them."""
    looks, linalg._looks = linalg._looks, lambda x: False  # refreshes as on accelerators, of which estimates speak
    found = {}
    for case in CASES:
        for stage in STAGES[1:]:
            try:
                found[case.name, stage] = held_and_sent(case, stage)
            except NotImplementedError as error:
                found[case.name, stage] = str(error)
    linalg._looks = looks
    return found


def held_and_sent(case, stage):
    model = Weights()
    optimizer = build(model, case, **SPARSE)
    engine, sent, of_meters = initialized(model, optimizer, stage), [], []
    step = optimizer.step

    def counted_step(*args):
        with Counted() as counted:
            step(*args)
        sent[-1] += counted.bytes

    optimizer.step = counted_step
    for grads in whole_gradients(torch.float32)[:3]:
        if len(sent) == 2:
            for state in optimizer.table.all_states():
                if "refreshed_at" in state:
                    state["refreshed_at"].fill_(-1)
        sent.append(0)
        train(engine, [grads])
        layouts = [optimizer.table.layouts[p] for p, _ in optimizer.table.members()]
        of_meters.append([one.meter.between + one.meter.refreshing for one in layouts if one.sharded])
    norms = 16 * len(of_meters[0])
    for now, before, all_of_it in zip(of_meters[1:], of_meters, sent[1:], strict=False):
        assert all_of_it == sum(now) - sum(before) + norms, "what the report says is what was sent"
    held = [None] * dist.get_world_size()
    dist.all_gather_object(held, sum(row.state_bytes for row in optimizer.report()))
    return max(held), sent[1] - norms, sent[2] - sent[1]


@every_case
@pytest.mark.parametrize("stage", STAGES[1:])
def test_flat_tensors_hold_and_send_what_was_estimated(case, stage, results):
    """Or are refused for the same reason."""
    got = results["traffic"][case.name, stage]
    one = estimated(case.name, stage, 2, got if isinstance(got, str) else "")
    assert one is None or (one.optimizer, one.sent_per_step, one.sent_per_refresh) == got


def estimated(name, stage, world, refused):
    """None if it is refused, which must be as `refused` says."""
    case = of(name)
    with torch.device("meta"):
        groups = groups_of(Weights(), case)
    options = {"world_size": world, "strategy": f"zero{stage}", **case.kwargs, **case.fitting(SPARSE)}
    if not refused:
        return estimate_memory(groups, case.make, **options)
    with pytest.raises(NotImplementedError, match=re.escape(refused)):
        estimate_memory(groups, case.make, **options)


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(folder):
    """Its map of where everything is does not follow the order that it then takes."""
    try:
        under_zero(of("galore_adamw"), 2, whole_gradients(torch.float32)[:1], zero={"round_robin_gradients": True})
    except RuntimeError as error:
        return str(error)


def test_round_robin_gradients_are_refused(results):
    assert "round_robin_gradients to false" in results["refused"]


# -- every method, with more ranks than in matrix.py ------------------------------------------------------------------


def three(rank, world):
    """Of every method: the difference of the stages that cut in two ways from one process."""
    results, grads = {}, whole_gradients(torch.float32)
    for case in CASES:
        expected = alone(case, grads)
        for stage in (1, 3):
            try:
                results[case.name, stage] = apart(expected, under_zero(case, stage, grads))
            except NotImplementedError as error:
                results[case.name, stage] = str(error)
    return results


@pytest.mark.slow
def test_every_method_on_three_ranks():
    for (name, stage), got in spawn(three, 3).items():
        if isinstance(got, str):
            estimated(name, stage, 3, got)
        else:
            assert got < 1e-6, (name, stage)
