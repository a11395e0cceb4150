"""Numbers and laws of the papers of weight-space methods, each checked where it can fail."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim import JaggedCosine, LoQT, LowRankAdamW, ReLoRA
from lowrank_optim.layers.linear import LowRankLinear
from lowrank_optim.layers.quantized import NF4Weight
from lowrank_optim.layers.quantized_linear import QuantizedLinear, compensate
from lowrank_optim.methods.loqt import _times
from lowrank_optim.ops.factor import balance, split
from lowrank_optim.schedules import jagged_cosine
from tests.reference.loqt import compensated, times
from tests.weight_cases import batch, loss_of, net, train

LR = 0.01


def linear(shape=(40, 24), dtype=torch.float32):
    plain = nn.Linear(*reversed(shape), bias=False, dtype=dtype)
    return plain, plain.weight.detach().clone()


# -- ReLoRA ------------------------------------------------------------------------------------------------------------


def test_only_a_learns_from_b_at_first_and_b_at_once():
    model = net()
    optimizer = ReLoRA(model, rank=4, lr=LR)
    loss_of(model, batch(0)).backward()
    for layer in (model.up, model.down, model.square, model.first):
        assert layer.B.grad.abs().max() > 0
        assert layer.A.grad.abs().max() == 0
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, batch(1)).backward()
    assert model.up.A.grad.abs().max() > 0


def test_merges_add_ranks():
    model, r = net(torch.float64), 3
    start = model.square.weight.detach().clone()
    optimizer = ReLoRA(model, rank=r, lr=LR, merge_every=2)
    for k in range(1, 5):
        train(model, optimizer, 2, first=2 * k)
        rank = int(torch.linalg.matrix_rank(model.square.base - start, rtol=1e-9))
        assert rank <= k * r
        assert rank > r or k == 1


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_a_merge_leaves_the_function(dtype, atol):
    model = net(dtype)
    train(model, ReLoRA(model, rank=4, lr=LR), 5)
    before = model(batch(0)), model.up.dense().detach()
    model.up.merge_(1)
    assert (model.up.dense() - before[1]).abs().max() <= atol
    assert (model(batch(0)) - before[0]).abs().max() <= 10 * atol


@pytest.mark.parametrize("stochastic", [True, False])
def test_a_merge_in_bfloat16_rounds_once(stochastic):
    layer = LowRankLinear(linear(dtype=torch.bfloat16)[0], 4, name="x")
    layer.B.data.normal_(std=0.1)
    exact = layer.base.float() + layer.scale * layer.B.float() @ layer.A.float()
    layer.merge_(1, stochastic=stochastic)
    ulp = 2.0 ** (exact.abs().log2().floor() - 7)
    assert ((layer.base.float() - exact).abs() <= ulp * (1 if stochastic else 0.5)).all()


def small_merges(layer, count, size=1e-4):
    """Adds `size` to every entry, `count` times; what has arrived, on average."""
    before = layer.dense()
    for k in range(1, count + 1):
        layer.A.data.fill_(size / layer.scale / layer.rank)
        layer.B.data.fill_(1.0)
        layer.merge_(k)
    return (layer.dense() - before).mean().item()


def test_a_thousand_tiny_bfloat16_merges_do_not_vanish():
    layer = LowRankLinear(linear(dtype=torch.bfloat16)[0], 4, name="x")
    nearest = LowRankLinear(linear(dtype=torch.bfloat16)[0], 4, name="x")
    assert small_merges(layer, 1000, 1e-5) == pytest.approx(1e-2, rel=0.1)
    merge_ = nearest.merge_
    nearest.merge_ = lambda count: merge_(count, stochastic=False)
    assert small_merges(nearest, 1000, 1e-5) < 5e-3


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_small_merges_survive_in_quantized_bases(base):
    for exact in (False, True):
        layer = LowRankLinear(linear((64, 64))[0], 4, base=base, exact_base=exact, name="x")
        assert small_merges(layer, 50) == pytest.approx(5e-3, rel=0.15), exact
    nearest = LowRankLinear(linear((64, 64))[0], 4, base=base, name="x")
    merge_ = nearest.merge_
    nearest.merge_ = lambda count: merge_(count, stochastic=False)
    if base == "nf4":
        assert abs(small_merges(nearest, 50)) < 1e-3, "if nearest kept them there was nothing to show"


@pytest.mark.few(base=("nf4",))
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_stochastic_merges_are_right_on_average(base):
    mean = torch.zeros(40, 24)
    for seed in range(400):
        torch.manual_seed(0)
        layer = LowRankLinear(linear()[0], 4, base=base, name="x", seed=seed)
        layer.A.data.fill_(0.01)
        layer.B.data.fill_(0.01)
        exact = layer.dense()
        layer.merge_(1)
        mean += layer.base.unpack() / 400
    step = 0.15 * exact.abs().max() if base == "nf4" else 2 * exact.abs().max() / 255
    assert (mean - exact).abs().max() < 5 * step / math.sqrt(400)


# -- resets ------------------------------------------------------------------------------------------------------------


def constant(optimizer, model, steps):
    """Updates with constant gradients; the size of the last one, in units of lr."""
    for _ in range(steps):
        before = model.up.B.detach().clone()
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    return ((model.up.B.detach() - before).abs().max() / LR).item()


def settle(optimizer):
    """The state after very many steps with that gradient."""
    for state in optimizer.state.values():
        state["step"].fill_(1e5)
        state["exp_avg"].fill_(0.5)
        state["exp_avg_sq"].fill_(0.25)


def test_the_first_update_after_a_reset_is_one_lr_and_would_be_three():
    model = net()
    optimizer = LowRankAdamW(model, rank=4, lr=LR, refactor_every=None, reset_every=None)
    settle(optimizer)
    optimizer.reset(model.up)
    assert constant(optimizer, model, 1) == pytest.approx(1.0, abs=1e-3)
    state = optimizer.state[model.up.B]
    settle(optimizer)
    state["refreshed_at"].zero_()
    state["exp_avg"].zero_()
    state["exp_avg_sq"].zero_()  # and the clock continues, as published
    assert constant(optimizer, model, 1) == pytest.approx(3.16, abs=0.02)


@pytest.mark.parametrize("reset", ["magnitude", "random"])
def test_a_partial_reset_is_one_lr_too(reset):
    model = net()
    optimizer = ReLoRA(model, rank=4, lr=LR, merge_every=10**6, reset=reset)
    constant(optimizer, model, 100)
    optimizer.reset(model.up, reset, 0.7)
    assert constant(optimizer, model, 1) == pytest.approx(1.0, abs=1e-3)


def trained(kept="float32", steps=4, **options):
    """A layer large enough for narrow state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(192, 320), nn.Tanh(), nn.Linear(320, 192))
    optimizer = ReLoRA(model, rank=32, lr=LR, merge_every=10**6, state_dtype=kept, **options)
    x = torch.randn(64, 192)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    return model, optimizer


