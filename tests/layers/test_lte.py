"""LTE: the plain loop, identities of the method, one head per process, what any weight-space method promises."""

from __future__ import annotations

import copy
import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lowrank_optim import LTE, Int8Weight, LowRankLinear, MultiHeadLinear, ReLoRA, convert, merge
from tests.reference.lte import lte

BATCH = 8
SHAPES = [(24, 40), (40, 24), (17, 17), (33, 21)]  # (m, n): wide, tall, odd
OPTIONS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "rank": 3, "include": ["."]}


class Tied(nn.Module):
    """Two layers of one weight, each with a bias of its own, a norm, and one layer without a bias."""

    def __init__(self, width=16, hidden=24):
        super().__init__()
        self.up, self.norm = nn.Linear(width, hidden), nn.LayerNorm(hidden)
        self.first, self.second = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.second.weight = self.first.weight
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        x = self.norm(self.up(x).tanh())
        return self.down(x + self.second(self.first(x).tanh()))


def one_layer(shape, dtype=torch.float64, bias=False):
    return nn.Sequential(nn.Linear(shape[1], shape[0], bias=bias)).to(dtype)


def data(step, width=16, dtype=torch.float64, batch=BATCH):
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(batch, 3, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), y.to(dtype)


def pairs(shape, steps, dtype=torch.float64):
    """Inputs and targets of one layer."""
    made = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(BATCH, k, generator=generator, dtype=torch.float64) for k in (shape[1], shape[0]))
        made.append((x.to(dtype), y.to(dtype)))
    return made


def train(model, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def evaluated(model, x):
    was = model.training
    with torch.no_grad():
        y = model.eval()(x)
    model.train(was)
    return y


def error(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1))


# -- the method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])  # 1.2e-6: 12 seeds
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("heads", "reset"), [(4, "keep"), (2, "drop"), (1, "keep")])
def test_is_the_reference(shape, heads, reset, dtype, limit):
    options = {**OPTIONS, "eps": 1e-3}  # smaller, and Adam blows up what rounding leaves of gradients near zero
    model, batches = one_layer(shape, dtype), pairs(shape, 11, dtype)
    weight = model[0].weight.detach().clone()
    optimizer = LTE(model, heads=heads, reset=reset, merge_every=3, alpha=4.0, **options)
    numbers = {key: options[key] for key in ("lr", "betas", "eps", "weight_decay")}
    start = model[0].A.detach().clone()
    loss = nn.functional.mse_loss
    w, b, a, seen = lte(weight, start, batches, loss, alpha=4.0, merge_every=3, reset=reset, **numbers)
    for (x, y), expected in zip(batches, seen, strict=True):
        train(model, optimizer, [(x, y)])
        assert error(model[0].dense(), expected) < limit
        assert error(evaluated(model, x), x @ expected.T) < limit
    assert error(model[0].base, w) < limit
    assert error(model[0].A, a) < limit
    assert error(model[0].B, b) < limit


def test_merged_at_every_update_it_is_a_sum_of_heads_by_their_number():
    """The other layer of the authors: all heads on all of the input, here with what is their mean and not their sum."""
    shape, heads = (24, 40), 4
    model, batches = one_layer(shape), pairs(shape, 6)
    weight = model[0].weight.detach().clone()
    optimizer = LTE(model, heads=heads, merge_every=1, **{**OPTIONS, "eps": 1e-30})
    layer, s = model[0], model[0].scale
    a, b = (torch.nn.Parameter(p.detach().clone()) for p in (layer.A, layer.B))
    plain = torch.optim.AdamW([b, a], lr=0.02, betas=(0.8, 0.95), eps=1e-30, weight_decay=0.1)
    for x, y in batches:
        train(model, optimizer, [(x, y)])
        # each head's gradient comes from its part alone, at the weight that all of them share
        plain.zero_grad()
        common = (weight + s / heads * (b.detach() @ a.detach()).sum(0)).expand(heads, *shape)
        own = common + s * (b @ a - (b @ a).detach())
        out = torch.cat([part @ own[h].T for h, part in enumerate(x.chunk(heads))])
        nn.functional.mse_loss(out, y).backward()
        plain.step()
        assert error(layer.dense(), weight + s / heads * (b @ a).sum(0)) < 1e-12


