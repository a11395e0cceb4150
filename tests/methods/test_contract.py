"""Promises of every optimizer, for every row of cases.py."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim import ops
from tests.cases import CASES, Net, every_case, gradients, ranked, train
from tests.support.selection import FEW


def weights(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def subspace(case, optimizer, p):
    """What says which subspace p is in; where that is the random stream alone, the number of refreshes."""
    return optimizer.state[p][case.basis or "refreshes"].clone()


def pair(case, shape=(12, 20), **options):
    """A matrix to project and a vector."""
    p, q = nn.Parameter(0.2 * torch.randn(shape)), nn.Parameter(torch.randn(5))
    return p, q, case.build([p, q], **{"rank": 3, **options})


@pytest.mark.few(case=FEW)
@every_case
def test_it_trains_every_kind_of_parameter(case):
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model, case.build(model.named_parameters()), 60)
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), f"{name} never moved"
        assert p.isfinite().all()


@pytest.mark.few(case=FEW)
@every_case
def test_closure_runs_with_gradients(case):
    p, q, optimizer = pair(case)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (p**2).sum() + (q**2).sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == calls[0]
    assert optimizer.step(closure).item() < calls[0]
    assert optimizer.step() is None


@pytest.mark.thin
@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize("stagger", [True, False])
def test_stacked_matrices_equal_a_loop(case, stagger):
    finals = []
    for foreach in (False, True, None):
        torch.manual_seed(1)
        model = nn.Sequential(*(nn.Linear(14, 14) for _ in range(4)), nn.Linear(14, 6)).double()
        optimizer = case.build(model.named_parameters(), foreach=foreach, stagger=stagger, moments="rotate")
        x = torch.randn(30, 14, dtype=torch.float64)
        for _ in range(16):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(finals[0], finals[2])
    assert (finals[0] - finals[1]).abs().max() < 1e-11


@pytest.mark.few(case=FEW)
@every_case
def test_stacks_are_cut_to_the_limit(case, monkeypatch):
    monkeypatch.setattr("lowrank_optim.engine.limits.CHUNK_BYTES", 3 * 4 * 14 * 14)
    test_stacked_matrices_equal_a_loop(case, True)


@pytest.mark.few(case=FEW)
@every_case
def test_one_parameter_at_a_time_equals_one_step(case):
    """Order and company must not matter."""
    models = [Net().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    together, apart = (case.build(model.named_parameters()) for model in models)
    for step in range(9):
        for model, optimizer in zip(models, (together, apart), strict=True):
            tokens = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(tokens).square().mean().backward()
        together.step()
        with torch.no_grad():
            for p, group in reversed(list(apart.table.members())):
                apart.stepper.update([apart.table.member(p, group, p.grad)])
    assert torch.equal(weights(models[0]), weights(models[1]))


@pytest.mark.few(case=FEW)
@every_case
def test_large_plain_parameters_are_cut_into_slices(case, monkeypatch):
    finals = []
    for size in (1 << 18, 16):  # whole vector registers: what a kernel does with the elements left over differs
        monkeypatch.setattr("lowrank_optim.engine.limits.SLICE", size)
        torch.manual_seed(2)
        for dtype in (torch.float32, torch.bfloat16):
            model = Net().to(dtype)
            train(model, case.build(model.named_parameters(), state_dtype="bfloat16"), 4)
            finals.append(weights(model))
    assert torch.equal(finals[0], finals[2])
    assert torch.equal(finals[1], finals[3]), "rounding noise must not depend on the slice"


@every_case
def test_gradients_are_never_written_to(case):
    model = Net()
    optimizer = case.build(model.named_parameters(), maximize=True)
    train(model, optimizer, 1)
    kept = [(p.grad, p.grad.clone(), p.grad._version) for p in model.parameters()]
    optimizer.step()
    assert all(p.grad is grad for p, (grad, _, _) in zip(model.parameters(), kept, strict=True))
    assert all(torch.equal(grad, value) and grad._version == version for grad, value, version in kept)


@every_case
def test_maximize_is_minimizing_the_negative(case):
    p, q, down = pair(case)
    p2, q2 = nn.Parameter(p.detach().clone()), nn.Parameter(q.detach().clone())
    up = case.build([p2, q2], rank=3, maximize=True)
    for g, h in zip(gradients((12, 20), 9), gradients((5,), 9), strict=True):
        p.grad, q.grad, p2.grad, q2.grad = g, h, -g, -h
        down.step()
        up.step()
    torch.testing.assert_close(p, p2, rtol=0, atol=1e-7)  # ascending has no fused kernel
    torch.testing.assert_close(q, q2, rtol=0, atol=1e-7)


@every_case
def test_parameters_without_gradient_stand_still(case):
    p, q, optimizer = pair(case)
    before = p.detach().clone()
    for h in gradients((5,), 3):
        q.grad = h
        optimizer.step()
    assert torch.equal(p, before), "not even weight decay"
    assert optimizer.state[p]["step"] == 0
    assert optimizer.state[q]["step"] == 3


@pytest.mark.few(case=FEW)
@every_case
def test_frozen_then_unfrozen(case):
    model = Net()
    model.square.requires_grad_(False)
    optimizer = case.build(model.named_parameters())
    assert model.square.weight not in optimizer.state
    train(model, optimizer, 3)
    model.square.requires_grad_(True)
    before = model.square.weight.detach().clone()
    train(model, optimizer, 3, first=3)
    assert not torch.equal(model.square.weight, before)
    assert optimizer.state[model.square.weight]["step"] == 3


@pytest.mark.few(case=FEW)
@every_case
def test_add_param_group_later(case):
    first, late = nn.Parameter(torch.randn(12, 20)), nn.Parameter(torch.randn(9, 9))
    optimizer = case.build([("first", first)], rank=3)
    optimizer.add_param_group({"params": [("late", late)], "rank": 2, "lr": 0.5})
    assert optimizer.report()[-1].rank == (2 if case.make.ranked else 9)
    assert optimizer.report()[-1].name == "late"
    before = late.detach().clone()
    late.grad = torch.randn(9, 9)
    optimizer.step()
    assert not torch.equal(late, before)


@ranked
def test_groups_override_every_number(case):
    p, q = nn.Parameter(torch.randn(16, 12)), nn.Parameter(torch.randn(12, 16))
    groups = [{"params": [p], "rank": 2, "lr": 0.0, "proj_type": "left"}, {"params": [q], "rank": 0.5, "scale": 2.0}]
    optimizer = case.build(groups)
    rows = optimizer.report()
    assert [(row.rank, row.side) for row in rows] == [(2, "left"), (6, "left")]
    p.grad, q.grad, before = torch.randn(16, 12), torch.randn(12, 16), p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.few(case=FEW)
@every_case
def test_groups_written_for_the_original_package(case):
    """Its groups name a rank where they want projection; the others are plain, embeddings included."""
    model = Net()
    matrices = [model.up.weight, model.down.weight, model.embed.weight]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    galore = {"params": matrices, "rank": 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    if not case.has("update_proj_gap"):
        del galore["update_proj_gap"]
    optimizer = case.build([{"params": rest}, galore], lr=0.01)
    assert [row.rank for row in optimizer.report()][-3:] == ([4, 4, 4] if case.make.ranked else [12, 12, 11])
    assert all(row.rank is None for row in optimizer.report()[:-3])
    train(model, optimizer, 3)


@pytest.mark.few(case=FEW)
@every_case
def test_learning_rate_schedulers(case):
    p, _, optimizer = pair(case)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=6, cycle_momentum=False)
    rates = []
    for g in gradients((12, 20), 5):
        p.grad = g
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) == 5
    restored = copy.deepcopy(optimizer)
    restored.load_state_dict(optimizer.state_dict())


@every_case
def test_lr_as_a_tensor(case):
    results = []
    for lr in (0.02, torch.tensor(0.02, dtype=torch.float64)):
        torch.manual_seed(3)
        p, _, optimizer = pair(case, lr=lr)
        for g in gradients((12, 20), 3):
            p.grad = g
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.thin
@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_continue_alike(case, how):
    model = Net()
    optimizer = case.build(model.named_parameters())
    train(model, optimizer, 4)
    model2, optimizer2 = how((model, optimizer))
    assert optimizer2.param_groups[0]["params"][0] is next(model2.parameters())
    assert train(model, optimizer, 8, 4) == train(model2, optimizer2, 8, 4)
    assert torch.equal(weights(model), weights(model2))
    assert str(optimizer.report()) == str(optimizer2.report())


@pytest.mark.few(case=FEW)
@every_case
def test_step_hooks_and_grad_scaler(case):
    p, q, optimizer = pair(case)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    clean_p, clean_q = nn.Parameter(p.detach().clone()), nn.Parameter(q.detach().clone())
    clean = case.build([clean_p, clean_q], rank=3)
    for step, g in enumerate(gradients((12, 20), 5)):
        p.grad, q.grad = g * scaler.get_scale(), torch.ones(5) * scaler.get_scale()
        scaler.scale(torch.tensor(1.0))
        if step == 2:
            p.grad[0, 0] = float("inf")
        else:
            clean_p.grad, clean_q.grad = g.clone(), torch.ones(5)
            clean.step()
        scaler.step(optimizer)
        scaler.update()
    assert seen == ["pre", "post"] * 4, "an overflow must skip the step"
    assert torch.allclose(p, clean_p, atol=1e-6)
    assert not optimizer.report().summary.endswith("skipped")


@pytest.mark.thin
@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
def test_a_bad_gradient_cannot_hurt(case, poison):
    model = Net()
    optimizer = case.build(model.named_parameters())
    train(model, optimizer, 6)
    saved = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():  # before a step that refreshes
        p.grad = torch.randn_like(p)
        p.grad.view(-1)[0] = poison
    with pytest.warns(UserWarning, match=r"non-finite gradient in \w+.*: left out of this step") as caught:
        optimizer.step()
    assert caught[0].filename == __file__, "the warning points at the user's line"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    for p, old, state in zip(model.parameters(), before, saved, strict=True):
        assert torch.equal(p, old)
        assert optimizer.state[p].pop("skipped") == 2
        assert all(torch.equal(optimizer.state[p][key], state[key]) for key in optimizer.state[p])
        optimizer.state[p]["skipped"] = torch.tensor(2)
    assert f"{2 * len(before)} non-finite gradients skipped" in str(optimizer.report())
    train(model, optimizer, 6, first=6)
    assert weights(model).isfinite().all()


@every_case
def test_nonfinite_raise_updates_nothing(case):
    model = Net()
    optimizer = case.build(model.named_parameters(), nonfinite="raise")
    train(model, optimizer, 2)
    before = weights(model)
    model.down.weight.grad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"non-finite gradient in down.weight; nothing was updated"):
        optimizer.step()
    assert torch.equal(before, weights(model))


@pytest.mark.few(case=FEW)
@every_case
def test_the_first_step_on_zero_gradients_is_inert(case):
    """DCP and DeepSpeed both make one; a basis taken from it would be kept for a whole refresh interval."""
    models = [Net(), Net()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [case.build(model.named_parameters()) for model in models]
    for p in models[0].parameters():
        p.grad = torch.zeros_like(p)
    state = copy.deepcopy(optimizers[0].state_dict())
    optimizers[0].step()
    for key, values in optimizers[0].state_dict()["state"].items():
        assert all(torch.equal(value, state["state"][key][name]) for name, value in values.items())
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 9)
    assert torch.equal(weights(models[0]), weights(models[1]))


@ranked
def test_no_basis_from_a_zero_gradient(case):
    """A zero-initialised output projection has one at first; the basis comes with the first real gradient."""
    p, q, optimizer = pair(case)
    p.grad, q.grad = torch.zeros(12, 20), torch.ones(5)
    optimizer.step()
    assert optimizer.state[p]["refreshes"] == 0
    assert not subspace(case, optimizer, p).any()
    before = p.detach().clone()
    p.grad = torch.randn(12, 20)
    optimizer.step()
    assert optimizer.state[p]["refreshes"] == 1
    moved = (p - before).abs().mean()
    p.grad = torch.randn(12, 20)
    optimizer.step()
    assert moved > 1e-4, "and it must move at once"


@ranked
def test_a_zero_gradient_when_a_refresh_is_due_keeps_the_basis(case):
    p, _, optimizer = pair(case, stagger=False, update_proj_gap=2, error_feedback="none", orthonormal=True)
    for g in gradients((12, 20), 2):
        p.grad = g
        optimizer.step()
    basis = subspace(case, optimizer, p)
    p.grad = torch.zeros(12, 20)
    optimizer.step()
    assert torch.equal(subspace(case, optimizer, p), basis)
    p.grad = torch.randn(12, 20)
    optimizer.step()
    assert optimizer.state[p]["refreshes"] == 2
    assert not torch.equal(subspace(case, optimizer, p), basis)


@ranked
def test_experts_without_tokens_get_their_basis_later(case):
    experts, other = nn.Parameter(torch.randn(3, 10, 20)), nn.Parameter(torch.randn(5))
    optimizer = case.build([experts, other], rank=3, stagger=False, update_proj_gap=7)
    for active in ([0], [0], [1], [0, 1, 2]):
        experts.grad = torch.zeros(3, 10, 20)
        experts.grad[active] = torch.randn(len(active), 10, 20)
        optimizer.step()
    state = optimizer.state[experts]
    assert state["refreshes"].tolist() == [1, 1, 1]
    assert state["refreshed_at"].tolist() == [0, 2, 3]
    if case.basis == "basis":
        assert ((state["basis"].mT @ state["basis"]) - torch.eye(3)).abs().max() < 1e-5


@every_case
def test_a_stack_of_experts_equals_separate_matrices(case, monkeypatch):
    """Each expert draws its own random numbers; here all draw the same, so that the rest can be compared."""
    normal = ops.normal

    def alike(shape, key, stream, device, start=0, some=None):
        return normal(shape, 1, (0, stream[1]), some=some)

    monkeypatch.setattr("lowrank_optim.ops.normal", alike)
    stack = nn.Parameter(0.2 * torch.randn(3, 10, 20, dtype=torch.float64))
    single = [nn.Parameter(expert.detach().clone()) for expert in stack]
    options = dict(rank=3, basis="svd", moments="reset", update_proj_gap=4)  # staggered: each expert at its own time
    together, apart = case.build([stack], **options), case.build(single, **options)
    for g in gradients((3, 10, 20), 11, torch.float64):
        stack.grad = g
        for p, expert in zip(single, g, strict=True):
            p.grad = expert.clone()
        together.step()
        apart.step()
    assert (stack - torch.stack(single)).abs().max() < 1e-11


@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize("layout", ["transposed weight", "transposed gradient", "channels_last"])
def test_strides_do_not_matter(case, layout):
    """torch's fused CPU AdamW walks such gradients flat and is silently wrong."""
    shape = (6, 5, 3, 4) if layout == "channels_last" else (12, 20)
    start = 0.2 * torch.randn(shape)
    results = []
    for strided in (False, True):

        def laid_out(x, on, strided=strided):
            if not strided or layout not in on:
                return x.clone()
            if layout == "channels_last":
                return x.clone(memory_format=torch.channels_last)
            return x.t().contiguous().t()

        torch.manual_seed(4)
        p = nn.Parameter(laid_out(start, ("transposed weight", "channels_last")))
        plain = nn.Parameter(laid_out(start, ("transposed weight", "channels_last")))
        optimizer = case.build([{"params": [p], "rank": 3}, {"params": [plain], "rank": None}])
        for g in gradients(shape, 9):
            p.grad = laid_out(g, ("transposed gradient", "channels_last"))
            plain.grad = p.grad.clone()
            optimizer.step()
        results.append((p.detach(), plain.detach()))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