def moments(optimizer, p):
    plan = optimizer.table.plans[p]
    spec = optimizer.table.recipe(plan, optimizer.param_groups[0]).spec(plan.matrix, plan.rank or 0, plan.small)
    state = optimizer.state[p]
    return {
        key: one.store.read({s: state[key + s] for s in one.store.suffixes}, one.shape, torch.float32).clone()
        for key, one in spec.items()
    }


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("reset", ["drop", "magnitude", "random"])
def test_resets_reach_the_same_entries_of_both_moments_in_every_store(kept, reset):
    model, optimizer = trained(kept, reset=reset)
    others = {p: {k: x.clone() for k, x in state.items()} for p, state in optimizer.state.items()}
    p, other = model[0].B, model[2]
    before = moments(optimizer, p)
    optimizer.reset(model[0], reset, 0.9)
    after = moments(optimizer, p)
    m, v = before["exp_avg"], after["exp_avg_sq"]
    lost = after["exp_avg"] == 0
    least = {"int8": 1e-5, "int4": 1.001 / 16}.get(
        kept, 0.0
    )  # narrow codes of v have no 0: what they have in its place
    if reset == "drop":
        assert lost.all()
        assert not v.any()
    else:
        assert set(after) > {"exp_avg", "exp_avg_sq"}, "ages"
        age = next(x for key, x in after.items() if key not in ("exp_avg", "exp_avg_sq"))
        assert lost[age == 0].all()
        assert v[age == 0].max() <= least * before["exp_avg_sq"].max(), "v was kept where m was reset"
        assert v[age > 0].count_nonzero() > 0.9 * (age > 0).sum()
        ties = 0.1 if kept in ("int8", "int4") and reset == "magnitude" else 0.01
        assert (age > 0).float().mean() == pytest.approx(0.1, abs=ties)
        assert v.max() <= before["exp_avg_sq"].max() * 1.01
        if reset == "magnitude":
            assert m[age > 0].abs().min() >= m[age == 0].abs().max()
    for p, state in optimizer.state.items():
        if p not in {model[0].A, model[0].B}:
            assert all(torch.equal(x, others[p][key]) for key, x in state.items())
    assert other.B in optimizer.state


