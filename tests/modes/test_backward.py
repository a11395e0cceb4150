"""Promises of step_in_backward besides the matrix of test_training_loop.py, and its refusals."""

from __future__ import annotations

import copy
import math
import pickle
import socket
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lowrank_optim
from lowrank_optim import GaLoreAdamW, step_in_backward
from lowrank_optim.accumulate import CompressedAccumulation
from lowrank_optim.layers.quantized import quantize_weights
from tests.cases import CASES, Net, every_case
from tests.reference import galore
from tests.support.selection import FEW

GALORE = next(case for case in CASES if case.name == "galore_adamw")
FIRA = next(case for case in CASES if case.name == "fira")


def loss_of(model, number):
    tokens = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(number))
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def made(case=GALORE, dtype=torch.float32, **options):
    torch.manual_seed(1)
    model = Net().to(dtype)
    return model, case.build(model.named_parameters(), **{"update_proj_gap": 4, **options})


def train(model, optimizer, steps, first=0, k=1, loss=loss_of, zero=True):
    for step in range(first, first + steps):
        if zero:
            optimizer.zero_grad()
        for micro in range(k):
            (loss(model, 10 * step + micro) / k).backward()
        optimizer.step()


def twins(case=GALORE, k=1, options=None, **build):
    """The same model twice, the second one attached."""
    plain, mine = made(case, **build), made(case, **build)
    return plain, mine, step_in_backward(*mine, k, **(options or {}))


def differences(one, other):
    return [
        float((p.detach() - q.detach()).abs().max()) for p, q in zip(one.parameters(), other.parameters(), strict=True)
    ]


def assert_equal(one, other):
    """Weights and state of (model, optimizer), bit for bit."""
    for (name, p), q in zip(one[0].named_parameters(), other[0].parameters(), strict=True):
        assert torch.equal(p, q), name
        mine, yours = one[1].state[p], other[1].state[q]
        assert mine.keys() == yours.keys()
        assert all(torch.equal(mine[key], yours[key]) for key in mine), name


def no_gradients(model):
    return all(p.grad is None for p in model.parameters())


# -- the same numbers --------------------------------------------------------------------------------------------------


@every_case
def test_every_method_steps_to_the_bit(case):
    plain, mine, _ = twins(case)
    train(*plain, 9)
    for step in range(9):
        loss_of(mine[0], 10 * step).backward()
        assert no_gradients(mine[0]), "they are used and freed before backward returns"
        mine[1].step()
    assert_equal(mine, plain)


@pytest.mark.few(case=FEW)
@every_case
def test_every_method_accumulates(case):
    """In float64, where rounding is far from everything."""
    plain, mine, _ = twins(case, 3, dtype=torch.float64)
    train(*plain, 9, k=3)
    train(*mine, 9, k=3, zero=False)
    assert max(differences(mine[0], plain[0])) < 1e-9
    assert no_gradients(mine[0])


@pytest.mark.thin
@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize("k", [1, 3])
def test_stacked_matrices_are_updated_together(case, k, monkeypatch):
    results = []
    for limit in (None, 5000):  # all at optimizer.step(); or as soon as there is enough to stack, and the rest then
        if limit:
            monkeypatch.setattr("lowrank_optim.engine.limits.CHUNK_BYTES", limit)
        plain, mine, _ = twins(case, k, dtype=torch.float64, foreach=True)
        train(*plain, 6, k=k)
        train(*mine, 5, k=k, zero=False)
        for micro in range(k):
            (loss_of(mine[0], 50 + micro) / k).backward()
        results.append(sum(p.grad is not None for p in mine[0].parameters()))
        mine[1].step()
        assert no_gradients(mine[0])
        assert max(differences(mine[0], plain[0])) < 1e-9
    whole = [p for p in mine[0].parameters() if k == 1 or not mine[1].table.plans[p].projected]
    assert results[0] >= len(whole)
    assert 0 < results[1] < results[0]