@pytest.mark.few(case=FEW)
@every_case
def test_convolutions_are_out_by_rest(case):
    conv = nn.Parameter(0.2 * torch.randn(16, 4, 3, 3))
    flat = nn.Parameter(conv.detach().clone().view(16, 36))
    optimizers = case.build([("w", conv)], rank=3), case.build([("w", flat)], rank=3)
    for g in gradients((16, 4, 3, 3), 9):
        conv.grad, flat.grad = g, g.view(16, 36).clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(conv.view(16, 36), flat)


@pytest.mark.few(case=FEW)
@every_case
def test_the_global_generators_are_left_alone(case):
    model = Net().bfloat16()
    optimizer = case.build(model.named_parameters(), state_dtype="bfloat16")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = torch.get_rng_state()
    optimizer.step()
    optimizer.step()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.has("basis", "rsvd") and c.name != "frugal"], ids=lambda c: c.name
)
def test_random_numbers_follow_seed_and_name(case):
    def basis(name, seed):
        p = nn.Parameter(torch.zeros(40, 40))
        optimizer = case.build([(name, p)], rank=3, seed=seed)
        p.grad = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        return optimizer.state[p]["basis"]

    assert torch.equal(basis("a", 1), basis("a", 1))
    assert not torch.equal(basis("a", 1), basis("a", 2))
    assert not torch.equal(basis("a", 1), basis("b", 1))
    assert torch.equal(basis("layers.0.up.weight", 1), basis("module.layers.0._orig_mod.up.weight", 1)), "wrappers"