def test_a_magnitude_reset_keeps_the_promised_number():
    for share in (0.0, 0.001, 0.5, 0.9, 0.99, 1.0):
        model, optimizer = trained(reset="magnitude")
        lost = optimizer.reset(model[0], "magnitude", share)
        count = sum(math.floor(share * p.numel()) for p in (model[0].A, model[0].B))
        assert lost == pytest.approx(count / (model[0].A.numel() + model[0].B.numel()), abs=1e-9)


# -- the schedule ------------------------------------------------------------------------------------------------------

TABLE = {
    0: 0, 1: 0.002, 499: 0.998, 500: 1, 4999: 0.88688, 5000: 0, 5001: 0.00882, 5050: 0.44099, 5099: 0.87316,
    5100: 0.88198, 10000: 0, 10001: 0.00561, 15000: 0, 19999: 0.1,
}  # fmt: skip


@pytest.mark.parametrize(("step", "factor"), TABLE.items())
def test_the_published_schedule(step, factor):
    got = jagged_cosine(step, 20_000, warmup=500, restart_every=5000, restart_warmup=100, min_ratio=0.1)
    assert round(got, 5) == factor


def schedule(lrs=(0.5, 2.0), **options):
    params = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs]
    options = {"total_steps": 60, "warmup": 5, "restart_every": 20, "restart_warmup": 4, **options}
    optimizer = torch.optim.SGD(params, lr=0.1)
    return optimizer, JaggedCosine(optimizer, **options)


def test_the_scheduler_drives_all_groups_and_tensors():
    for kind in (float, torch.tensor):
        optimizer, scheduler = schedule(lrs=(kind(0.5), kind(2.0)))
        for step in range(60):
            factor = jagged_cosine(step, 60, warmup=5, restart_every=20, restart_warmup=4)
            for group, base in zip(optimizer.param_groups, (0.5, 2.0), strict=True):
                assert float(group["lr"]) == pytest.approx(base * factor, rel=1e-6)
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("stop", [3, 19, 20, 21, 41])
def test_the_scheduler_resumes(stop):
    whole, first, second = schedule(), schedule(), schedule(total_steps=80, restart_warmup=2)
    for step in range(59):
        optimizer, scheduler = first if step < stop else second
        if step == stop:
            scheduler.load_state_dict(first[1].state_dict())
            optimizer.load_state_dict(first[0].state_dict())
        for one in (whole, (optimizer, scheduler)):
            one[0].step()
            one[1].step()
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in whole[0].param_groups]


def test_a_period_must_divide_the_run():
    with pytest.raises(ValueError, match="must divide"):
        schedule(total_steps=61)
    with pytest.raises(ValueError, match="must divide"):
        schedule(restart_every=0)
    with pytest.raises(ValueError, match="never rises"):
        schedule(restart_warmup=20)


# -- LoQT --------------------------------------------------------------------------------------------------------------


def test_equal_gaps_are_known_without_counting():
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(5)))
    optimizer = lowrank_optim.LoQT(model, rank=4, update_proj_gap=7, gap_growth=1)
    for place, layer in enumerate(optimizer.conversion.layers.values()):
        for count in range(40):
            optimizer.state[layer.leader]["step"].fill_(count)
            assert optimizer._is_due(place, layer) == (count in optimizer._times(place, layer))


def test_update_times_are_the_published_ones():
    group = {"update_proj_gap": 100, "gap_growth": 1.2}
    assert list(_times(720, 0, group)) == [0, 100, 201, 302, 403, 505, 607, 709]
    assert list(_times(10_000, 0, group)) == times(100, 1.2, 10_001)
    for steps, merges in ((10_000, 40), (20_000, 45), (60_000, 52), (100_000, 55)):
        assert sum(time < steps for time in _times(steps, 0, group)) == merges