@pytest.mark.thin
@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize("k", [1, 3])
def test_experts_without_tokens(case, k, monkeypatch):
    """Their gradient is zero: no basis of it, and no step of the others is lost. Also where the stack is cut."""
    finals = []
    for limit in (1 << 26, 2 * 8 * 12 * 18):
        monkeypatch.setattr("lowrank_optim.engine.limits.CHUNK_BYTES", limit)
        runs = []
        for attach in (False, True):
            torch.manual_seed(5)
            p, q = nn.Parameter(torch.randn(5, 12, 18).double()), nn.Parameter(torch.randn(6).double())
            model = nn.ParameterList([p, q])
            optimizer = case.build([("p", p), ("q", q)], **({"rank": 3} if case.make.ranked else {}))
            if attach:
                step_in_backward(model, optimizer, k)
            for step in range(9):
                for micro in range(k):
                    g = torch.randn(5, 12, 18, generator=torch.Generator().manual_seed(9 * step + micro)).double()
                    g[(step + 1) % 5 :] = 0
                    ((p * g).sum() + q.square().sum()).backward()
                optimizer.step()
                optimizer.zero_grad()
            runs.append((p.detach(), optimizer.state[p]))
        assert (runs[0][0] - runs[1][0]).abs().max() < 1e-9
        for key in ("refreshes", "refreshed_at"):
            if case.make.ranked:
                assert torch.equal(runs[0][1][key], runs[1][1][key])
        finals.append(runs[1][0])
    assert (finals[0] - finals[1]).abs().max() < 1e-9


def test_a_basis_from_the_first_micro_batch():
    """Against the loop of the reference: fitted to one gradient, used for the sum of three."""
    torch.manual_seed(7)
    w, k, steps = torch.randn(12, 20).double() / 4, 3, 9
    grads = [[torch.randn(12, 20).double() * 0.8 ** torch.arange(20) for _ in range(k)] for _ in range(steps)]
    sums = [sum(some) for some in grads]
    numbers = dict(lr=0.0037, betas=(0.83, 0.97), eps=3e-7, weight_decay=0.1, scale=0.7, moments="rotate")

    def fit_first(grad, rank, side, old):
        step = next(i for i, total in enumerate(sums) if total is grad)
        return galore.exact(grads[step][0], rank, side, old)

    runs = {}
    for fit in (fit_first, galore.exact):
        runs[fit] = galore.galore_adamw(w, sums, {0, 4, 8}, rank=3, side="left", fit=fit, **numbers)
    for basis_from, fit in (("micro-batch", fit_first), ("window", galore.exact)):
        p = nn.Parameter(w.clone())
        optimizer = GaLoreAdamW([p], rank=3, update_proj_gap=4, stagger=False, basis="svd", **numbers)
        step_in_backward(nn.ParameterList([p]), optimizer, k, basis_from=basis_from)
        for step, some in enumerate(grads):
            for micro, grad in enumerate(some):
                (p * grad).sum().backward()
                whole = basis_from == "window" and step % 4 == 0 and micro < k - 1
                assert (p.grad is not None) == whole
            optimizer.step()
        torch.testing.assert_close(p.detach(), runs[fit], rtol=0, atol=1e-10)
    assert (runs[fit_first] - runs[galore.exact]).abs().max() > 1e-3


def test_a_first_micro_batch_that_gives_no_basis():
    """A zero gradient, or one that is not finite: the window accumulates whole, and is counted where it is bad."""
    for bad in (0.0, math.nan):
        p = nn.Parameter(torch.randn(12, 20))
        optimizer = GaLoreAdamW([p], rank=3)
        step_in_backward(nn.ParameterList([p]), optimizer, 2, basis_from="micro-batch")
        before, second = p.detach().clone(), torch.randn(12, 20)
        (p * torch.full((12, 20), bad)).sum().backward()
        assert optimizer.state[p]["refreshes"] == 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (p * second).sum().backward()
        assert [str(one.message)[:30] for one in caught] == ["non-finite gradient in param 0"] * math.isnan(bad)
        optimizer.step()
        assert optimizer.state[p]["refreshes"] == optimizer.state[p]["step"] == (bad == 0.0)
        assert torch.equal(p, before) == math.isnan(bad)


def push_all(model, number):
    """Gradients that no autocast can change, for every parameter."""
    generator = torch.Generator().manual_seed(number)
    return sum((p * torch.randn(p.shape, generator=generator).to(p.dtype)).sum() for p in model.parameters())


