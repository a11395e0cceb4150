"""SLTrain: W = s B A + S is composed when it is needed and never kept; its places are drawn once and for ever."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowrank_optim
from lowrank_optim import SLTrain, SparseLowRankLinear, ops
from lowrank_optim.layers import sparse
from tests.reference import sltrain as paper

SHAPES = [(37, 53), (53, 37), (40, 40), (17, 130)]
INITS = ["random", "spectral"]


def layer(m=37, n=53, rank=6, dtype=torch.float32, bias=True, **options) -> SparseLowRankLinear:
    """With every factor away from zero."""
    made = SparseLowRankLinear(nn.Linear(n, m, bias=bias, dtype=dtype), rank, **{"density": 0.1, **options})
    nn.init.normal_(made.B, std=0.2)
    return made


def gathered_in_pieces(monkeypatch, piece, sampled=False):
    """Pieces of the dense gradient, of so many elements; or computed at the entries, at any density."""
    monkeypatch.setattr(sparse, "_PIECE", piece)
    monkeypatch.setattr(sparse, "_SPARSE", 1.0 if sampled else 0.0)


def model(m=37, n=53, bias=False, dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(n, m, bias=bias, dtype=dtype), nn.Tanh(), nn.Linear(m, n, bias=bias, dtype=dtype))


def train(net, opt, steps, start=0):
    p = next(net.parameters())
    for step in range(start, start + steps):
        torch.manual_seed(step)
        x = torch.randn(8, net[0].in_features).to(p.dtype)
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()


def state_of(net, opt) -> list[torch.Tensor]:
    kept = [tensor for state in opt.state.values() for tensor in state.values()]
    return [x.detach().clone() for x in [*net.state_dict().values(), *kept]]


def equal(one, other) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True)
    )


# -- the layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_support_is_sorted_unique_and_of_the_exact_size(m, n):
    for density in (0.01, 0.03, 0.37, 0.8, 1.0):
        support = layer(m, n, density=density).support
        assert support.dtype == torch.int32
        assert len(support) == int(density * m * n)
        assert bool((support.diff() > 0).all())
        assert int(support[0]) >= 0
        assert int(support[-1]) < m * n


def test_the_support_follows_from_seed_and_name_and_from_nothing_else():
    before = torch.get_rng_state()
    first = layer(name="a", seed=3).support
    torch.set_rng_state(before)
    plain = nn.Linear(53, 37)
    state = torch.get_rng_state()
    again = SparseLowRankLinear(plain, 9, density=0.1, name="a", seed=3).support
    assert torch.equal(torch.get_rng_state(), state), "torch's generator is not touched"
    assert torch.equal(first, again)
    assert torch.equal(first, layer(name="module._orig_mod.a", seed=3).support), "wrappers do not matter"
    assert not torch.equal(first, layer(name="b", seed=3).support)
    assert not torch.equal(first, layer(name="a", seed=4).support)


def test_the_support_is_the_same_in_any_run():
    assert layer(name="a", seed=3).support[:6].tolist() == [3, 13, 37, 45, 67, 78]


def test_every_place_is_as_likely_as_any_other():
    for count in (3, 7, 12):  # below and above half, where the others are drawn
        hits = torch.zeros(20)
        for key in range(1000):
            hits[ops.sample(20, count, key, (1, 2))] += 1
        spread = math.sqrt(1000 * count / 20 * (1 - count / 20))
        assert float((hits - 1000 * count / 20).abs().max()) < 4.5 * spread
    assert ops.sample(5, 0, 1, (1, 2)).tolist() == []
    assert ops.sample(5, 5, 1, (1, 2)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_random_gives_the_sparse_part_alone(m, n, bias):
    made = SparseLowRankLinear(nn.Linear(n, m, bias=bias), 5, init="random", name="a")
    x = torch.randn(4, n)
    w = torch.zeros(m * n)
    w[made.support] = made.values.detach()
    assert torch.equal(made(x), linear(x, w.view(m, n), made.bias))
    assert 0.5 / math.sqrt(n) < float(made.values.detach().abs().max()) <= 1 / math.sqrt(n)
    assert 0.9 / math.sqrt(n) < float(made.A.detach().abs().max()) <= 1 / math.sqrt(n)
    assert not made.B.any()


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_spectral_is_the_best_product_and_exact_at_the_support(m, n):
    plain = nn.Linear(n, m, dtype=torch.float64)
    made = SparseLowRankLinear(plain, 5, init="spectral", density=0.2)
    w, (u, s, vt) = plain.weight.detach(), torch.linalg.svd(plain.weight.detach(), full_matrices=False)
    best = (u[:, :5] * s[:5]) @ vt[:5]
    torch.testing.assert_close(made.scale * made.B @ made.A, best, atol=1e-13, rtol=0)
    torch.testing.assert_close(made.scale * made.B.T @ made.B, torch.diag(s[:5]), atol=1e-13, rtol=0)
    torch.testing.assert_close(made.scale * made.A @ made.A.T, torch.diag(s[:5]), atol=1e-13, rtol=0)
    outside = torch.ones(m * n, dtype=torch.bool)
    outside[made.support] = False
    got = made.weight.detach().flatten()
    torch.testing.assert_close(got[~outside], w.flatten()[~outside], atol=1e-14, rtol=0)
    torch.testing.assert_close(got[outside], best.flatten()[outside], atol=1e-13, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,), (2, 0), (300,)])
@pytest.mark.parametrize("way", ["sampled", "gathered", "whole"])
def test_it_is_linear_in_the_dense_weight(monkeypatch, dtype, lead, way):
    gathered_in_pieces(monkeypatch, 7 * 53, way == "sampled")
    monkeypatch.setattr(sparse, "_whole_is_less", lambda *_: way == "whole")
    made, x = layer(dtype=dtype), torch.randn(*lead, 53).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    exact = copy.deepcopy(made).double()
    y, expected = made(x), linear(wide, exact.dense(), exact.bias)
    weights = torch.randn(y.shape).to(dtype)
    y.backward(weights)
    expected.backward(weights.double())
    eps = torch.finfo(dtype).eps
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, atol=20 * eps, rtol=4 * eps)
    for p, q in zip([x, *made.parameters()], [wide, *exact.parameters()], strict=True):
        assert p.grad.dtype == dtype
        size = float(q.grad.abs().max()) if q.numel() else 0
        torch.testing.assert_close(p.grad.double(), q.grad, atol=40 * eps * (1 + size), rtol=0)


@pytest.mark.parametrize("piece", [None, 1, 100, 1 << 22])
def test_gradcheck(monkeypatch, piece):
    gathered_in_pieces(monkeypatch, piece or 1, piece is None)
    made = layer(7, 11, 3, torch.float64)
    names = ["B", "A", "values", "bias"]

    def function(x, *params):
        return torch.func.functional_call(made, dict(zip(names, params, strict=True)), (x,))

    inputs = [torch.randn(2, 3, 11, dtype=torch.float64), *(getattr(made, name).detach() for name in names)]
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs])
    y = function(*inputs)
    (first,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("frozen", [("B",), ("A",), ("values",), ("B", "A"), ("B", "A", "values"), ("bias",)])
@pytest.mark.parametrize("of_x", [True, False])
def test_frozen_weights_get_no_gradient(frozen, of_x):
    whole = layer()
    part = copy.deepcopy(whole)
    for name in frozen:
        getattr(part, name).requires_grad_(False)
    inputs = torch.randn(4, 53)
    whole(inputs).square().sum().backward()
    x = inputs.clone().requires_grad_(of_x)
    y = part(x)
    if y.requires_grad:
        y.square().sum().backward()
    for name, p in part.named_parameters():
        assert (p.grad is None) == (name in frozen)
        assert p.grad is None or torch.equal(p.grad, getattr(whole, name).grad)
    assert (x.grad is not None) == of_x


def test_autocast():
    made = layer()
    x = torch.randn(4, 53, requires_grad=True)
    grads = []
    for inside in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = made(x)
            assert y.dtype == torch.bfloat16
            loss = y.float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append([p.grad for p in (x, *made.parameters())])
        x.grad = None
        made.zero_grad()
    assert all(grad.dtype == torch.float32 for grad in grads[0])
    assert equal(*grads)
    made(x).square().sum().backward()
    for rounded, p in zip(grads[0], (x, *made.parameters()), strict=True):
        torch.testing.assert_close(rounded, p.grad, atol=0.1 * float(p.grad.abs().max()), rtol=0)


def test_checkpointing_changes_nothing():
    made, x = layer(), torch.randn(4, 53, requires_grad=True)
    plain = torch.autograd.grad(made(x).square().sum(), [x, *made.parameters()])
    again = torch.autograd.grad(checkpoint(made, x, use_reentrant=False).square().sum(), [x, *made.parameters()])
    assert equal(plain, again)


def test_saved_for_backward_are_the_input_and_what_is_trained():
    made, x, saved = layer(64, 80), torch.randn(6, 80, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        made(x)
    kept = {t.data_ptr(): t.nbytes for t in saved}
    assert kept == {t.data_ptr(): t.nbytes for t in (x, made.B, made.A, made.values, made.support)}
    saved.clear()
    for name in made.factors:
        getattr(made, name).requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        made(x)
    assert not any(t.data_ptr() == x.data_ptr() for t in saved), "no gradient needs it then"


class Large(TorchDispatchMode):
    """Keeps every memory of at least so many elements that operations make, so that each is counted once."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.made = least, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() // out.itemsize >= self.least:
                self.made[out.untyped_storage().data_ptr()] = out
        return result