def test_compensation_gains_what_the_paper_says():
    m, r = 512, 128
    w = torch.randn(m, m)
    p = torch.linalg.qr(torch.randn(m, r)).Q.T.contiguous()

    def rounded(x):
        return NF4Weight.quantize(x).unpack()

    _, errors = compensated(w, p, rounded, 5)
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[1] / errors[0] == pytest.approx(math.sqrt(1 - r / m), abs=0.003)
    published = [0.865, 0.784, 0.75, 0.733, 0.723]
    assert [float(e / errors[0]) for e in errors[1:]] == pytest.approx(published, abs=0.01)
    for iterations in range(6):
        target, b = compensate(w, p, rounded, iterations)
        assert torch.linalg.norm(w - rounded(target) - b @ p) == pytest.approx(float(errors[iterations]), rel=1e-4)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)])
@pytest.mark.parametrize("basis", ["svd", "rsvd"])
def test_a_new_subspace_captures_what_svd_would_and_keeps_the_function(shape, basis):
    plain, _ = linear(shape)
    model = nn.Sequential(plain)
    optimizer = LoQT(model, rank=16, lr=LR, base="nf4", basis=basis, update_proj_gap=2, gap_growth=1)
    layer = model[0]
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    g = u * 0.8 ** torch.arange(64) @ vh
    for _ in range(2):
        layer.base.grad = g.clone() if layer.base.requires_grad else None
        layer.B.grad = torch.ones_like(layer.B)
        optimizer.step()
    w = layer.dense().detach()
    layer.base.grad, layer.B.grad = g.clone(), torch.ones_like(layer.B)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    p = layer.P.unpack() if layer.right_singular else layer.P.unpack().T
    rows = g if layer.right_singular else g.T
    captured = (rows @ torch.linalg.pinv(p) @ p).square().sum() / g.square().sum()
    best = torch.linalg.svdvals(g)[:16].square().sum() / g.square().sum()
    assert captured == pytest.approx(float(best), abs=0.02)
    change = torch.linalg.norm(layer.dense() - w)
    assert change <= torch.linalg.norm(w - NF4Weight.quantize(w).unpack()) * math.sqrt(1 - 16 / 64) * 1.02


def test_evaluation_between_updates_has_no_side_effects():
    a, b = net(), net()
    ours, theirs = (LoQT(model, rank=4, lr=LR, update_proj_gap=2) for model in (a, b))
    for step in range(6):
        train(a, ours, 1, first=step)
        a.eval()
        for _ in range(3):
            a(batch(50)).sum()
        a.train()
        train(b, theirs, 1, first=step)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_nothing_of_a_conversion_is_lost_where_the_base_is_dense():
    plain, w = linear()
    assert torch.equal(QuantizedLinear(plain, 4, base="dense").dense(), w)


# -- refactorisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "r"), [(40, 24, 5), (24, 40, 5), (16, 16, 15), (30, 17, 1)])
def test_refactorisation_balances_and_equals_the_dense_form(m, n, r):
    b, a = torch.randn(m, r, dtype=torch.float64), 9 * torch.randn(r, n, dtype=torch.float64)
    nb, na = balance(b, a)
    torch.testing.assert_close(nb @ na, b @ a, rtol=0, atol=1e-12 * float((b @ a).abs().max()) * 10)
    torch.testing.assert_close(nb.norm(), na.norm())
    s = torch.diag(torch.linalg.svdvals(b @ a)[:r])
    torch.testing.assert_close(nb.T @ nb, s, rtol=0, atol=1e-10)
    torch.testing.assert_close(na @ na.T, s, rtol=0, atol=1e-10)
    for got, want in zip((nb, na), split(b @ a, r), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_a_layer_of_lower_rank_than_its_factors_is_balanced_too():
    b, a = torch.randn(20, 4, dtype=torch.float64), torch.randn(4, 17, dtype=torch.float64)
    b[:, 2:] = 0
    nb, na = balance(b, a)
    torch.testing.assert_close(nb @ na, b @ a, rtol=0, atol=1e-12)
    assert (nb[:, 2:].abs() < 1e-7).all()


def test_estimates_of_a_60m_llama_are_those_of_the_papers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, vocab_size=32000,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    for method, options, published in (
        (ReLoRA, {}, 0.307), (LowRankAdamW, {}, 0.257), (LoQT, {"base": "dense"}, 0.293),
    ):  # fmt: skip
        got = lowrank_optim.estimate_memory(
            model, method, rank=128, dtype=torch.bfloat16, state_dtype="bfloat16", **options
        )
        assert (got.weights + got.optimizer) / 1e9 == pytest.approx(published, abs=0.0015)