@pytest.mark.thin
@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize("k", [None, 1, 2])
def test_an_enclosing_autocast_changes_nothing(case, k):
    """Around optimizer.step(), and around backward, where the work is done with step_in_backward."""
    runs = []
    for autocast in (False, True):
        model, optimizer = made(case)
        if k is not None:
            step_in_backward(model, optimizer, k, basis_from="micro-batch")
        for step in range(6):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                for micro in range(k or 1):
                    push_all(model, 9 * step + micro).backward()
                optimizer.step()
            optimizer.zero_grad()
        runs.append((model, optimizer))
    assert_equal(*runs)


# -- gradients and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [GALORE, FIRA], ids=lambda case: case.name)
def test_one_gradient_lives_at_a_time(case):
    model, optimizer = made(case)
    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda p: alive.append(([q is p for q in model.parameters() if q.grad is not None], p))
        )
    step_in_backward(model, optimizer)
    train(model, optimizer, 3, zero=False)
    assert len(alive) == 3 * len(list(model.parameters())), "a tied weight counts once"
    assert all(found == [True] for found, _ in alive)
    assert all(int(optimizer.state[p]["step"]) == 3 for p in model.parameters())


@pytest.mark.few(case=FEW)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", ["projected", "whole"])
def test_the_report_counts_what_is_alive(case, dtype, accumulate):
    model, optimizer = made(case, dtype, update_proj_gap=50)
    model.square.requires_grad_(False)
    handle = step_in_backward(model, optimizer, 3, accumulate=accumulate)
    train(model, optimizer, 1, k=3)  # after the first window, whose basis is due
    loss_of(model, 77).backward()
    rows = {row.name: row for row in handle.report()}
    for name, p in model.named_parameters():
        kept = handle._windows[p].sum
        alive = 0 if kept is None else kept.untyped_storage().nbytes()
        alive += 0 if p.grad is None else p.grad.untyped_storage().nbytes()
        assert rows[name].state_bytes == alive, name
        assert not p.requires_grad or (rows[name].method == "projected") == (kept is not None)
        assert rows[name].full_bytes == (p.nbytes if p.requires_grad else 0)
    assert rows["square.weight"].reason == "frozen"
    thin = case.name in ("galore_adamw", "galore_adafactor", "golore", "q_galore", "dct")
    assert (rows["up.weight"].method == "projected") == (thin and accumulate == "projected"), rows["up.weight"].reason
    table = str(handle.report())
    largest = max(p.nbytes for p in model.parameters() if p.requires_grad)
    assert f"{lowrank_optim.reports.report.human(largest)} live at once" in table
    assert "steps during backward, after 3 of them" in str(optimizer.report())


def test_the_report_without_accumulation():
    model, optimizer = made()
    rows = step_in_backward(model, optimizer).report()
    assert {row.method for row in rows} == {"freed at once"}
    assert sum(row.state_bytes for row in rows) == 0
    assert [row.full_bytes for row in rows] == [p.nbytes for p in model.parameters()]


def test_the_report_counts_gradients_that_wait_to_be_stacked(monkeypatch):
    """The most that is alive while backward runs, in addition to the bytes of the report."""
    monkeypatch.setattr("lowrank_optim.engine.limits.CHUNK_BYTES", 5000)
    model, optimizer = made(foreach=True)
    sizes = {p: p.nbytes for p in model.parameters()}
    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(size for p, size in sizes.items() if p.grad is not None))
        )
    handle = step_in_backward(model, optimizer)
    train(model, optimizer, 1, zero=False)
    bound = 5000 + max(sizes.values())
    assert max(sizes.values()) < max(alive) <= bound < sum(sizes.values())
    assert f"{lowrank_optim.reports.report.human(bound)} live at once in addition" in str(handle.report())
    monkeypatch.setattr("lowrank_optim.engine.limits.CHUNK_BYTES", 1 << 26)
    assert f"{lowrank_optim.reports.report.human(sum(sizes.values()))} live at once in addition" in str(handle.report())


def test_the_gradient_norm():
    plain, mine, handle = twins()
    assert handle.grad_norm is None
    for step in range(3):
        plain[1].zero_grad()
        loss_of(plain[0], step).backward()
        norm = nn.utils.get_total_norm([p.grad for p in plain[0].parameters()])
        plain[1].step()
        loss_of(mine[0], step).backward()
        mine[1].step()
        assert handle.grad_norm == pytest.approx(float(norm), rel=1e-5)