@pytest.mark.parametrize("of_x", [True, False])
@pytest.mark.parametrize("way", ["sampled", "gathered", "whole"])
def test_the_dense_gradient_never_exists(monkeypatch, of_x, way):
    m, n = 64, 80
    gathered_in_pieces(monkeypatch, 10 * n, way == "sampled")
    monkeypatch.setattr(sparse, "_whole_is_less", lambda *_: way == "whole")
    made, x = layer(m, n), torch.randn(6, n, requires_grad=of_x)
    y = made(x).sum()
    with Large(m * n) as watched:
        y.backward()
    assert len(watched.made) == of_x, "W, where the gradient of x needs it, and nothing else of that size"


@pytest.mark.parametrize("how", ["loaded", "assigned", "copied", "moved"])
def test_the_cuts_follow_the_support(monkeypatch, how):
    gathered_in_pieces(monkeypatch, 5 * 53)
    made, other = layer(name="a"), layer(name="b")
    x = torch.randn(4, 53)

    def gradient(one):
        one.zero_grad()
        one(x).square().sum().backward()
        return one.values.grad

    gradient(made)
    if how == "copied":
        made = pickle.loads(pickle.dumps(copy.deepcopy(made)))
        assert made._cuts is None, (
            "versions of a tensor are counted from the start in a copy, and could agree by chance"
        )
    made.load_state_dict(other.state_dict(), assign=how == "assigned")
    if how == "moved":
        made.support = made.support.clone()
    assert torch.equal(gradient(made), gradient(other))


