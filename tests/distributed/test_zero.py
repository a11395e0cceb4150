"""DeepSpeed ZeRO: every stage trains like one process, without a whole gradient travelling, or says why it cannot.

DeepSpeed runs here on the CPU, in two processes that work through everything, because to start them takes longer.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist

from lowrank_optim import estimate_memory
from lowrank_optim.ops import linalg
from tests.cases import CASES, case_of, every_case
from tests.support.collectives import Counted
from tests.support.zero import (
    ACCUMULATED_IN_FLOAT32,
    STAGES,
    WEIGHTS,
    Weights,
    alone,
    apart,
    build,
    groups_of,
    initialized,
    spawn,
    train,
    under_zero,
    weights,
    whole_gradients,
)

pytestmark = pytest.mark.slow  # its processes take long

pytest.importorskip("deepspeed")


# -- what two processes do ---------------------------------------------------------------------------------------------

CLIPPED = 0.3


def two(rank, world, folder):
    return {check.__name__: check(folder) for check in (stages, narrow, ways, resumed, traffic, refused)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return spawn(two, 2, str(tmp_path_factory.mktemp("zero")))


def stages(folder):
    """Differences from one process."""
    case, grads = case_of("galore_adamw"), whole_gradients(torch.float32)
    one = alone(case, grads, moments="rotate")
    return {stage: apart(one, under_zero(case, stage, grads, moments="rotate")) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_equals_one_process(stage, results):
    assert results["stages"][stage] < 1e-6


def narrow(folder):
    """Weights in bfloat16, whose master copies are in float32."""
    case, grads = case_of("galore_adamw"), whole_gradients(torch.bfloat16)
    found = {stage: under_zero(case, stage, grads, torch.bfloat16) for stage in STAGES}
    found["accumulated in float32"] = under_zero(case, 1, grads, torch.bfloat16, config=ACCUMULATED_IN_FLOAT32)
    return found


@pytest.mark.parametrize("stage", [1, 2, 3, "accumulated in float32"])
def test_stages_in_bfloat16_are_equal_bit_for_bit(stage, results):
    assert apart(results["narrow"][0], results["narrow"][stage]) == 0


def ways(folder):
    """Differences from one process of other ways to run a stage."""
    case, grads = case_of("galore_adafactor"), whole_gradients(torch.float32)
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
    case, grads = case_of("galore_adamw"), whole_gradients(torch.float32)
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
    """Train, save in the middle, and continue; then resume a second engine from the saved state."""
    case, found = case_of("fira"), {}
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
def test_the_checkpoints_of_deepspeed_resume_exactly(stage, results):
    assert results["resumed"][stage] == 0


def test_reports_describe_the_local_part(results):
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
    case = case_of(name)
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
        under_zero(case_of("galore_adamw"), 2, whole_gradients(torch.float32)[:1], zero={"round_robin_gradients": True})
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