# -- which parameters have gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_frozen_and_later_trained(k):
    plain, mine = made(dtype=torch.float64), made(dtype=torch.float64)
    for model, _ in (plain, mine):
        model.square.requires_grad_(False)
    step_in_backward(*mine, k)
    for model, optimizer in (plain, mine):
        assert not model.square.weight.requires_grad, "the hook must leave it frozen"
        train(model, optimizer, 3, k=k)
        model.square.requires_grad_(True)
        model.up.requires_grad_(False)
        train(model, optimizer, 3, 3, k=k)
        assert int(optimizer.state[model.square.weight]["step"]) == 3
        assert int(optimizer.state[model.up.weight]["step"]) == 3
    assert max(differences(mine[0], plain[0])) < 1e-10


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.unused = (nn.Linear(12, 16) for _ in range(3))

    def forward(self, x, which):
        return sum(getattr(self, name)(x).square().mean() for name in which)


@pytest.mark.parametrize("case", [GALORE, FIRA], ids=lambda case: case.name)
def test_parameters_unused_in_a_micro_batch(case):
    runs = []
    for attach in (False, True):
        torch.manual_seed(2)
        model = Branches().double()
        before = model.unused.weight.detach().clone()
        optimizer = case.build(model.named_parameters(), rank=3, update_proj_gap=3)
        if attach:
            step_in_backward(model, optimizer, 3)
        for step in range(8):
            for micro, which in enumerate((["left", "right"], ["left"], ["left", "right"] if step % 3 == 0 else [])):
                if which:
                    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(10 * step + micro)).double()
                    model(x, which).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(model.unused.weight, before), "not even weight decay"
        assert int(optimizer.state[model.unused.weight]["step"]) == 0
        assert int(optimizer.state[model.right.weight]["step"]) == 8
        runs.append(model)
    assert max(differences(*runs)) < 1e-10