@pytest.mark.parametrize(
    ("dtype", "density", "sampled"),
    [
        (torch.float32, 0.12, True),
        (torch.float32, 0.13, False),
        (torch.float64, 0.03, True),
        (torch.bfloat16, 0.03, False),
    ],
)
def test_products_are_sampled_where_that_is_less_work(monkeypatch, dtype, density, sampled):
    calls, own = [], ops.sampled_product
    monkeypatch.setattr(ops, "sampled_product", lambda *inputs: calls.append(1) or own(*inputs))
    layer(dtype=dtype, density=density)(torch.randn(4, 53, dtype=dtype)).sum().backward()
    assert bool(calls) == sampled


@pytest.mark.parametrize(
    ("tokens", "rank", "dtype", "less"),
    [
        (2, 6, torch.bfloat16, False),
        (300, 6, torch.float32, False),  # products at the entries alone are few
        (300, 6, torch.bfloat16, True),
        (300, 30, torch.float32, True),
        (300, 30, torch.bfloat16, True),
        (300, 1, torch.float64, False),
    ],
)
def test_gradients_come_from_the_whole_one_where_that_is_less_work(monkeypatch, tokens, rank, dtype, less):
    calls, own = [], sparse._from_whole
    monkeypatch.setattr(sparse, "_from_whole", lambda *inputs: calls.append(1) or own(*inputs))
    made = layer(rank=rank, dtype=dtype, density=0.02)
    made(torch.randn(tokens, 53).to(dtype)).sum().backward()
    assert bool(calls) == less


def test_a_support_that_is_not_in_order_is_refused():
    made = layer()
    made.support.copy_(made.support.flip(0))
    with pytest.raises(RuntimeError, match="positions must ascend from at least 0 to below 1961, none of them twice"):
        made(torch.randn(4, 53))


def test_meta_makes_no_memory():
    net = nn.Sequential(nn.Linear(4096, 11008, device="meta"), nn.Linear(11008, 4096, device="meta"))
    for init in INITS:
        twin = lowrank_optim.convert(copy.deepcopy(net), SparseLowRankLinear, rank=64, init=init)
        assert all(t.is_meta for t in [*twin.parameters(), *twin.buffers()])
        assert twin[0].values.shape == twin[0].support.shape == (int(0.03 * 4096 * 11008),)
        assert twin(torch.empty(2, 4096, device="meta")).shape == (2, 4096)


