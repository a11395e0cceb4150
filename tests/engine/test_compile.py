"""The compiled update, and steps in two parts: the same numbers, few graphs, and nothing stale in them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import lowrank_optim
from lowrank_optim.engine import captured
from tests.cases import Net, capturable_cases, every_case, train
from tests.support.recorder import record
from tests.support.selection import FEW


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def pair(dtype=torch.float64):
    torch.manual_seed(0)
    models = [Net().to(dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    return models


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.few(case=("galore_adamw",))
@every_case
def test_a_compiled_update_is_the_update_in_one_graph_per_recipe_and_shape(case):
    """Over refreshes, and under a changing lr, there comes no graph after those of the first step."""
    models, counter = pair(), CompileCounter()
    plain, compiled = (case.build(model.named_parameters(), update_proj_gap=4) for model in models)
    compiled.compile(backend=counter)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in (plain, compiled)]
    for step in range(10):
        for model, optimizer, schedule in zip(models, (plain, compiled), schedules, strict=True):
            train(model, optimizer, 1, step)
            schedule.step()
        if step == 0:
            first = counter.frame_count
    kinds = {
        (compiled.table.recipe(plan, group), plan.matrix, plan.batch, plan.side)
        for p, group in compiled.table.members()
        for plan in [compiled.table.plans[p]]
    }
    assert first == counter.frame_count == len(kinds)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"foreach": True}, {"maximize": True}, {"state_dtype": "bfloat16"}])
def test_compiled_with_options(options):
    for make in (lowrank_optim.GaLoreAdamW, lowrank_optim.APOLLO):
        models = pair(torch.float32)
        plain, compiled = (make(model.named_parameters(), rank=3, **options) for model in models)
        compiled.compile(backend="eager")
        for model, optimizer in zip(models, (plain, compiled), strict=True):
            train(model, optimizer, 6)
        tolerance = 2e-2 if "state_dtype" in options else 1e-5  # another last bit, another stochastic rounding
        torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_code_that_inductor_generates(dtype):
    p, q = (nn.Parameter(torch.linspace(-1, 1, 40 * 24).view(40, 24).to(dtype)) for _ in range(2))
    grads = [torch.randn(40, 24).to(dtype) for _ in range(4)]
    for x, compiled in ((p, False), (q, True)):
        optimizer = lowrank_optim.FiraAdamW([("w", x)], rank=5, lr=torch.tensor(1e-2), bf16_update="none")
        if compiled:
            optimizer.compile()
        for grad in grads:
            x.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(p, q, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_a_compiled_step_around_everything_still_runs():
    models = pair(torch.float32)
    plain, around = (lowrank_optim.GaLoreAdamW(model.named_parameters(), rank=3) for model in models)
    train(models[0], plain, 3)
    step = torch.compile(around.step, backend="eager")
    for i in range(3):
        tokens = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(i))
        around.zero_grad()
        logits = models[1](tokens[:, :-1]).float()
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        step()
    assert torch.equal(weights(models[0]), weights(models[1]))


@pytest.mark.slow
def test_a_compiled_update_with_step_in_backward():
    models = pair()
    plain, compiled = (lowrank_optim.GaLoreAdamW(model.named_parameters(), rank=3) for model in models)
    compiled.compile(backend="eager")
    lowrank_optim.step_in_backward(models[1], compiled)
    for model, optimizer in zip(models, (plain, compiled), strict=True):
        train(model, optimizer, 5)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-12, atol=1e-12)


# -- capturable --------------------------------------------------------------------------------------------------------


@pytest.mark.thin
@pytest.mark.few(case=FEW)
@capturable_cases
@pytest.mark.parametrize("foreach", [False, True])
def test_a_capturable_step_is_the_step(case, foreach):
    models = pair()
    plain, capturable = (
        case.build(model.named_parameters(), foreach=foreach, capturable=model is models[1], update_proj_gap=4)
        for model in models
    )
    for model, optimizer in zip(models, (plain, capturable), strict=True):
        train(model, optimizer, 10)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-11, atol=1e-12)
    assert plain.stats()["refreshes"] == capturable.stats()["refreshes"]


def losses_with_static_gradients(model, step):
    """As a graph of forward and backward leaves them: always in the same memory."""
    tokens = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(step))
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()
    logits = model(tokens[:, :-1]).float()
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()


@pytest.mark.thin
@pytest.mark.few(case=FEW)
@capturable_cases
@pytest.mark.parametrize(
    ("dtype", "foreach", "options"),
    [
        (torch.float32, True, {}),
        (torch.bfloat16, False, {"state_dtype": "bfloat16"}),
        (torch.bfloat16, True, {"state_dtype": "int8"}),
    ],
    ids=["fp32", "bf16", "int8"],
)
def test_a_replayed_step_is_the_step(case, foreach, dtype, options, monkeypatch):
    """Across refreshes, with a changing lr, and with noise of its own in each step."""
    monkeypatch.setattr("lowrank_optim.recipe.plan._LEAST_QUANTIZED", 1)
    models = pair(dtype)
    live, replayed = (
        case.build(model.named_parameters(), capturable=True, foreach=foreach, update_proj_gap=4, **options)
        for model in models
    )
    graph = None
    for step in range(11):
        for model, optimizer in zip(models, (live, replayed), strict=True):
            losses_with_static_gradients(model, step)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * 0.8**step
            if optimizer is live or step < 2:
                optimizer.step()
            elif graph is None:
                assert optimizer._captured.prepare(members(optimizer))
                with monkeypatch.context() as patch:
                    patch.setattr(captured, "capturing", lambda: True)
                    graph = record(optimizer.step, host=counters(optimizer))
            else:
                assert optimizer.prepare()
                with torch.no_grad():
                    graph.replay()
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert all(int(state["step"]) == 11 for state in replayed.state.values())


def counters(optimizer):
    keys = ("step", "skipped", "refreshes", "refreshed_at", "refresh_gap", "overlaps")
    return [state[key] for state in optimizer.state.values() for key in keys if key in state]


def members(optimizer):
    return [optimizer.table.member(p, group, p.grad) for p, group in optimizer.table.members()]


def test_lr_on_the_device_is_read_there(monkeypatch):
    models = pair(torch.float32)
    plain, capturable = (
        lowrank_optim.GaLoreAdamW(model.named_parameters(), rank=3, lr=lr, capturable=isinstance(lr, torch.Tensor))
        for model, lr in zip(models, (0.01, torch.tensor(0.01)), strict=True)
    )
    for model, optimizer in zip(models, (plain, capturable), strict=True):
        train(model, optimizer, 3)
    for group in plain.param_groups:
        group["lr"] = 0.002
    for group in capturable.param_groups:
        group["lr"].fill_(0.002)
    for model, optimizer in zip(models, (plain, capturable), strict=True):
        train(model, optimizer, 3, 3)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-5, atol=1e-6)


def test_a_bad_gradient_stops_the_whole_captured_step():
    model = Net()
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), rank=3, capturable=True)
    train(model, optimizer, 2)
    before = weights(model)
    model.up.weight.grad[0, 0] = torch.inf
    with pytest.warns(UserWarning, match="up.weight"):
        optimizer.step()
    assert torch.equal(weights(model), before)
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == {2}
    assert optimizer.stats()["skipped_gradients"] == 1


def test_prepare_without_a_graph_or_with_other_parameters():
    model = Net()
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), rank=3, capturable=True)
    train(model, optimizer, 2)
    before = [{key: x.clone() for key, x in state.items()} for state in optimizer.state.values()]
    with pytest.raises(RuntimeError, match="nothing was updated"):
        optimizer.prepare()
    for state, old in zip(optimizer.state.values(), before, strict=True):
        assert all(torch.equal(state[key], old[key]) for key in old)


def test_error_feedback_cannot_be_captured():
    with pytest.raises(ValueError, match="error feedback"):
        lowrank_optim.LDAdamW(Net().named_parameters(), rank=3, capturable=True)
    optimizer = lowrank_optim.LDAdamW(Net().named_parameters(), rank=3)
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(ValueError, match="error feedback"):
        optimizer.step()


# -- torch.optim's other words -----------------------------------------------------------------------------------------


@pytest.mark.few(case=FEW)
@every_case
def test_keywords_of_torch_are_honoured_or_refused(case):
    model = Net()
    case.build(model.named_parameters(), differentiable=False, fused=None, capturable=False)
    with pytest.raises(ValueError, match="differentiable=True"):
        case.build(model.named_parameters(), differentiable=True)
    with pytest.raises(ValueError, match="fused must be None, got True"):
        case.build(model.named_parameters(), fused=True)
    with pytest.raises(ValueError, match="capturable must be True or False"):
        case.build(model.named_parameters(), capturable=1)