def test_tied_weights_step_once():
    """One update, after both uses have added to the gradient."""
    runs = []
    for attach in (False, True):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        model[2].weight = model[0].weight
        optimizer = GALORE.build(model.named_parameters(), rank=3)
        if attach:
            step_in_backward(model, optimizer)
        for step in range(5):
            optimizer.zero_grad()
            model(torch.randn(9, 16, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        assert int(optimizer.state[model[0].weight]["step"]) == 5
        runs.append((model, optimizer))
    assert_equal(*runs)


def test_gradients_set_by_hand():
    plain, mine, _ = twins()
    loss_of(plain[0], 0).backward()
    for p, q in zip(plain[0].parameters(), mine[0].parameters(), strict=True):
        q.grad = p.grad.clone()
    for _, optimizer in (plain, mine):
        optimizer.step()
    assert_equal(mine, plain)
    assert no_gradients(mine[0])


def test_a_gradient_that_comes_too_late_is_refused():
    """Nothing could use it, and the next backward would add to it."""
    model, optimizer = made()
    step_in_backward(model, optimizer)
    loss_of(model, 0).backward()
    model.up.weight.grad = torch.ones_like(model.up.weight)
    with pytest.raises(RuntimeError, match=r"up.weight got a gradient after backward had updated it.*zero_grad\(\)"):
        optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, 2, 1, zero=False)


# -- life of a handle --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
def test_remove_restores_the_normal_mode(k):
    plain, mine, handle = twins(k=k, dtype=torch.float64)
    for model, optimizer in (plain, mine):
        train(model, optimizer, 3, k=k)
    loss_of(mine[0], 0).backward()
    with pytest.raises(RuntimeError, match=r"remove\(\) in the middle of a step: call optimizer.step\(\) .*zero_grad"):
        handle.remove()
    assert mine[1].mode is handle
    for model, optimizer in (plain, mine):
        model.load_state_dict(made(dtype=torch.float64)[0].state_dict())  # k=1 has stepped already
        optimizer.load_state_dict(made(dtype=torch.float64)[1].state_dict())
    handle.remove()
    assert not any(p._post_accumulate_grad_hooks for p in mine[0].parameters())
    for model, optimizer in (plain, mine):
        train(model, optimizer, 5, k=k)
        assert all(p.grad is not None for p in model.parameters())
    assert_equal(mine, plain)
    again = step_in_backward(*mine)
    handle.remove()  # of an old handle: nothing
    train(*mine, 2, 5)
    train(*plain, 2, 5)
    assert_equal(mine, plain)
    again.remove()


def test_as_a_context():
    plain, mine = made(), made()
    train(*plain, 6)
    with step_in_backward(*mine):
        train(*mine, 3)
    train(*mine, 3, 3)
    assert_equal(mine, plain)


def test_a_context_that_fails():
    """The exception of the user comes out, hooks are gone, and nothing that was half accumulated stays."""
    model, optimizer = made()

    def fails():
        with step_in_backward(model, optimizer, 3):
            train(model, optimizer, 1, k=3)
            loss_of(model, 50).backward()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fails()
    assert optimizer.mode is None
    assert no_gradients(model)
    loss_of(model, 51).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_are_normal_optimizers(how):
    plain, mine, handle = twins()
    for one in (plain, mine):
        train(*one, 3)
    copied = how(mine)
    assert copied[1].mode is None
    train(*copied, 3, 3)
    assert all(p.grad is not None for p in copied[0].parameters())
    train(*plain, 3, 3)
    assert_equal(copied, plain)
    train(*mine, 3, 3)
    assert_equal(mine, plain)
    with pytest.raises(TypeError, match="is bound to its parameters by hooks"):
        how(handle)


def test_a_group_that_comes_later():
    runs = []
    for attach in (False, True):
        model, _ = made(dtype=torch.float64)
        late = {id(p) for p in model.square.parameters()}
        named = list(model.named_parameters())
        optimizer = GALORE.build([(name, p) for name, p in named if id(p) not in late], update_proj_gap=4)
        if attach:
            step_in_backward(model, optimizer, 2)
        train(model, optimizer, 2, k=2)
        optimizer.add_param_group({"params": [(name, p) for name, p in named if id(p) in late], "lr": 0.02})
        train(model, optimizer, 5, 2, k=2)
        assert not attach or no_gradients(model)
        assert int(optimizer.state[model.square.weight]["step"]) == 5
        runs.append(model)
    assert max(differences(*runs)) < 1e-10


@pytest.mark.parametrize("drop", ["zero_grad", "load_state_dict"])
def test_half_a_window_can_be_dropped(drop):
    """Whole and projected sums alike."""
    plain, mine, _ = twins(k=3, dtype=torch.float64)
    for one in (plain, mine):
        train(*one, 2, k=3)
    for number in (70, 71):
        loss_of(mine[0], number).backward()
    assert any(p.grad is not None for p in mine[0].parameters())
    mine[1].zero_grad() if drop == "zero_grad" else mine[1].load_state_dict(mine[1].state_dict())
    assert no_gradients(mine[0])
    for one in (plain, mine):
        train(*one, 4, 2, k=3, zero=one is plain)
    assert max(differences(mine[0], plain[0])) < 1e-10


def test_a_window_that_the_model_drops_is_noticed():
    """model.zero_grad() frees p.grad and cannot reach the rest, so the window after it has a pass too many."""
    model, optimizer = made()
    step_in_backward(model, optimizer, 2)
    train(model, optimizer, 1, k=2)
    loss_of(model, 20).backward()
    model.zero_grad()
    loss_of(model, 30).backward()
    with pytest.raises(RuntimeError, match=r"or optimizer.zero_grad\(\) \(not the model's\) to drop one"):
        loss_of(model, 31).backward()


def test_loading_while_attached():
    plain, mine, _ = twins(k=2, dtype=torch.float64)
    other = made(dtype=torch.float64, lr=0.05)
    train(*other, 5, 40)
    for model, optimizer in (plain, mine):
        train(model, optimizer, 2, k=2)
        model.load_state_dict(other[0].state_dict())
        optimizer.load_state_dict(copy.deepcopy(other[1].state_dict()))
        assert optimizer.param_groups[0]["lr"] == 0.05
        train(model, optimizer, 4, 2, k=2)
    assert no_gradients(mine[0])
    assert max(differences(mine[0], plain[0])) < 1e-9


def test_checkpoint_helpers_while_attached():
    """get_optimizer_state_dict makes a step on zero gradients where an optimizer has no state."""
    plain, mine, _ = twins()
    get_optimizer_state_dict(mine[0], mine[1])
    for one in (plain, mine):
        train(*one, 3)
    state = get_optimizer_state_dict(mine[0], mine[1])
    fresh = made()
    step_in_backward(*fresh)
    fresh[0].load_state_dict(mine[0].state_dict())
    set_optimizer_state_dict(*fresh, state)
    for one in (plain, mine, fresh):
        train(*one, 3, 3)
    assert_equal(mine, plain)
    assert_equal(fresh, plain)


def test_a_first_step_on_zero_gradients_set_by_hand_is_inert():
    model, optimizer = made()
    handle = step_in_backward(model, optimizer, clip="delayed", clip_norm=1.0)
    before = copy.deepcopy(optimizer.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(after["state"][key][name], value) for name, value in state.items())
    assert handle.grad_norm is None


def test_a_first_backward_of_zeros_is_a_step():
    """Unlike in the normal mode: the first parameter cannot wait for what the gradients of the others are."""
    model, optimizer = made(weight_decay=0.1)
    step_in_backward(model, optimizer)
    before = model.up.weight.detach().clone()
    (0 * loss_of(model, 0)).backward()
    optimizer.step()
    assert all(int(optimizer.state[p]["step"]) == 1 for p in model.parameters())
    assert int(optimizer.state[model.up.weight]["refreshes"]) == 0, "but no basis comes of it"
    assert torch.allclose(model.up.weight, before * (1 - 0.1 * optimizer.param_groups[0]["lr"]))


# -- loops -------------------------------------------------------------------------------------------------------------


def test_a_closure():
    plain, mine, _ = twins()
    for model, optimizer in (plain, mine):

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model, 3)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(5)]
        assert losses[-1] < losses[0]
    assert_equal(mine, plain)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=9, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    ],
    ids=["OneCycleLR", "LambdaLR"],
)
def test_schedulers(scheduler):
    plain, mine, _ = twins(k=2, options={"accumulate": "whole"})
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        for one in (plain, mine):
            schedule = scheduler(one[1])
            for step in range(6):
                train(*one, 1, step, k=2, zero=one is plain)
                schedule.step()
                assert schedule.get_last_lr() == [one[1].param_groups[0]["lr"]]
                rates.append(schedule.get_last_lr())
    assert rates[:6] == rates[6:]
    assert len({rate for (rate,) in rates}) == 6
    assert_equal(mine, plain)