def test_a_state_dict_brings_its_own_support():
    saved = layer(name="a")
    buffer = io.BytesIO()
    torch.save(saved.state_dict(), buffer)
    buffer.seek(0)
    other = layer(name="b")
    x = torch.randn(4, 53)
    other(x).sum().backward()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.support, saved.support)
    assert torch.equal(other(x), saved(x))


def test_refused():
    plain = nn.Linear(53, 37)
    for density in (-0.1, 1.1, math.nan, "3%"):
        with pytest.raises(ValueError, match="density must be a number"):
            SparseLowRankLinear(plain, 4, density=density)
    for density in (0, 0.0005):
        with pytest.raises(ValueError, match=r"block.q \(37, 53\) has no entries at density .*take a higher density"):
            SparseLowRankLinear(plain, 4, density=density, name="block.q")
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 100))
    before = list(net)
    with pytest.raises(ValueError, match=r"0 \(16, 16\) has no entries at density 0.003"):
        SLTrain(net, density=0.003)
    assert list(net) == before, "nothing was converted"
    for options in ({"density": 2}, {"init": "svd"}, {"alpha": 0}, {"refactor_every": 0}, {"reset_every": 0.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SLTrain(model(), **options)


# -- the method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    "restarts", [{}, {"refactor_every": 3}, {"reset_every": 4}, {"refactor_every": 2, "reset_every": 3}]
)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_engine_is_the_reference(monkeypatch, m, n, restarts, init, dtype):
    gathered_in_pieces(monkeypatch, 6 * n, sampled=dtype == torch.float32)
    net = nn.Sequential(nn.Linear(n, m, bias=False, dtype=dtype))
    with torch.no_grad():  # singular values apart, since the vectors of close ones are a matter of rounding
        u, _, vt = torch.linalg.svd(net[0].weight, full_matrices=False)
        net[0].weight.copy_((u * 8 * 0.5 ** torch.arange(min(m, n))) @ vt)
    numbers = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "alpha": 12.0, **restarts}
    # With a small eps the signs of tiny gradients decide, which rounding flips.
    numbers["eps"] = 1e-6 if dtype == torch.float64 else 1e-2
    opt = SLTrain(net, rank=5, density=0.07, init=init, **numbers)
    batches = [(torch.randn(30, n).to(dtype), torch.randn(30, m).to(dtype)) for _ in range(10)]
    own = net[0]
    start = [x.detach().to(torch.float64, copy=True) for x in (own.B, own.A, own.values)]
    for x, target in batches:
        opt.zero_grad()
        (net(x) - target).square().mean().backward()
        opt.step()
    # In float64 throughout: the whole SVD that the reference takes errs more in float32 than what it is to check.
    batches = [(x.double(), target.double()) for x, target in batches]
    expected = paper.sltrain(*start, own.support.long(), batches, **numbers)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    whole = paper.dense(*expected, own.support.long(), own.scale)
    torch.testing.assert_close(own.dense().detach().double(), whole, atol=tolerance, rtol=tolerance)
    for got, want in zip((own.B, own.A, own.values), expected, strict=True):
        torch.testing.assert_close(got.detach().double(), want, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_refactoring_leaves_the_function(dtype):
    made = layer(dtype=dtype)
    before, values = made.dense().detach(), made.values.detach().clone()
    made.balance_()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(made.dense().detach(), before, atol=8 * eps * float(before.abs().max()), rtol=0)
    assert torch.equal(made.values, values)
    torch.testing.assert_close(made.B.T @ made.B, made.A @ made.A.T, atol=20 * eps * before.norm().item(), rtol=0)


@pytest.mark.parametrize("refactor", [None, 3])
def test_the_first_update_after_a_reset_is_not_longer_than_lr(refactor):
    net = model()
    opt = SLTrain(net, lr=1e-2, rank=8, density=0.1, refactor_every=refactor, reset_every=3)
    train(net, opt, 3)
    assert opt.stats()["restarts"] == 2
    assert opt.stats()["state_reset"] == 1
    before = [p.detach().clone() for p in net.parameters()]
    train(net, opt, 1, start=3)
    for p, old in zip(net.parameters(), before, strict=True):
        assert 0.5e-2 < float((p.detach() - old).abs().max()) <= 1.05e-2


def test_only_the_product_is_refactored_and_all_is_reset():
    net = model()
    opt = SLTrain(net, lr=1e-2, rank=8, density=0.1, refactor_every=2)
    train(net, opt, 2)
    kept = [opt.state[p]["exp_avg"].clone() for p in net[0].parameters()]
    assert all(bool(x.any()) for x in kept), "moments outlive a refactorisation"
    torch.testing.assert_close(net[0].B.T @ net[0].B, net[0].A @ net[0].A.T, atol=1e-5, rtol=0)
    opt.reset(net[0])
    assert not any(bool(opt.state[p]["exp_avg"].any()) for p in net[0].parameters())


@pytest.mark.parametrize("stop", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.bfloat16, "int8"), (torch.float32, "int8")],
)
def test_a_loaded_run_resumes_bit_for_bit(stop, dtype, state_dtype):
    options = {"lr": 1e-2, "rank": 48, "state_dtype": state_dtype, "refactor_every": 3, "reset_every": 4}

    def made(seed=0):
        net = model(96, 128, bias=True, dtype=dtype)
        return net, SLTrain(net, seed=seed, **options)

    net, opt = made()
    train(net, opt, stop)
    buffer = io.BytesIO()
    torch.save((net.state_dict(), opt.state_dict()), buffer)
    buffer.seek(0)
    train(net, opt, 5, start=stop)
    again, resumed = made()
    train(again, resumed, 1)
    weights, state = torch.load(buffer, weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(again, resumed, 5, start=stop)
    assert equal(state_of(net, opt), state_of(again, resumed))


def test_a_run_resumes_with_the_support_that_was_saved():
    first, second = model(), model()
    opt, other = SLTrain(first, lr=1e-2, seed=1), SLTrain(second, lr=1e-2, seed=2)
    train(first, opt, 2)
    train(second, other, 2)
    assert not torch.equal(first[0].support, second[0].support)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(opt.state_dict())
    train(first, opt, 3, start=2)
    train(second, other, 3, start=2)
    assert equal(state_of(first, opt), state_of(second, other))


def test_tied_layers_share_their_factors():
    net = model(40, 40, bias=True)
    net[2].weight = net[0].weight
    biases = net[0].bias, net[2].bias
    opt = SLTrain(net, lr=1e-2, rank=8, refactor_every=2, reset_every=3)
    assert net[0].B is net[2].B
    assert net[0].values is net[2].values
    assert (net[0].bias, net[2].bias) == biases
    train(net, opt, 7)
    x = torch.randn(3, 40)
    w = net[0].dense()
    torch.testing.assert_close(net(x), linear(linear(x, w, net[0].bias).tanh(), w, net[2].bias))
    assert len(opt.report()) == 3
    lowrank_optim.merge(net)
    assert net[0].weight is net[2].weight


def test_it_trains_reports_and_merges():
    net = model(bias=True)
    opt = SLTrain(net, lr=1e-2, rank=8, density=0.05, refactor_every=5, reset_every=5)
    x = torch.randn(16, 53)
    first = net(x).square().mean().item()
    train(net, opt, 30)
    assert net(x).square().mean().item() < 0.5 * first
    row = opt.report()[0]
    assert (row.name, row.shape, row.method, row.rank) == ("0", (37, 53), "SLTrain", 8)
    assert row.reason == "5.0 % sparse, 6 restarts"
    trained = 8 * (37 + 53) + int(0.05 * 37 * 53)
    counters = sum(t.nbytes for p in (net[0].B, net[0].A, net[0].values) for t in opt.state[p].values() if not t.dim())
    assert row.state_bytes == 8 * trained + counters
    before = net(x)
    merged = lowrank_optim.merge(net)
    assert all(type(one) is nn.Linear for one in (merged[0], merged[2]))
    torch.testing.assert_close(merged(x), before, atol=1e-6, rtol=1e-5)


def test_gradients_that_are_not_finite_are_left_out():
    net = model()
    opt = SLTrain(net, lr=1e-2, rank=8, refactor_every=2, reset_every=2)
    train(net, opt, 1)
    before = [p.detach().clone() for p in net[0].parameters()]
    net(torch.randn(4, 53)).square().mean().backward()
    for p in net[0].parameters():
        p.grad.fill_(math.nan)
    with pytest.warns(UserWarning, match="non-finite gradient"):
        opt.step()
    assert opt.report()[0].skipped == 1
    torch.testing.assert_close(net[0].values, before[2], atol=0, rtol=0)
    assert all(bool(p.isfinite().all()) for p in net.parameters())