@pytest.mark.few(case=FEW)
@every_case
def test_bf16_weights_follow_fp32(case):
    """Updates a hundred times smaller than a bfloat16 weight's last bit vanish when rounded to nearest.

    One weight in ten moves by one bit: with 9,216 weights the mean has a standard deviation of 3 %.
    """
    moved, start = {}, torch.full((96, 96), 1.0)
    for mode in ("fp32", "stochastic", "kahan", "none"):
        dtype = torch.float32 if mode == "fp32" else torch.bfloat16
        p = nn.Parameter(start.to(dtype, copy=True))
        bf16_update = "none" if mode == "fp32" else mode
        numbers = dict(lr=2e-5, weight_decay=0.0, rank=8, random_after=1000)
        optimizer = case.build([p], bf16_update=bf16_update, **numbers)
        for _ in range(100):
            p.grad = torch.linspace(0.5, 1.5, 96).expand(96, 96).to(dtype)
            optimizer.step()
        moved[mode] = float((p.detach().float() - 1).mean())
    if case.name == "galore_adamw":
        assert moved["none"] == 0, "the case must be hard enough to show the point"
    assert moved["stochastic"] == pytest.approx(moved["fp32"], rel=0.15)
    assert moved["kahan"] == pytest.approx(moved["fp32"], rel=0.15, abs=2**-9)