def test_step_hooks():
    model, optimizer = made()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    step_in_backward(model, optimizer, 2)
    train(model, optimizer, 3, k=2)
    assert seen == ["pre", "post"] * 3


def test_too_many_backward_passes():
    model, optimizer = made()
    step_in_backward(model, optimizer, 2)
    for number in range(2):
        loss_of(model, number).backward()
    message = r"\w+ got gradient number 3 since the last optimizer.step\(\), and accumulation_steps is 2. Call"
    with pytest.raises(RuntimeError, match=message):
        loss_of(model, 2).backward()
    optimizer.zero_grad()
    assert no_gradients(model)
    train(model, optimizer, 2, 1, k=2, zero=False)


class Deep(nn.Module):
    """Checkpointed blocks; with `shared` one of them is used twice."""

    def __init__(self, reentrant, shared=False):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        self.reentrant, self.shared = reentrant, shared

    def forward(self, x):
        for block in [*self.blocks, *([self.blocks[1]] if self.shared else [])]:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def deep(reentrant, attach, shared=False, k=1):
    torch.manual_seed(4)
    model = Deep(reentrant, shared)
    optimizer = GALORE.build(model.named_parameters(), rank=3)
    if attach:
        step_in_backward(model, optimizer, k)
    for step in range(5):
        optimizer.zero_grad()
        for micro in range(k):
            x = torch.randn(9, 16, generator=torch.Generator().manual_seed(10 * step + micro), requires_grad=True)
            model(x).square().mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    assert_equal(deep(reentrant, True), deep(None, False))


def test_activation_checkpointing_with_shared_weights():
    assert_equal(deep(False, True, shared=True), deep(None, False, shared=True))
    with pytest.raises(RuntimeError, match=r"gradient number 2 .*reentrant activation checkpointing .*shared weights"):
        deep(True, True, shared=True)


