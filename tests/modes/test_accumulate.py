"""Compressed accumulation: what it gathers, what it gives back, and how it lives with optimizers and checkpoints."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

import lowrank_optim
import lowrank_optim.layers.quantized
from lowrank_optim import ops
from lowrank_optim.accumulate import CompressedAccumulation
from tests.cases import Net

RANK = 3
# shape, (matrices, m, n) with the shorter side m first, whether that is the second one
SHAPES = {
    "wide": ((8, 20), (1, 8, 20), False),
    "tall": ((20, 8), (1, 8, 20), True),
    "square": ((9, 9), (1, 9, 9), True),
    "conv": ((6, 4, 3, 3), (1, 6, 36), False),
    "experts": ((2, 10, 18), (2, 10, 18), False),
    "tall_experts": ((2, 18, 17), (2, 17, 18), True),
}
every_shape = pytest.mark.parametrize("kind", list(SHAPES))


def parameter(shape, dtype=torch.float64):
    return nn.Parameter(torch.randn(shape, dtype=dtype))


def push(p, grad):
    """A backward pass that gives p this gradient."""
    (p * grad).sum().backward()


def matrix(name, window, kind, seed=0, rank=RANK, orthonormal=False):
    """P by its definition, `(b, m, r)`."""
    shape, (count, m, _), _ = SHAPES[kind]
    size = (count, m, rank) if len(shape) == 3 else (m, rank)
    x = ops.normal(size, ops.key_of(seed, name), ops.stream_of("accumulate", window)).double().view(count, m, rank)
    if orthonormal:
        q, r = torch.linalg.qr(x)
        return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return x / math.sqrt(rank)


def turned(x, kind):
    _, (count, m, n), second = SHAPES[kind]
    return x.reshape(count, n, m).mT if second else x.reshape(count, m, n)


def back(x, kind):
    shape, _, second = SHAPES[kind]
    return (x.mT if second else x).reshape(shape)


def tokens(step):
    return torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(step))


def loss_of(model, step):
    batch = tokens(step)
    logits = model(batch[:, :-1]).double()
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def gathered(model, steps=3, first=0, **options):
    acc = CompressedAccumulation(model.named_parameters(), RANK, **options)
    for step in range(first, first + steps):
        loss_of(model, step).backward()
    return acc


@every_shape
@pytest.mark.parametrize("orthonormal", [False, True])
def test_it_equals_explicit_matrices(kind, orthonormal):
    p = parameter(SHAPES[kind][0])
    acc = CompressedAccumulation([("w", p)], RANK, seed=4, orthonormal=orthonormal)
    for window in range(2):
        grads = [torch.randn_like(p) for _ in range(3)]
        for grad in grads:
            push(p, grad)
            assert p.grad is None, "a whole gradient must not wait for the next micro-step"
        P = matrix("w", window, kind, 4, orthonormal=orthonormal)
        C = P.mT @ turned(sum(grads), kind)
        (buffer,) = acc.buffers()
        torch.testing.assert_close(buffer.view_as(C), C, rtol=0, atol=1e-12)
        acc.restore()
        torch.testing.assert_close(p.grad, back(P @ C, kind), rtol=0, atol=1e-12)
        assert p.grad.is_contiguous()
        assert acc.buffers() == []
        p.grad = None


@every_shape
def test_the_mean_over_many_seeds_is_the_gradient(kind):
    shape, (_, m, _), _ = SHAPES[kind]
    p, grad, total, energy, draws = parameter(shape), torch.randn(shape).double(), 0.0, 0.0, 800
    for seed in range(draws):
        acc = CompressedAccumulation([("w", p)], RANK, seed=seed)
        push(p, grad)
        acc.restore()
        total = total + p.grad
        energy += float(p.grad.square().sum() / grad.square().sum())
        p.grad = None
        acc.remove()
    spread = (grad.norm() * math.sqrt((m + 1) / RANK / draws)).item()  # of the mean, as a whole
    assert (total / draws - grad).norm() < 1.5 * spread
    assert (total / draws - grad).norm() < 0.15 * grad.norm()
    assert energy / draws == pytest.approx(1 + (m + 1) / RANK, rel=0.05)


def test_orthonormal_projects_and_keeps_its_share():
    p, shares = parameter((12, 12)), {1: [], 6: [], 11: []}
    for rank, share in shares.items():
        for seed in range(300):
            acc = CompressedAccumulation([("w", p)], rank, seed=seed, orthonormal=True)
            grad = torch.randn_like(p)
            push(p, grad)
            acc.restore()
            torch.testing.assert_close(
                (p.grad * (grad - p.grad)).sum().abs(), torch.zeros(()).double(), rtol=0, atol=1e-9
            )
            share.append(float(p.grad.square().sum() / grad.square().sum()))
            p.grad = None
            acc.remove()
        assert sum(share) / len(share) == pytest.approx(rank / 12, rel=0.05)


def test_a_gradient_within_the_subspace_comes_back_whole():
    p = parameter((8, 20))
    acc = CompressedAccumulation([("w", p)], RANK, orthonormal=True)
    grad = matrix("w", 0, "wide", orthonormal=True)[0] @ torch.randn(RANK, 20).double()
    push(p, grad)
    acc.restore()
    torch.testing.assert_close(p.grad, grad, rtol=0, atol=1e-12)


def test_a_model_with_every_kind_of_parameter():
    """Plain parameters accumulate bit for bit as before, the others as explicit matrices say; no generator moves."""
    models = [Net().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    state = torch.random.get_rng_state()
    acc = gathered(models[0])
    for step in range(3):
        loss_of(models[1], step).backward()
    rows = {row.name: row for row in acc.report()}
    assert {name for name, row in rows.items() if row.rank} == {
        "experts", "conv.weight", "up.weight", "down.weight", "square.weight"
    }  # fmt: skip
    acc.restore()
    assert torch.equal(state, torch.random.get_rng_state())
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if rows[name].rank is None:
            assert torch.equal(p.grad, q.grad), name
        else:
            m = rows[name].side == "right"
            g = q.grad if q.dim() == 3 and q.shape[-1] >= 16 else q.grad.flatten(1)
            g = g.mT if m else g
            P = ops.normal((*g.shape[:-1], RANK), ops.key_of(0, name), ops.stream_of("accumulate", 0)).double()
            want = P @ (P.mT @ g) / RANK
            torch.testing.assert_close(p.grad, (want.mT if m else want).reshape(q.shape), rtol=0, atol=1e-12)


def test_memory_between_micro_steps():
    model = Net()
    acc = gathered(model, 2)
    compressed = {row.name for row in acc.report() if row.rank}
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name in compressed), name
    # conv (12, 36), up (20, 12), down (12, 20), square (12, 12), experts 3 x (12, 18)
    assert acc.bytes == 4 * RANK * (36 + 20 + 20 + 12 + 3 * 18)
    kept = sum(tensor.nbytes for tensor in acc.buffers())
    plain = sum(p.nbytes for name, p in model.named_parameters() if name not in compressed)
    assert kept == acc.bytes + plain == sum(row.state_bytes for row in acc.report())
    assert "5 of 12 gradients compressed" in acc.report().summary
    assert "embedding, by its name" in str(acc.report())


def test_whole_gradients_do_not_pile_up_within_one_backward():
    """While the gradient of a layer is computed, those of the layers after it are gone."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5)))
    alive = []
    for layer in model:
        layer.weight.register_hook(lambda grad: alive.append(sum(q.weight.grad is not None for q in model)))
    acc = CompressedAccumulation(model.named_parameters(), 2)
    for _ in range(2):
        model(torch.randn(3, 8)).sum().backward()
    assert alive == [0] * 10
    acc.remove()
    model(torch.randn(3, 8)).sum().backward()
    assert alive[10:] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("mean", [False, True])