def test_one_head_merged_at_every_update_is_lora():
    shape = (24, 40)
    model, batches = one_layer(shape), pairs(shape, 8)
    twin = copy.deepcopy(model)
    optimizer = LTE(model, heads=1, merge_every=1, alpha=6.0, **OPTIONS)
    convert(twin, LowRankLinear, rank=3, alpha=6.0, include=["."])
    with torch.no_grad():
        twin[0].A.copy_(model[0].A[0])
    plain = torch.optim.AdamW([twin[0].B, twin[0].A], lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    train(model, optimizer, batches)
    train(twin, plain, batches)
    assert error(model[0].A[0], twin[0].A) < 1e-12
    assert error(model[0].dense(), twin[0].dense()) < 1e-12


def test_the_weight_is_the_first_one_plus_the_mean_of_what_was_merged():
    model = Tied().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = LTE(model, heads=4, merge_every=2, **OPTIONS)
    for step in range(9):
        train(model, optimizer, [data(step)])
        for name in ("up", "first", "down"):
            layer = getattr(model, name)
            mean = layer.scale * (layer.B_merged @ layer.A_merged).mean(0)
            assert error(layer.base, before[f"{name}.weight"] + mean) < 1e-12
            if step % 2:
                assert torch.equal(layer.B, layer.B_merged)
                assert (
                    error(layer.dense(), before[f"{name}.weight"] + layer.scale * (layer.B @ layer.A).mean(0)) < 1e-12
                )
    assert optimizer.stats()["restarts"] == 3 * 4  # the twins are one layer


def test_heads_see_their_own_part():
    """After a merge head h has W, without what it put there, and with what it is now."""
    model, (x, _) = one_layer((24, 40), bias=True), pairs((24, 40), 1)[0]
    train(model, LTE(model, heads=4, merge_every=3, **OPTIONS), pairs((24, 40), 5))
    layer = model[0]
    for h, (part, y) in enumerate(zip(x.chunk(4), model(x).chunk(4), strict=True)):
        own = layer.base + layer.scale * (layer.B[h] @ layer.A[h] - layer.B_merged[h] @ layer.A_merged[h])
        assert error(y, part @ own.T + layer.bias) < 1e-12


def test_a_is_semi_orthogonal_and_differs_between_heads_layers_and_seeds():
    for shape in SHAPES:
        (m, n), plain = shape, one_layer(shape)[0]
        for init, length in (("code", n / 5), ("paper", m / n)):
            a = MultiHeadLinear(plain, 5, heads=3, init=init, name="layer").A
            assert error(a @ a.mT, length * torch.eye(5, dtype=a.dtype).expand(3, 5, 5)) < 1e-12
        first, second = (
            MultiHeadLinear(plain, 5, heads=3, name=name, seed=seed).A for name, seed in (("x", 0), ("x", 1))
        )
        assert not torch.isclose(first, second).any()
        assert not torch.isclose(first[0], first[1]).any()
        assert not torch.isclose(first, MultiHeadLinear(plain, 5, heads=3, name="y").A).any()


def test_an_update_moves_a_head_by_scale_times_lr():
    """Why alpha is twice the rank: at any rank, four heads then move W as AdamW does."""
    for rank in (2, 8, 16):
        model = one_layer((64, 96))
        optimizer = LTE(model, lr=1e-3, rank=rank, heads=4, include=["."])
        before = model[0].dense().detach().clone()
        train(model, optimizer, pairs((64, 96), 1))
        per_head = (model[0].scale * model[0].B @ model[0].A).pow(2).mean((1, 2)).sqrt()
        assert torch.allclose(per_head, torch.full_like(per_head, 2e-3), rtol=0.1)
        assert 0.8e-3 < float((model[0].dense() - before).detach().pow(2).mean().sqrt()) < 1.6e-3


# -- the function ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.0)])
def test_conversion_leaves_the_function_alone(dtype, limit):
    model, x = Tied().to(dtype), data(0, dtype=dtype)[0]
    expected = model(x)
    LTE(model, heads=4, **OPTIONS)
    assert isinstance(model.first, MultiHeadLinear)
    assert model.first.A is model.second.A
    assert model.first.B_merged is model.second.B_merged
    assert error(model(x), expected) <= limit
    assert error(evaluated(model, x), expected) <= limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_merges_leave_evaluation_alone(dtype, limit):
    model, x = Tied().to(dtype), data(99, dtype=dtype)[0]
    optimizer = LTE(model, heads=2, merge_every=4, **OPTIONS)
    train(model, optimizer, [data(step, dtype=dtype) for step in range(7)])
    before = evaluated(model, x)
    optimizer.merge_now()
    assert error(evaluated(model, x), before) < limit
    again = [p.clone() for p in model.parameters()]
    optimizer.merge_now()  # there is nothing new
    assert all(torch.equal(a, b) for a, b in zip(again, model.parameters(), strict=True))
    merge(model)
    assert type(model.first) is nn.Linear
    assert model.first.weight is model.second.weight
    assert error(evaluated(model, x), before) < limit


def test_a_merge_in_bfloat16_rounds_once_and_right_on_average():
    layer = MultiHeadLinear(nn.Linear(64, 48).bfloat16(), 4, heads=2, name="x")
    with torch.no_grad():
        layer.B.normal_(0, 1e-3)
    exact, start = layer.dense().clone(), copy.deepcopy(layer.state_dict())
    ulp = exact.abs() * 2.0**-7
    total = torch.zeros_like(exact)
    for count in range(200):
        layer.load_state_dict(start)
        layer.merge_(count)
        assert ((layer.base.float() - exact).abs() <= ulp).all()
        total += layer.base.float()
    assert ((total / 200 - exact).abs() <= 0.3 * ulp).all()
    assert not torch.equal(layer.base, exact.bfloat16())
    layer.load_state_dict(start)
    layer.merge_(0, stochastic=False)
    assert torch.equal(layer.base, exact.bfloat16())


def test_merges_of_float32_masters_are_of_what_the_forward_pass_sees():
    """Under DeepSpeed in bfloat16: heads take back rounded factors, so these are what is merged."""
    torch.manual_seed(0)
    rounded, trained = (MultiHeadLinear(nn.Linear(24, 37, dtype=torch.bfloat16), 4, heads=2, name="w") for _ in "ab")
    trained.load_state_dict(rounded.state_dict())
    for key in rounded.factors:
        master = torch.randn_like(getattr(rounded, key), dtype=torch.float32) / 8
        getattr(rounded, key).data.copy_(master)
        trained._parameters[key] = master
    for layer in (rounded, trained):
        layer.merge_(1)
    for key in ("base", "B_merged", "A_merged"):
        assert torch.equal(getattr(rounded, key), getattr(trained, key)), key


@pytest.mark.parametrize(("how", "share"), [("stochastic", 1.0), ("kahan", 1.0), ("none", 0.0)])
def test_merges_below_the_last_bit_add_up(how, share):
    model, batches = one_layer((48, 64), torch.bfloat16), pairs((48, 64), 1, torch.bfloat16)
    weight = model[0].weight.detach().double()
    options = {"lr": 3e-5, "rank": 16, "include": ["."], "merge_every": 1, "bf16_update": how}
    train(model, LTE(model, heads=2, **options), batches * 60)
    layer = model[0]
    learned = layer.scale * (layer.B_merged.double() @ layer.A_merged.double()).mean(0).detach()
    arrived = ((layer.base.double() - weight) * learned).sum() / learned.pow(2).sum()
    assert abs(float(arrived) - share) < 0.35


def test_an_int8_base():
    model = Tied().double()
    weight = model.up.weight.detach().clone()
    optimizer = LTE(model, base="int8", heads=4, merge_every=3, **OPTIONS)
    assert isinstance(model.up.base, Int8Weight)
    assert error(model.up.dense(), weight) < 0.01
    x = data(99)[0]
    train(model, optimizer, [data(step) for step in range(8)])
    before, grid = evaluated(model, x), float(model.up.base.scale.max())
    expected = model.up.dense()
    optimizer.merge_now()
    assert (model.up.dense() - expected).abs().max() <= 1.2 * grid
    assert error(evaluated(model, x), before) < 0.05


@pytest.mark.parametrize("shape", [(8, 16), (8, 3, 16), (8, 2, 5, 16), (0, 16)])
def test_any_number_of_leading_dimensions(shape):
    torch.manual_seed(1)
    layer = MultiHeadLinear(nn.Linear(16, 24).double(), 3, heads=4)
    with torch.no_grad():
        layer.B.normal_()
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (*shape[:-1], 24)
    own = layer.base + layer.scale * layer.B @ layer.A
    expected = torch.cat(
        [part @ own[h].T for h, part in enumerate(x.split(max(1, shape[0] // 4)))] if shape[0] else [y]
    )
    assert torch.allclose(y, expected + layer.bias * bool(shape[0]), rtol=0, atol=1e-12)
    assert layer.eval()(x).shape == y.shape


@pytest.mark.parametrize("shape", [(6, 16), (16,), (6, 4, 16)])
def test_a_batch_that_heads_do_not_divide(shape):
    layer = MultiHeadLinear(nn.Linear(16, 24), 3, heads=4)
    with pytest.raises(ValueError, match=r"must be a batch that 4 heads divide.*drop_last"):
        layer(torch.randn(shape))
    assert layer.eval()(torch.randn(shape)).shape == (*shape[:-1], 24)
    assert MultiHeadLinear(nn.Linear(16, 24), 3, heads=1)(torch.randn(shape)).shape == (*shape[:-1], 24)


@pytest.mark.parametrize("rows", [1, 3, 400])  # few go through thin factors, for many what was learned is composed
@pytest.mark.parametrize("heads", [1, 4])
def test_evaluation_is_the_dense_weight(rows, heads):
    layer = MultiHeadLinear(nn.Linear(40, 24).double(), 5, heads=heads)
    with torch.no_grad():
        for p in (layer.B, layer.A_merged, layer.B_merged):
            p.normal_()
    x = torch.randn(rows, 40, dtype=torch.float64)
    assert error(layer.eval()(x), x @ layer.dense().T + layer.bias) < 1e-12
    assert torch.equal(layer.weight, layer.dense())


@pytest.mark.slow
def test_it_compiles_without_a_break():
    layer = MultiHeadLinear(nn.Linear(40, 24), 5, heads=4)
    compiled, x = torch.compile(layer, fullgraph=True, backend="eager"), torch.randn(8, 40)
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(compiled.eval()(x), layer(x))


def test_evaluation_has_no_side_effects():
    model = Tied()
    optimizer = LTE(model, heads=4, merge_every=3, **OPTIONS)
    train(model, optimizer, [data(step, dtype=torch.float32) for step in range(4)])
    before = [p.clone() for p in model.parameters()]
    model(data(0, dtype=torch.float32)[0])  # neither has a forward in training
    for _ in range(3):
        evaluated(model, data(0, dtype=torch.float32)[0])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_activation_checkpointing_and_autocast():
    model, (x, y) = Tied().double(), data(0)
    train(model, LTE(model, heads=4, merge_every=2, **OPTIONS), [data(step) for step in range(5)])
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        nn.functional.mse_loss(run(x), y).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    model.float()
    expected = model(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x.float())
        assert error(got.float(), expected) < 0.05
        assert error(evaluated(model, x.float()).float(), evaluated(model.float(), x.float())) < 0.05


# -- the optimizer -----------------------------------------------------------------------------------------------------


def test_updates_are_counted_and_not_micro_batches():
    whole, parts = Tied().double(), None
    parts = copy.deepcopy(whole)
    one, two = (LTE(model, heads=2, merge_every=3, **OPTIONS) for model in (whole, parts))
    for step in range(7):
        x, y = data(step)
        # the halves of each head's part, so that heads see the same examples
        order = torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])
        train(whole, one, [(x, y)])
        two.zero_grad()
        for index in order:
            (nn.functional.mse_loss(parts(x[index]), y[index]) / 2).backward()
        two.step()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert error(a, b) < 1e-10
    assert two.stats()["restarts"] == 3 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["dense", "int8"])
@pytest.mark.parametrize("at", [2, 3, 5])  # before a merge, right after it, in between
def test_a_loaded_run_continues_bit_for_bit(dtype, base, at, tmp_path):
    options = {**OPTIONS, "heads": 4, "merge_every": 3, "base": base, "state_dtype": "bfloat16", "reset": "drop"}
    model = Tied().to(dtype)
    optimizer = LTE(model, **options)
    train(model, optimizer, [data(step, dtype=dtype) for step in range(at)])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    torch.manual_seed(7)
    fresh = Tied().to(dtype)
    other = LTE(fresh, **options)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    fresh.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    rest = [data(step, dtype=dtype) for step in range(at, at + 5)]
    train(model, optimizer, rest)
    train(fresh, other, rest)
    for (name, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a.detach(), b.detach()), name
    assert optimizer.stats() == other.stats()


def test_a_bad_gradient_does_not_move_the_merges():
    model = Tied().double()
    optimizer = LTE(model, heads=4, merge_every=3, **OPTIONS)
    for step in range(6):
        x, y = data(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        if step == 1:
            model.up.B.grad[0, 0, 0] = torch.nan
            with pytest.warns(UserWarning, match="non-finite"):
                optimizer.step()
        else:
            optimizer.step()
    assert optimizer.stats() == {"restarts": 6.0, "state_reset": 0.0, "skipped_gradients": 1.0}
    assert torch.equal(model.up.B, model.up.B_merged)


def test_options_that_mean_nothing():
    for options, message in [
        ({"heads": 0}, "heads must be an int >= 1"),
        ({"heads": "rank"}, 'heads must be an int >= 1 or "ranks"'),
        ({"heads": "ranks"}, "init_process_group"),
        ({"merge_every": 0}, "merge_every must be an int >= 1"),
        ({"alpha": 0}, "alpha must be a number > 0"),
        ({"base": "none"}, "base must be one of"),
        ({"init": "random"}, "init must be one of 'code', 'paper'"),
        ({"reset": "magnitude"}, "reset must be one of 'keep', 'drop'"),
    ]:
        model = Tied()
        with pytest.raises(ValueError, match=message):
            LTE(model, rank=3, **options)
        assert type(model.up) is nn.Linear
    with pytest.raises(ValueError, match="alpha must be one number"):
        ReLoRA(Tied(), rank=3, alpha=None)


def test_the_report():
    model = Tied()
    row = LTE(model, rank=3, heads=4).report()[0]
    assert (row.name, row.rank, row.reason) == ("up", 3, "dense base, 4 heads")
    assert row.state_bytes >= 2 * 4 * model.up.A.numel()
    assert repr(model.up).endswith("rank=3, dense base, 4 heads)")


# -- one head per process ----------------------------------------------------------------------------------------------

RANKS = {"heads": "ranks", "merge_every": 3, "lr": 0.02, "rank": 3, "eps": 1e-30}
STEPS = 8


class Some(Tied):
    """A layer that not every batch reaches."""

    def __init__(self):
        super().__init__()
        self.rarely = nn.Linear(16, 16)

    def forward(self, x, reach=True):
        y = super().forward(x)
        return y + self.rarely(x) if reach else y


def parts(rank, world, start, stop):
    return [tuple(one.chunk(world)[rank] for one in data(step)) for step in range(start, stop)]


def scenario_equal(rank, world):
    """Emulated heads, given the same examples."""
    torch.manual_seed(0)
    model = Tied().double()
    optimizer = LTE(model, **RANKS)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if rank and name.split(".")[-1][0] not in "AB":
                p.add_(1)
    ddp = DistributedDataParallel(model)  # sends what rank 0 has, of all but the heads
    train(ddp, optimizer, parts(rank, world, 0, STEPS))
    between = model.up.dense().detach().clone()
    try:
        merge(model)
    except RuntimeError as refused:
        assert "merge_now" in str(refused)  # noqa: PT017
    optimizer.merge_now()
    return {"between": between, "state": model.state_dict(), "report": optimizer.report()[0].reason}


def scenario_resumed(rank, world):
    """Each rank resumes from its own file."""
    runs = []
    for cut in (5, None):
        torch.manual_seed(0)
        model = Tied()
        optimizer = LTE(model, **RANKS)
        for start, stop in ((0, 5), (5, STEPS)):
            batches = [tuple(one.float() for one in pair) for pair in parts(rank, world, start, stop)]
            train(DistributedDataParallel(model), optimizer, batches)
            if stop == cut:
                saved = model.state_dict(), optimizer.state_dict()
                torch.manual_seed(rank + 1)
                model = Tied()
                optimizer = LTE(model, **RANKS)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
        runs.append(model.state_dict())
    return {"equal": [name for name, x in runs[0].items() if torch.equal(x, runs[1][name])], "all": list(runs[0])}


def scenario_dense(rank, world):
    """Rank so large that the dense product is less to send, in bfloat16, without DDP."""
    torch.manual_seed(0)
    model = Tied(64, 64).bfloat16()
    optimizer = LTE(model, **{**RANKS, "rank": 40})
    assert not model.up._gathers()
    batches = [data(step, 64, torch.bfloat16) for step in range(4)]
    train(model, optimizer, [tuple(one.chunk(world)[rank] for one in pair) for pair in batches])
    return {"state": {key: x for key, x in model.state_dict().items() if key.endswith(".base")}}


def scenario_trouble(rank, world):
    """One rank alone has a gradient that is not finite, a batch that misses a layer, and a first step of zeros."""
    torch.manual_seed(0)
    model = Some().double()
    optimizer = LTE(model, **RANKS, base="int8")
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(9):
        optimizer.zero_grad()
        x, y = (one.chunk(world)[rank] for one in data(step))
        with ddp.no_sync() if step == 0 else torch.enable_grad():
            loss = nn.functional.mse_loss(ddp(x, reach=not (rank == 1 and step in (2, 4))), y)
            (loss * (0 if rank == 1 and step == 0 else 1)).backward()
        if rank == 1 and step == 3:
            model.up.B.grad.fill_(torch.nan)
        if step == 0:
            for p in model.parameters():  # what is not averaged in this step must not part
                if p.grad is not None and not hasattr(p, "_ddp_ignored"):
                    p.grad = None
        optimizer.step()
    optimizer.merge_now()
    state = {key: x for key, x in model.state_dict().items() if "A" not in key and "B" not in key}
    counts = [optimizer._count(layer) for layer in optimizer.conversion.layers.values()]
    return {"state": state, "counts": counts, "skipped": optimizer.stats()["skipped_gradients"]}


def scenario_parted(rank, world):
    """Weights that differ from the start are found out; a GradScaler and capture are refused."""
    torch.manual_seed(rank)
    model = Tied().double()
    optimizer = LTE(model, **RANKS)
    raised = []
    try:
        train(model, optimizer, [data(step) for step in range(3)])
    except RuntimeError as error:
        raised.append(str(error))
    optimizer.grad_scale = torch.tensor(2.0)
    try:
        optimizer.step()
    except NotImplementedError as error:
        raised.append(str(error))
    try:
        LTE(Tied(), **RANKS, capturable=True)
    except ValueError as error:
        raised.append(str(error))
    return {"raised": raised}


def scenario_alone(rank, world):
    """Everything that is trained is converted: DDP has nothing to do, and says so."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False)).double()
    LTE(model, **RANKS, include=["."])
    try:
        DistributedDataParallel(model)
    except RuntimeError as error:
        return {"raised": str(error)}
    return {"raised": ""}


def worker(rank, world, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    for scenario in (
        scenario_equal,
        scenario_resumed,
        scenario_dense,
        scenario_trouble,
        scenario_parted,
        scenario_alone,
    ):
        torch.save(scenario(rank, world), f"{folder}/{scenario.__name__}.{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes made of each scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (2, port, str(folder)), nprocs=2)
    return lambda name: [torch.load(folder / f"scenario_{name}.{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
def test_one_head_per_rank_is_emulated_heads(ranks):
    torch.manual_seed(0)
    model = Tied().double()
    optimizer = LTE(model, **{**RANKS, "heads": 2})
    for layer in optimizer.conversion.layers.values():
        for p in (layer.A, layer.B):
            p.register_hook(lambda grad: 2 * grad)  # the mean over the batch, which is half a head's own
    train(model, optimizer, [data(step) for step in range(STEPS)])
    merged = model.up.base.detach().clone()
    optimizer.merge_now()
    mine, both = model.state_dict(), ranks("equal")
    for rank, one in enumerate(both):
        assert one["report"] == "dense base, one of 2 heads, 2 restarts"
        assert error(one["between"], merged) < 1e-12  # evaluation between merges is the last one
        for name, x in one["state"].items():
            apart = name.split(".")[-1][0] in "AB"
            assert error(x, mine[name][rank : rank + 1] if apart else mine[name]) < 1e-10, name
            assert apart or torch.equal(x, both[0]["state"][name]), name


@pytest.mark.slow
def test_ranks_resume_bit_for_bit(ranks):
    for one in ranks("resumed"):
        assert one["equal"] == one["all"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "trouble"])
def test_ranks_end_with_the_same_bits(name, ranks):
    first, second = ranks(name)
    for key, x in first["state"].items():
        assert torch.equal(x + 0, second["state"][key] + 0), key


@pytest.mark.slow
def test_trouble_on_one_rank_moves_no_merge(ranks):
    first, second = ranks("trouble")
    assert first["counts"] == second["counts"] == [9, 9, 9, 9]
    assert (first["skipped"], second["skipped"]) == (0, 1)


@pytest.mark.slow
def test_ranks_that_cannot_work_say_so(ranks):
    for one in ranks("parted"):
        differs, scaler, captured = one["raised"]
        assert "differs between ranks" in differs
        assert "GradScaler" in scaler
        assert "capturable" in captured
    for one in ranks("alone"):
        assert "not needed" in one["raised"]
