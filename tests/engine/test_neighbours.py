"""Tools that are used with an optimizer: averages of weights, plateaus, tensor rates, hooks, the profiler."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from lowrank_optim import GaLoreAdamW, step_in_backward
from tests.cases import CASES, Net, every_case
from tests.support.selection import FEW

GALORE = next(case for case in CASES if case.name == "galore_adamw")
both_modes = pytest.mark.parametrize("attach", [False, True], ids=["normal", "in backward"])


def made(case=GALORE, attach=False, **options):
    torch.manual_seed(1)
    model = Net()
    optimizer = case.build(model.named_parameters(), **options)
    handle = step_in_backward(model, optimizer) if attach else None
    return model, optimizer, handle


def one_step(model, optimizer, number):
    tokens = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    return loss.item()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_same(one, other):
    assert torch.equal(weights(one), weights(other))


# -- averages of weights -----------------------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("decay", [None, 0.7])
def test_averaged_models(attach, decay):
    """They see the weights after each step, also where these move during backward, and leave training alone."""
    model, optimizer, _ = made(attach=attach)
    alone, other, _ = made()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay) if decay else None)
    mean = None
    for number in range(6):
        one_step(model, optimizer, number)
        averaged.update_parameters(model)
        one_step(alone, other, number)
        new = weights(alone).double()
        keep = decay if decay else number / (number + 1)
        mean = new if mean is None else keep * mean + (1 - keep) * new
    assert_same(model, alone)
    torch.testing.assert_close(weights(averaged.module).double(), mean, rtol=0, atol=1e-6)
    assert (mean - weights(model)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="is no parameter of this model"):
        step_in_backward(averaged, other)


@both_modes
def test_stochastic_weight_averaging(attach):
    """Its scheduler writes `swa_lr` into groups; running statistics are taken again at the end; then it resumes."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 12))
    optimizer = GALORE.build(model.named_parameters(), rank=3, lr=0.01)
    if attach:
        step_in_backward(model, optimizer)
    averaged, scheduler = (
        AveragedModel(model),
        SWALR(optimizer, swa_lr=0.002, anneal_epochs=3, anneal_strategy="linear"),
    )
    rates = []
    for number in range(5):
        x = torch.randn(30, 12, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] > rates[1] > rates[2] == rates[3] == pytest.approx(0.002)
    update_bn([torch.randn(30, 12)], averaged)
    assert averaged(torch.randn(30, 12)).isfinite().all()
    fresh = GALORE.build(copy.deepcopy(model).named_parameters(), rank=3, lr=0.01)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["swa_lr"] == 0.002


# -- learning rates ----------------------------------------------------------------------------------------------------


@both_modes
def test_reduce_on_plateau(attach):
    """The loop decides by a loss that does not improve; the rate falls, in the groups and in the step."""
    model, optimizer, _ = made(attach=attach, lr=0.01, weight_decay=0.1)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=1, cooldown=0)
    one_step(model, optimizer, 0)
    for loss in (1.0, 1.0, 1.0):
        scheduler.step(loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]
    before = weights(model)
    twin, other, _ = made(lr=0.01, weight_decay=0.1)
    one_step(twin, other, 0)
    assert torch.equal(before, weights(twin))
    one_step(twin, other, 1)
    one_step(model, optimizer, 1)
    ratio = float((weights(model) - before).norm() / (weights(twin) - before).norm())
    assert ratio == pytest.approx(0.1, rel=1e-3), "weights far above the last bit of their change"


@pytest.mark.thin
@pytest.mark.few(case=FEW)
@every_case
@both_modes
def test_rates_as_tensors(case, attach):
    """Also written in place, as code does that must not recompile."""
    runs = []
    for tensor in (False, True):
        rate = torch.tensor(0.02, dtype=torch.float64) if tensor else 0.02
        model, optimizer, _ = made(case, attach, lr=rate)
        for number in range(5):
            one_step(model, optimizer, number)
            if tensor:
                optimizer.param_groups[0]["lr"].mul_(0.5)
            else:
                optimizer.param_groups[0]["lr"] *= 0.5
        runs.append(model)
        restored = copy.deepcopy(optimizer)
        restored.load_state_dict(optimizer.state_dict())
        assert float(restored.param_groups[0]["lr"]) == 0.02 / 32
    assert_same(*runs)