@every_case
def test_decay_below_the_last_bit_adds_up(case):
    """1e-4 of a weight is a fortieth of bfloat16's last bit; twenty of them are half of it."""
    p = nn.Parameter(torch.full((16, 24), 1.0, dtype=torch.bfloat16))
    optimizer = case.build([p], lr=1e-4, weight_decay=1.0, rank=4, bf16_update="kahan")
    for _ in range(20):
        p.grad = torch.full((16, 24), 1e-30, dtype=torch.bfloat16)
        optimizer.state[p]["exp_avg"].zero_() if "exp_avg" in optimizer.state[p] else None
        optimizer.param_groups[0]["scale"] = 1e-30
        optimizer.step()
    whole = p.detach() + optimizer.state[p]["compensation"].float()
    assert optimizer.state[p]["step"] == 20, "gradients whose squares underflow are small, not zero"
    assert float(whole.mean()) == pytest.approx((1 - 1e-4) ** 20, abs=1e-4)


@pytest.mark.few(case=FEW)
@every_case
def test_bf16_state_tracks_fp32_state(case):
    finals = []
    for state_dtype in ("float32", "bfloat16"):
        torch.manual_seed(5)
        p, q, optimizer = pair(case, state_dtype=state_dtype)
        for g, h in zip(gradients((12, 20), 30), gradients((5,), 30), strict=True):
            p.grad, q.grad = g, h
            optimizer.step()
        finals.append(p.detach())
        moments = [t for key, t in optimizer.state[p].items() if key in ("exp_avg", "exp_avg_sq", "row_var")]
        assert all(t.dtype == getattr(torch, state_dtype) for t in moments)
    start = 30 * 0.0037
    assert (finals[0] - finals[1]).abs().mean() < 0.05 * start