@pytest.mark.slow
def test_a_compiled_model():
    plain, mine = made(), made()
    step_in_backward(*mine, 2, accumulate="whole")
    compiled = torch.compile(mine[0], backend="aot_eager")
    train(*plain, 4, k=2)
    train(compiled, mine[1], 4, k=2, zero=False)
    assert no_gradients(mine[0])
    assert max(differences(mine[0], plain[0])) < 1e-6
    inside = made()
    inside[0].square = torch.compile(inside[0].square, backend="aot_eager")
    step_in_backward(*inside, 2, accumulate="whole")
    train(*inside, 4, k=2, zero=False)
    assert max(differences(inside[0], plain[0])) < 1e-6


@pytest.mark.parametrize("k", [1, 3])
def test_eight_bit_weights(k):
    runs = []
    for attach in (False, True):
        torch.manual_seed(4)
        model = quantize_weights(nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)))
        optimizer = FIRA.build(model.named_parameters(), rank=3)
        if attach:
            handle = step_in_backward(model, optimizer, k)
        for step in range(5):
            optimizer.zero_grad()
            for micro in range(k):
                x = torch.randn(9, 16, generator=torch.Generator().manual_seed(10 * step + micro))
                model(x).square().mean().backward()
                if attach and micro < k - 1:
                    kept = sum(row.state_bytes for row in handle.report())
                    assert kept == sum(p.grad.nbytes for p in model.parameters())
            optimizer.step()
        runs.append(model)
    for p, q in zip(*(run.parameters() for run in runs), strict=True):
        assert torch.equal(getattr(p, "codes", p), getattr(q, "codes", q))