def test_mean_divides_by_the_passes_that_reached_a_parameter(mean):
    p, q, b, unused = parameter((8, 20)), parameter((8, 20)), parameter(4), parameter((8, 20))
    acc = CompressedAccumulation([("p", p), ("q", q), ("b", b), ("unused", unused)], RANK)
    grads = [torch.randn_like(p) for _ in range(4)]
    for i, grad in enumerate(grads):
        push(p, grad)
        push(b, grad[0, :4])
        if i % 2:
            push(q, grad)
    acc.restore(mean=mean)
    P, Q = matrix("p", 0, "wide")[0], matrix("q", 0, "wide")[0]
    torch.testing.assert_close(p.grad, P @ (P.mT @ sum(grads)) / (4 if mean else 1))
    torch.testing.assert_close(q.grad, Q @ (Q.mT @ (grads[1] + grads[3])) / (2 if mean else 1))
    torch.testing.assert_close(b.grad, sum(grads)[0, :4] / (4 if mean else 1))
    assert unused.grad is None


OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    "GaLoreAdamW": lambda params, lr: lowrank_optim.GaLoreAdamW(params, lr=lr, rank=4, update_proj_gap=5),
    "Flora": lambda params, lr: lowrank_optim.Flora(params, lr=lr, rank=4, update_proj_gap=50),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_optimizer_trains(name, dtype):
    model = Net().to(dtype)
    optimizer = OPTIMIZERS[name](list(model.named_parameters()), lr=0.3 if name == "SGD" else 0.01)
    acc, losses = CompressedAccumulation(model.named_parameters(), 0.5), []
    for window in range(25):
        losses.append(0.0)
        for micro in range(4):
            loss = loss_of(model, 4 * (window % 3) + micro) / 4
            loss.backward()
            losses[-1] += loss.item()
        acc.restore()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert all(p.grad.dtype == dtype for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_bfloat16_parameters_gather_in_float32():
    grads = [torch.randn(8, 20).bfloat16() for _ in range(64)]
    p = parameter((8, 20), torch.bfloat16)
    acc = CompressedAccumulation([("w", p)], RANK)
    for grad in grads:
        push(p, grad)
    assert acc.buffers()[0].dtype == torch.float32
    P = matrix("w", 0, "wide")[0]
    torch.testing.assert_close(acc.buffers()[0].double(), P.mT @ sum(g.double() for g in grads), rtol=0, atol=1e-4)


def test_a_backward_within_autocast_projects_in_full_precision():
    grad, p = torch.randn(8, 20), parameter((8, 20), torch.float32)
    acc = CompressedAccumulation([("w", p)], RANK)
    with torch.autocast("cpu", torch.bfloat16):
        push(p, grad)
        acc.restore()
    P = matrix("w", 0, "wide")[0]
    torch.testing.assert_close(p.grad.double(), P @ (P.mT @ grad.double()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["up.weight", "norm.bias"])
def test_nonfinite_numbers_are_passed_on(bad, where):
    model = Net()
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), rank=4)
    p = dict(model.named_parameters())[where]
    acc = gathered(model, 2)
    grad = torch.zeros_like(p)
    grad.view(-1)[1] = bad
    push(p, grad)
    loss_of(model, 2).backward()
    acc.restore()
    assert not p.grad.isfinite().all()
    assert all(q.grad.isfinite().all() for q in model.parameters() if q is not p)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=f"non-finite gradient in {where}"):
        optimizer.step()
    assert {name for name, q in model.state_dict().items() if torch.equal(q, before[name])} == {where}
    optimizer.zero_grad()
    loss_of(model, 3).backward()
    acc.restore()
    assert p.grad.isfinite().all(), "it must not outlive its window"