def test_a_second_moment_in_bfloat16_decays():
    """Rounded to nearest it would stand still: 0.1 % is less than half of the last bit."""
    p = nn.Parameter(torch.zeros(8, 16))
    optimizer = lowrank_optim.GaLoreAdamW([p], rank=4, state_dtype="bfloat16", update_proj_gap=10_000)
    p.grad = torch.randn(8, 16)
    optimizer.step()
    v = optimizer.state[p]["exp_avg_sq"]
    first = v.float().mean()
    p.grad = torch.full((8, 16), 1e-12)
    for _ in range(1000):
        optimizer.step()
    assert float(v.float().mean() / first) == pytest.approx(0.999**1000, rel=0.05)


@pytest.mark.few(case=FEW)
@every_case
def test_meta_parameters_get_state_when_they_have_memory(case):
    with torch.device("meta"):
        model = Net()
    optimizer = case.build(model.named_parameters())
    assert not optimizer.state
    model.to_empty(device="cpu")
    model.load_state_dict(Net().state_dict())
    optimizer = case.build(model.named_parameters())  # to_empty replaces parameters: the optimizer is built after it
    train(model, optimizer, 2)
    data = nn.Parameter(torch.randn(9, 9))
    meta = nn.Parameter(torch.empty(9, 9, device="meta"))
    late = case.build([meta], rank=2)
    torch.utils.swap_tensors(meta, data)
    meta.grad = torch.randn(9, 9)
    late.step()
    assert late.state[meta]["step"] == 1
    assert not late.state[meta]["step"].is_meta