def test_unscaling_a_window_that_ends_early():
    """scaler.unscale_ divides the whole gradients of a window that ends early; the step must not do so again."""
    plain, mine = made(FIRA), made(FIRA)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    step_in_backward(*mine, 3, scaler=scalers[1])
    for (model, optimizer), scaler in zip((plain, mine), scalers, strict=True):
        for step in range(4):
            optimizer.zero_grad()
            for micro in range(2 if step % 2 else 3):
                scaler.scale(loss_of(model, 10 * step + micro)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert_equal(mine, plain)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_a_forgotten_scaler(k):
    model, optimizer = made()
    handle = step_in_backward(model, optimizer, k)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for number in range(k):
        scaler.scale(loss_of(model, number)).backward()
    with pytest.raises(RuntimeError, match=r"step_in_backward was given no scaler.*Pass scaler= to it"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    handle.remove()
    step_in_backward(model, optimizer, k, scaler=scaler)
    for step in range(1, 4):
        for micro in range(k):
            scaler.scale(loss_of(model, 10 * step + micro)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert no_gradients(model)
    assert int(optimizer.state[model.up.weight]["step"]) == 4


def test_a_scaler_that_is_switched_off():
    plain, mine = made(), made()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step_in_backward(*mine, scaler=scaler)
    train(*plain, 3)
    for step in range(3):
        scaler.scale(loss_of(mine[0], 10 * step)).backward()
        scaler.step(mine[1])
        scaler.update()
    assert_equal(mine, plain)
    with pytest.warns(UserWarning, match="non-finite gradient in"):  # an enabled one causes them, to find its scale
        (loss_of(mine[0], 70) * math.inf).backward()


def test_nonfinite_raise_is_refused():
    model, optimizer = made(nonfinite="raise")
    with pytest.raises(
        ValueError, match=r'nonfinite="raise" promises .* has already updated earlier parameters. Use nonfinite='
    ):
        step_in_backward(model, optimizer)
    assert optimizer.mode is None
    train(model, optimizer, 1)
    model, optimizer = made()
    step_in_backward(model, optimizer)
    train(model, optimizer, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["nonfinite"] = "raise"
    with pytest.raises(ValueError, match='nonfinite="raise" promises'):
        loss_of(model, 5).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.param_groups[0]["nonfinite"] = "skip"
    optimizer.zero_grad()
    train(model, optimizer, 2, 2, zero=False)


def test_an_edit_that_means_nothing_is_refused_before_anything_moves():
    model, optimizer = made()
    step_in_backward(model, optimizer)
    train(model, optimizer, 1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["rank"] = 2
    with pytest.raises(ValueError, match="rank of a group is fixed once it has state"):
        loss_of(model, 5).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


REFUSED = {
    "global": (dict(clip="global", clip_norm=1.0), r"known only when most of them have been used.*clip='delayed'"),
    "clip": (dict(clip="norm"), "clip must be one of 'tensor', 'delayed', got 'norm'"),
    "zero norm": (dict(clip_norm=0.0), "clip_norm must be a number > 0, got 0.0"),
    "infinite norm": (dict(clip_norm=math.inf), "clip_norm must be a number > 0, got inf"),
    "no steps": (dict(accumulation_steps=0), "accumulation_steps must be an int >= 1, got 0"),
    "half steps": (dict(accumulation_steps=1.5), "accumulation_steps must be an int >= 1"),
    "accumulate": (dict(accumulate="project"), "accumulate must be one of .*did you mean 'projected'"),
    "basis": (dict(basis_from="microbatch"), "basis_from must be one of .*did you mean 'micro-batch'"),
    "delayed nothing": (dict(clip="delayed"), r"clip='delayed' without clip_norm clips nothing. Pass clip_norm"),
    "basis of a part": (
        dict(accumulation_steps=2, accumulate="whole", basis_from="micro-batch"),
        r"basis_from='micro-batch' with accumulate='whole': .* fitted to all of it anyway. Leave out one",
    ),
    "clip projected": (dict(accumulation_steps=2, clip_norm=1.0), r'clip_norm needs the norm .*accumulate="whole"'),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_options_that_cannot_work(what):
    model, optimizer = made()
    options, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        step_in_backward(model, optimizer, **options)
    assert optimizer.mode is None
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_one_micro_batch_is_a_window():
    """So neither option promises what does not happen, and a script may set the number of micro-batches alone."""
    for options in ({"basis_from": "micro-batch"}, {"accumulate": "whole"}):
        plain, mine, _ = twins(options=options)
        train(*plain, 6)
        train(*mine, 6, zero=False)
        assert_equal(mine, plain)


def test_objects_that_cannot_work():
    model, optimizer = made()
    with pytest.raises(TypeError, match=r"needs an optimizer of lowrank_optim, got AdamW.*tutorial"):
        step_in_backward(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        step_in_backward(list(model.parameters()), optimizer)
    with pytest.raises(ValueError, match=r"embed.weight, .* is no parameter of this model. Was the model copied\?"):
        step_in_backward(copy.deepcopy(model), optimizer)
    half = made(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"is float16, .* needs float32 weights with autocast"):
        step_in_backward(*half, scaler=torch.amp.GradScaler("cpu"))
    handle = step_in_backward(model, optimizer)
    with pytest.raises(ValueError, match=r"steps during backward already; remove\(\) the earlier handle"):
        step_in_backward(model, optimizer)
    handle.remove()
    step_in_backward(model, optimizer)


def test_distributed_data_parallel_is_refused(monkeypatch):
    model, optimizer = made()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        step_in_backward(model, optimizer).remove()  # a group of one is no harm
        with pytest.raises(NotImplementedError, match="under DistributedDataParallel would use gradients before"):
            step_in_backward(DistributedDataParallel(model), optimizer)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
        with pytest.raises(NotImplementedError, match="in a group of 4 processes would use gradients before"):
            step_in_backward(model, optimizer)
    finally:
        torch.distributed.destroy_process_group()
    assert optimizer.mode is None


def test_another_hook_that_takes_gradients():
    model, optimizer = made()
    acc = CompressedAccumulation(model.named_parameters(), 3)
    step_in_backward(model, optimizer)
    with pytest.raises(RuntimeError, match=r"the gradient of \S+ is gone; did another hook take it"):
        loss_of(model, 0).backward()
    acc.remove()
    optimizer.zero_grad()
    train(model, optimizer, 2, zero=False)


def test_a_weight_that_backward_still_needs_is_noticed():
    """A use that autograd does not know of (detach) reads the weight after its update: torch raises, nothing is wrong
    in silence."""
    first = nn.Linear(8, 8, bias=False)
    optimizer = GaLoreAdamW([("w", first.weight)], rank=2)
    step_in_backward(first, optimizer)
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first(torch.tanh(x @ first.weight.detach())).sum().backward()