def test_a_scheduler_on_a_tensor():
    runs = []
    for rate in (0.02, torch.tensor(0.02, dtype=torch.float64)):
        model, optimizer, _ = made(lr=rate)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for number in range(5):
            one_step(model, optimizer, number)
            scheduler.step()
        assert isinstance(optimizer.param_groups[0]["lr"], type(rate))
        assert float(optimizer.param_groups[0]["lr"]) == 0.02 / 32
        runs.append(model)
    assert_same(*runs)


# -- ascending ---------------------------------------------------------------------------------------------------------


@pytest.mark.thin
@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize("k", [1, 3])
def test_maximize_during_backward(case, k):
    """Ascending on -f is descending on f; weight decay still pulls to zero."""
    runs = []
    for maximize in (False, True):
        torch.manual_seed(1)
        model = Net().double()
        optimizer = case.build(model.named_parameters(), maximize=maximize, update_proj_gap=4)
        step_in_backward(model, optimizer, k)
        for step in range(6):
            for micro in range(k):
                tokens = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(10 * step + micro))
                loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
                (-loss if maximize else loss).backward()
            optimizer.step()
        runs.append(weights(model))
    torch.testing.assert_close(*runs, rtol=0, atol=1e-10)


# -- sparse gradients --------------------------------------------------------------------------------------------------


@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize("k", [None, 1, 3])
def test_sparse_gradients_are_refused(case, k):
    """With the way out, before anything has moved, and the optimizer is usable afterwards."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(16, 12, sparse=True), nn.Linear(12, 16))
    optimizer = case.build(model.named_parameters(), **({"rank": 3} if case.make.ranked else {}))
    if k is not None:
        step_in_backward(model, optimizer, k)

    def loop():
        model[0](torch.tensor([1, 5])).square().sum().backward()
        optimizer.step()

    before = weights(model)
    with pytest.raises(RuntimeError, match=r"the gradient of \S+ is sparse .*sparse=False.*SparseAdam"):
        loop()
    assert torch.equal(weights(model), before)
    assert not any(int(state["step"]) for state in optimizer.state.values())
    model[0].weight.grad = None
    model[0].sparse = False
    loop()
    assert not torch.equal(weights(model), before)


# -- hooks and the profiler --------------------------------------------------------------------------------------------


@both_modes
def test_hooks_of_one_and_of_all_optimizers(attach):
    model, optimizer, _ = made(attach=attach)
    seen = []
    handles = [
        register_optimizer_step_post_hook(lambda o, *_: seen.append(("all", o is optimizer))),
        register_optimizer_step_pre_hook(lambda o, *_: seen.append(("before", o is optimizer))),
        optimizer.register_step_post_hook(lambda o, *_: seen.append(("one", weights(model)))),
        optimizer.register_state_dict_post_hook(lambda o, state: state.update(note=1)),
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append(("loaded", True))),
    ]
    try:
        one_step(model, optimizer, 0)
    finally:
        for handle in handles[:2]:
            handle.remove()
    assert [name for name, _ in seen] == ["before", "one", "all"]
    assert torch.equal(seen[1][1], weights(model)), "after the whole step"
    state = optimizer.state_dict()
    assert state.pop("note") == 1
    optimizer.load_state_dict(state)
    assert seen[-1] == ("loaded", True)
    one_step(model, optimizer, 1)
    assert [name for name, _ in seen[4:]] == ["one"], "hooks outlive a load, and a removed one is gone"


@both_modes
def test_the_profiler_names_the_step(attach):
    model, optimizer, _ = made(attach=attach)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        one_step(model, optimizer, 0)
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#GaLoreAdamW.step", "Optimizer.zero_grad#GaLoreAdamW.zero_grad"} <= names


def test_next_to_another_optimizer():
    """The embedding to SparseAdam, the rest here: two optimizers share a model, one of them steps during backward."""
    runs = []
    for attach in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(16, 12, sparse=True), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))
        sparse = torch.optim.SparseAdam([model[0].weight], lr=0.01)
        optimizer = GaLoreAdamW(list(model[1:].named_parameters()), rank=3, lr=0.01, weight_decay=0.1)
        if attach:
            step_in_backward(model, optimizer)
        for number in range(5):
            tokens = torch.randint(0, 16, (20,), generator=torch.Generator().manual_seed(number))
            for one in (sparse, optimizer):
                one.zero_grad()
            model(tokens).square().mean().backward()
            for one in (sparse, optimizer):
                one.step()
        runs.append(model)
    assert_same(*runs)