@pytest.mark.few(case=FEW)
@every_case
def test_tied_weights_are_updated_once(case):
    model = Net()
    names = [row.name for row in case.build(model.named_parameters()).report()]
    assert "embed.weight" in names
    assert "lm_head.weight" not in names
    with pytest.raises(ValueError, match=r"duplicate|more than one parameter group"):
        case.build([{"params": [model.embed.weight]}, {"params": [model.lm_head.weight], "rank": 3}])


def test_the_kept_basis_is_compact():
    p = nn.Parameter(torch.randn(256, 256))
    optimizer = lowrank_optim.GaLoreAdamW([p], rank=4, basis="svd")
    p.grad = torch.randn(256, 256)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert lowrank_optim.state_bytes(optimizer) == 4 * 3 * 4 * 256 + 4 + 3 * 8
    assert file.tell() < 4 * 3 * 4 * 256 + 5000, "a basis that is a view would save all of U"


@pytest.mark.few(case=FEW)
@every_case
def test_a_large_stack_is_cut_into_groups_of_experts(case, monkeypatch):
    finals = []
    for limit in (1 << 26, 2 * 4 * 10 * 20):
        monkeypatch.setattr("lowrank_optim.engine.limits.CHUNK_BYTES", limit)
        torch.manual_seed(6)
        for dtype in (torch.float32, torch.bfloat16):
            stack = nn.Parameter(0.2 * torch.randn(5, 10, 20).to(dtype))
            optimizer = case.build([stack], rank=3, moments="reset", update_proj_gap=3, state_dtype="bfloat16")
            for g in gradients((5, 10, 20), 8, dtype):
                stack.grad = g
                optimizer.step()
            finals.append(stack.detach())
    assert torch.allclose(finals[0], finals[2], atol=1e-6)
    assert torch.equal(finals[1], finals[3]), "sketches and rounding noise must not depend on the cut"