def test_grad_scaler_finds_what_is_not_finite():
    p = parameter((8, 20), torch.float32)
    acc, optimizer = CompressedAccumulation([("w", p)], RANK), torch.optim.SGD([p], 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    steps = []
    for factor in (1e30, 1.0, 1.0):
        before, grad = p.detach().clone(), torch.randn(8, 20)
        for _ in range(2):
            scaler.scale((p * grad * factor).sum() / 2).backward()
        acc.restore()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        P = matrix("w", len(steps), "wide")[0].float()
        steps.append(not torch.equal(before, p))
        if steps[-1]:
            torch.testing.assert_close(before - p, P @ (P.mT @ grad), rtol=0, atol=1e-4)
    assert steps == [False, True, True]


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("micro", [0, 1, 3])
def test_a_window_continues_bit_for_bit(dtype, micro):
    def run(model, acc, optimizer, first, last):
        for step in range(first, last):
            loss_of(model, step).backward()
            if step % 4 == 3:
                acc.restore()
                optimizer.step()
                optimizer.zero_grad()

    def make():
        torch.manual_seed(3)
        model = Net().to(dtype)
        acc = CompressedAccumulation(model.named_parameters(), RANK, seed=2)
        return model, acc, lowrank_optim.GaLoreAdamW(model.named_parameters(), lr=0.01, rank=4, update_proj_gap=2)

    one = make()
    run(*one, 0, 14)
    two = make()
    run(*two, 0, 8 + micro)
    states = saved([part.state_dict() for part in two])
    three = make()
    torch.manual_seed(99)
    loss_of(three[0], 77).backward()  # what a load must sweep away
    for part, state in zip(three, states, strict=True):
        part.load_state_dict(state)
    run(*three, 8 + micro, 14)
    for p, q in zip(one[0].parameters(), three[0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert len(one[1].buffers()) == len(three[1].buffers()) > 0
    assert all(torch.equal(x, y) for x, y in zip(one[1].buffers(), three[1].buffers(), strict=True))


def test_loaded_tensors_are_copies():
    model, other = Net(), Net()
    state = gathered(model).state_dict()
    acc = CompressedAccumulation(other.named_parameters(), RANK)
    acc.load_state_dict(state)
    before = [tensor.clone() for tensor in acc.buffers()]
    loss_of(model, 5).backward()
    assert all(torch.equal(x, y) for x, y in zip(before, acc.buffers(), strict=True))


MISFITS = {
    "keys": (lambda s: s.pop("seed"), "expected the keys"),
    "seed": (lambda s: s.update(seed=9), "it has seed=9, this object has seed=0; build it with the same value"),
    "orthonormal": (lambda s: s.update(orthonormal=True), "it has orthonormal=True"),
    "window": (lambda s: s.update(window=-1), "window must be an int >= 0, got -1"),
    "unknown": (lambda s: s["sums"].update(other=s["sums"]["up.weight"]), "no parameter here is called other"),
    "count": (lambda s: s["sums"]["up.weight"].update(count=0), r"up.weight is .* with a sum \(3, 20\) of 0"),
    "rank": (lambda s: s["sums"]["up.weight"].update(rank=4), "was .* at rank 4"),
    "shape": (lambda s: s["sums"]["up.weight"].update(shape=(20, 11)), r"was \(20, 11\)"),
    "sum": (lambda s: s["sums"]["up.bias"].update(sum=torch.zeros(3)), r"up.bias is .* with a sum \(3,\)"),
    "entry": (lambda s: s["sums"].update({"up.bias": 3}), "up.bias is"),
}


@pytest.mark.parametrize("what", list(MISFITS))
def test_a_state_that_does_not_fit_changes_nothing(what):
    spoil, message = MISFITS[what]
    state = copy.deepcopy(gathered(Net(), 2).state_dict())
    spoil(state)
    model = Net()
    acc = gathered(model, 1)
    before = [tensor.clone() for tensor in acc.buffers()]
    with pytest.raises(ValueError, match=message):
        acc.load_state_dict(state)
    assert all(torch.equal(x, y) for x, y in zip(before, acc.buffers(), strict=True))
    assert acc.state_dict()["sums"]["up.weight"]["count"] == 1


def test_wrappers_change_neither_numbers_nor_checkpoints():
    p, q = parameter((8, 20)), parameter((8, 20))
    bare, wrapped = CompressedAccumulation([("w", p)], RANK), CompressedAccumulation([("module._orig_mod.w", q)], RANK)
    grad = torch.randn_like(p)
    push(p, grad)
    push(q, grad)
    assert torch.equal(bare.buffers()[0], wrapped.buffers()[0])
    bare.load_state_dict(wrapped.state_dict())


def test_parameters_freeze_and_thaw():
    p, q = parameter((8, 20)), parameter((8, 20))
    p.requires_grad_(False)
    acc = CompressedAccumulation([("p", p), ("q", q)], RANK)
    assert not p.requires_grad, "the hook must leave it frozen"
    push(q, torch.randn_like(q))
    acc.restore()
    assert p.grad is None
    q.grad = None
    p.requires_grad_(True)
    q.requires_grad_(False)
    grad = torch.randn_like(p)
    push(p, grad)
    acc.restore()
    P = matrix("p", 1, "wide")[0]
    torch.testing.assert_close(p.grad, P @ (P.mT @ grad))
    assert q.grad is None


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(9, 9, bias=False), nn.Linear(9, 9, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    model = Tied().double()
    acc = CompressedAccumulation(model.named_parameters(), RANK)
    p, xs = model.first.weight, [torch.randn(4, 9).double() for _ in range(2)]
    for x in xs:
        model(x).sum().backward()
    acc.restore(mean=True)
    mine, p.grad = p.grad, None
    acc.remove()
    for x in xs:
        model(x).sum().backward()
    P = matrix("first.weight", 0, "square")[0]
    torch.testing.assert_close(mine.T, P @ (P.mT @ p.grad.T) / 2)


def test_paused_leaves_gradients_alone():
    p, b = parameter((8, 20)), parameter(4)
    acc = CompressedAccumulation([("w", p), ("b", b)], RANK)
    grads = [torch.randn_like(p) for _ in range(2)]
    with acc.paused():
        push(p, grads[0])
        with acc.paused():
            push(p, grads[0])
        push(p, grads[0])
    torch.testing.assert_close(p.grad, 3 * grads[0])
    p.grad = None
    push(p, grads[1])
    with acc.paused():
        push(p, grads[0])
    with pytest.raises(RuntimeError, match=r"w has an uncompressed gradient in addition .* no_sync"):
        acc.restore()
    p.grad = None
    acc.restore(mean=True)
    P = matrix("w", 0, "wide")[0]
    torch.testing.assert_close(p.grad, P @ (P.mT @ grads[1]))


def test_a_failed_window_can_be_forgotten():
    model = Net()
    acc = gathered(model)
    acc.clear()
    model.zero_grad()
    assert acc.buffers() == []
    loss_of(model, 5).backward()
    acc.restore(mean=True)
    mine = model.up.weight.grad.clone()
    other = Net()
    other.load_state_dict(model.state_dict())
    gathered(other, 1, first=5).restore()
    assert torch.equal(mine, other.up.weight.grad)


def test_reducing_the_buffers_is_reducing_the_gradients():
    """Compressing is linear: what DistributedDataParallel needs, here between two models in one process."""
    models = [Net().double() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    accs = [gathered(models[0], 2), gathered(models[1], 2, first=2), gathered(models[2], 4)]
    for x, y in zip(accs[0].buffers(), accs[1].buffers(), strict=True):
        x.add_(y)
    for acc in (accs[0], accs[2]):
        acc.restore()
    for p, q in zip(models[0].parameters(), models[2].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)


def test_restore_needs_a_gradient():
    p = parameter((8, 20))
    acc = CompressedAccumulation([("w", p)], RANK)
    with pytest.raises(RuntimeError, match="no gradient since the last restore"):
        acc.restore()
    push(p, torch.randn_like(p))
    acc.restore()
    kept = p.grad.clone()
    with pytest.raises(RuntimeError, match="no gradient since the last restore"):
        acc.restore()
    assert torch.equal(p.grad, kept)
    acc.remove()
    push(p, torch.randn_like(p))
    with pytest.raises(RuntimeError, match="the hooks were removed"):
        acc.restore()


def test_two_at_once_are_refused():
    p = parameter((8, 20))
    _first, second = (CompressedAccumulation([("w", p)], RANK) for _ in range(2))
    with pytest.raises(RuntimeError, match="the gradient of w is gone"):
        push(p, torch.randn_like(p))
    second.remove()
    push(p, torch.randn_like(p))


def test_sparse_gradients_are_refused_only_where_they_would_be_compressed():
    table = nn.Embedding(30, 20, sparse=True)
    for name in ("embed.weight", "w"):
        acc = CompressedAccumulation([(name, table.weight), ("v", parameter((8, 20)))], RANK)
        loss = table(torch.tensor([1, 2])).sum()
        if name == "w":
            with pytest.raises(RuntimeError, match="gradient of w is sparse"):
                loss.backward()
        else:
            loss.backward()
            loss = table(torch.tensor([1, 2])).sum()
            loss.backward()
            acc.restore(mean=True)
            assert table.weight.grad.to_dense().sum() == 2 * 20
        acc.remove()
        table.weight.grad = None


def test_parameters_that_cannot_be_compressed_are_refused():
    p = parameter((8, 20))
    with pytest.raises(ValueError, match="a parameter was given twice: v"):
        CompressedAccumulation([("w", p), ("v", p)], RANK)
    with pytest.raises(ValueError, match="a name was given twice: w"):
        CompressedAccumulation([("w", p), ("w", parameter((8, 20)))], RANK)
    with pytest.raises(
        ValueError, match=r"(?s)nothing to compress:\n  embed.weight: embedding, by its name\n  b: a vector"
    ):
        CompressedAccumulation([("embed.weight", p), ("b", parameter(4))], RANK)
    with pytest.raises(ValueError, match=r"rank 8 >= min\(8, 20\)"):
        CompressedAccumulation([p], 8)
    with pytest.raises(ValueError, match="w is no leaf"):
        CompressedAccumulation([("w", p * 2)], RANK)
    with pytest.raises(TypeError, match=r"tensors or \(name, tensor\) pairs, got dict"):
        CompressedAccumulation([{"params": [p]}], RANK)
    for options, message in (
        ({"rank": 0}, "rank must be"),
        ({"rank": None}, "rank must be"),
        ({"seed": -1}, "seed must"),
    ):
        with pytest.raises(ValueError, match=message):
            CompressedAccumulation([p], **options)
    assert not p._post_accumulate_grad_hooks


def test_unnamed_parameters_differ_by_their_place():
    p, q = parameter((8, 20)), parameter((8, 20))
    acc = CompressedAccumulation([p, q], RANK)
    grad = torch.randn_like(p)
    push(p, grad)
    push(q, grad)
    first, second = acc.buffers()
    assert not torch.allclose(first, second)
    assert [row.name for row in acc.report()] == ["param 0", "param 1"]


def test_meta_models_can_be_planned():
    with torch.device("meta"):
        model = Net()
    assert CompressedAccumulation(model.named_parameters(), RANK).bytes == gathered(Net()).bytes


def test_eight_bit_weights():
    model = lowrank_optim.layers.quantized.quantize_weights(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16)))
    acc = CompressedAccumulation(model.named_parameters(), RANK)
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), rank=4)
    for _ in range(2):
        model(torch.randn(3, 16)).square().mean().backward()
    assert model[0].weight.grad is None
    acc.restore()
    before = model[0].weight.unpack()
    optimizer.step()
    assert not torch.equal(before, model[0].weight.unpack())