@pytest.mark.few(case=FEW)
@every_case
def test_stacks_with_several_leading_dimensions(case):
    p = nn.Parameter(0.2 * torch.randn(2, 3, 10, 20, dtype=torch.float64))
    q = nn.Parameter(p.detach().clone().view(6, 10, 20))
    plain = nn.Parameter(p.detach().clone())
    group = {"params": [("p", p)], "rank": 3, "as_matrix": "batch"}
    optimizer = case.build([group, {"params": [("plain", plain)], "rank": None, "as_matrix": "batch"}])
    flat = case.build([{"params": [("p", q)], "rank": 3}])
    for g in gradients((2, 3, 10, 20), 9, torch.float64):
        p.grad, q.grad, plain.grad = g, g.view(6, 10, 20), g
        optimizer.step()
        flat.step()
    assert torch.equal(p.view(6, 10, 20), q)


@every_case
@pytest.mark.parametrize("size", [1e20, 1e-23])
def test_float64_gradients_of_any_size(case, size):
    p = nn.Parameter(torch.zeros(16, 16, dtype=torch.float64))
    optimizer = case.build([p], rank=4)
    p.grad = size * torch.randn(16, 16, dtype=torch.float64)
    optimizer.step()
    assert optimizer.state[p]["refreshes"] == case.make.ranked
    if size > 1:
        assert p.abs().max() > 1e-6


@pytest.mark.few(case=FEW)
@every_case
def test_the_report_changes_nothing(case):
    """Also not for a frozen parameter, which has no state yet."""
    model = Net()
    model.square.requires_grad_(False)
    optimizer = case.build(model.named_parameters())
    rows = {row.name: row for row in optimizer.report()}
    assert rows["square.weight"].reason == "frozen: no state yet"
    assert rows["square.weight"].full_bytes == rows["square.weight"].state_bytes == 0
    train(model, optimizer, 2)
    str(optimizer.report())
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state[model.square.weight], (
        "reading torch's defaultdict makes an empty entry, which must not hurt"
    )
    optimizer.load_state_dict(optimizer.state_dict())
    model.square.requires_grad_(True)
    train(model, optimizer, 2)
    assert optimizer.state[model.square.weight]["step"] == 2


@pytest.mark.few(case=FEW)
@every_case
def test_kahan_after_the_model_was_cast(case):
    p = nn.Parameter(torch.ones(16, 24))
    optimizer = case.build([p], rank=4, bf16_update="kahan")
    p.data = p.data.bfloat16()
    p.grad = torch.randn(16, 24).bfloat16()
    optimizer.step()
    assert optimizer.state[p]["compensation"].any()
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.few(case=FEW)
@ranked
def test_numbers_of_numpy(case):
    import numpy as np

    optimizer = case.build([nn.Parameter(torch.randn(9, 9))], lr=np.float32(1e-3), rank=np.int64(4))
    assert optimizer.report()[0].rank == 4
    assert case.build([nn.Parameter(torch.randn(20, 20))], rank=np.float32(0.25)).report()[0].rank == 5


@pytest.mark.few(case=FEW)
@every_case
def test_a_compiled_step_falls_back(case):
    p, q, optimizer = pair(case)
    p.grad, q.grad = torch.randn(12, 20), torch.randn(5)
    before = p.detach().clone()
    torch.compile(optimizer.step, backend="aot_eager")()
    assert not torch.equal(p, before)
