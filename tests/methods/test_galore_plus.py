"""GaLore+ with heads: whose subspace it is, what it becomes at its limits, and that it is its loop."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim import GaLoreAdamW, GaLorePlusAdamW, ops, param_groups
from tests.cases import TOLERANCE, gradients
from tests.reference import galore_plus
from tests.reference.galore import exact
from tests.support.laws import (
    ADAM,
    COMMON,
    RANK,
    M,
    N,
    close,
    normal,
    problem,
    steps_of,
    torch_path_end,
)

ADAMW = dict(lr=0.0037, betas=(0.83, 0.97), eps=3e-7, weight_decay=0.1)
OPTIONS = {**ADAMW, "update_proj_gap": 7, "scale": 0.7, "density": 0.1, "residual_scale": 0.6}
STEPS = 20
# shape, rank, heads, side: heads are blocks of rows for "right", of columns for "left"
HEADED = [
    ((24, 10), 4, 4, "right"),  # of 6 rows
    ((24, 10), 4, 24, "right"),  # of one row: four of them
    ((10, 24), 7, 4, "left"),  # of 6 columns: two heads
    ((12, 12), 5, 3, "right"),
    ((12, 12), 5, 2, "left"),
    ((9, 22), 3, 3, "right"),  # of 3 rows, as many as the rank
    ((36, 12), 5, 9, "right"),  # queries, keys and values in one
]
every_headed = pytest.mark.parametrize(("shape", "rank", "heads", "side"), HEADED)


class Attention(nn.Module):
    """Four query heads of width 4 that share two keys and values."""

    def __init__(self, size=16):
        super().__init__()
        self.head_dim = 4
        self.q_proj, self.o_proj = nn.Linear(size, 16, bias=False), nn.Linear(16, size, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(size, 8, bias=False) for _ in range(2))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(), nn.Linear(16, 24)

    def forward(self, x):
        return self.mlp(x + self.attention(x))


def headed(model, rank=3, **options):
    groups = param_groups(model, rank=rank, min_dim=4, heads=True, verbose=False)
    return GaLorePlusAdamW(groups, **{**OPTIONS, "basis": "svd", "stagger": False, **options})


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 7, 16, dtype=torch.float64, generator=generator)
    model.zero_grad()
    (model(x) - x.sum(-1, keepdim=True)).square().mean().backward()


def order(name, heads, count, seed=0, expert=0):
    return ops.normal((heads,), ops.key_of(seed, name), ops.stream_of(f"head {expert}", count)).argsort().tolist()


def block(grad, name, heads, side, rank, count, **options):
    """The columns of the turned gradient that belong to the heads that are drawn, in their own order."""
    blocks = (grad.mT if side == "right" else grad).chunk(heads, 1)
    chosen = sorted(order(name, heads, count, **options)[: math.ceil(rank / blocks[0].shape[1])])
    return torch.cat([blocks[head] for head in chosen], 1), chosen


PROJECTIONS = {"q_proj": (4, "right"), "k_proj": (2, "right"), "v_proj": (2, "right"), "o_proj": (4, "left")}


@pytest.mark.parametrize("rank", [3, 4, 6])
def test_the_subspace_of_one_head_serves_all(rank):
    """Rank 6 needs two heads of width 4. The second refresh is after step 7."""
    model = Model().double()
    optimizer, drawn = headed(model, rank), set()
    for step in range(8):
        backward(model, step)
        if step in (0, 7):
            grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
        optimizer.step()
        if step not in (0, 7):
            continue
        for short, (heads, side) in PROJECTIONS.items():
            name = f"attention.{short}.weight"
            p = getattr(model.attention, short).weight
            basis, grad = optimizer.state[p]["basis"], grads[name]
            columns, chosen = block(grad, name, heads, side, rank, step // 7)
            drawn.add((heads, *chosen))
            torch.testing.assert_close(basis, ops.leading_left_vectors(columns, rank), rtol=0, atol=1e-12)
            torch.testing.assert_close(basis.mT @ basis, torch.eye(rank).double(), rtol=0, atol=1e-12)
            r = basis.mT @ (grad.mT if side == "right" else grad)  # the coordinates of all heads, not of one
            want = 0.83 * moments[name] + 0.17 * r
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], want, rtol=0, atol=1e-12)
    assert len(drawn) > 2, "matrices and refreshes draw heads of their own"


def test_the_other_matrices_have_their_own_subspace():
    model = Model().double()
    optimizer = headed(model)
    backward(model, 0)
    optimizer.step()
    p = model.mlp.weight
    want = ops.leading_left_vectors(p.grad.mT, 3)
    torch.testing.assert_close(optimizer.state[p]["basis"], want, rtol=0, atol=1e-12)


def test_every_head_is_drawn():
    drawn = {order("w", 4, count)[0] for count in range(40)}
    assert drawn == {0, 1, 2, 3}
    p, seen = nn.Parameter(torch.zeros(8, 6).double()), set()
    optimizer = GaLorePlusAdamW([("w", p)], rank=1, heads=4, proj_type="right", update_proj_gap=1, basis="svd")
    for _ in range(40):
        p.grad = torch.zeros_like(p)  # head i lives in column i alone
        p.grad.view(4, 2, 6)[range(4), :, range(4)] = 1 + torch.rand(4, 2).double()
        optimizer.step()
        seen.add(int(optimizer.state[p]["basis"].abs().argmax()))
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("basis", ["svd", "rsvd"])
def test_a_head_without_a_gradient_does_no_harm(basis):
    p = nn.Parameter(torch.zeros(8, 6))
    options = dict(rank=2, heads=4, proj_type="right", update_proj_gap=1, basis=basis)
    optimizer = GaLorePlusAdamW([("w", p)], **options)
    for _ in range(12):
        p.grad = torch.zeros_like(p)
        p.grad[2:4] = torch.randn(2, 6)
        optimizer.step()
        basis_now = optimizer.state[p]["basis"]
        torch.testing.assert_close(basis_now.mT @ basis_now, torch.eye(2), rtol=0, atol=1e-5)
    assert p.isfinite().all()


@every_headed
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "fp64"])
@pytest.mark.parametrize("density", [0.0, 0.1])
def test_engine_equals_the_loop_with_heads(shape, rank, heads, side, dtype, density):
    weight, grads = 0.2 * torch.randn(shape, dtype=dtype), gradients(shape, STEPS, dtype)
    p = nn.Parameter(weight.clone())
    options = {**OPTIONS, "density": density}
    optimizer = GaLorePlusAdamW([("w", p)], rank=rank, heads=heads, proj_type=side, basis="svd", seed=5, **options)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()

    def loop(heads):
        def normal(size, count, purpose="sketch"):
            return ops.normal(size, ops.key_of(5, "w"), ops.stream_of(f"{purpose} 0", count)).to(dtype)

        known = {key: x for key, x in options.items() if key != "update_proj_gap"}
        return galore_plus.galore_plus_adamw(
            weight, grads, {0, 7, 14}, rank=rank, side=side, heads=heads, normal=normal, **known
        )

    want = loop(heads)
    torch.testing.assert_close(p.detach(), want, **TOLERANCE[dtype])
    assert (want - loop(1)).abs().max() > 1e-4, "heads must make a difference here, or the test shows nothing"


@pytest.mark.parametrize("foreach", [False, True])
def test_a_stack_of_experts_is_its_experts(foreach, monkeypatch):
    """Each expert draws its own head; in one piece, or cut."""
    shape, rank, heads, side = (3, 12, 18), 4, 3, "left"
    weight, grads = 0.2 * torch.randn(shape).double(), gradients(shape, STEPS, torch.float64)
    loops = []
    for expert in range(3):

        def normal(size, count, purpose="sketch", expert=expert):
            return ops.normal(size, ops.key_of(0, "w"), ops.stream_of(f"{purpose} {expert}", count)).double()

        known = {key: x for key, x in OPTIONS.items() if key != "update_proj_gap"}
        mine = [grad[expert] for grad in grads]
        loops.append(
            galore_plus.galore_plus_adamw(
                weight[expert], mine, {0, 7, 14}, rank=rank, side=side, heads=heads, normal=normal, **known
            )
        )
    for limit in (64 << 20, 8 * 12 * 18):
        monkeypatch.setattr("lowrank_optim.engine.limits.CHUNK_BYTES", limit)
        p = nn.Parameter(weight.clone())
        options = dict(rank=rank, heads=heads, proj_type=side, basis="svd", stagger=False, foreach=foreach)
        optimizer = GaLorePlusAdamW([("w", p)], **OPTIONS, **options)
        for grad in grads:
            p.grad = grad.clone()
            optimizer.step()
        torch.testing.assert_close(p.detach(), torch.stack(loops), rtol=0, atol=1e-12)
    assert len({tuple(order("w", heads, count, expert=i)) for count in range(3) for i in range(3)}) > 2


@pytest.mark.parametrize("basis", ["svd", "rsvd"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(24, 10), (9, 22), (12, 12)])
def test_one_head_without_entries_is_galore(basis, side, shape):
    finals = []
    for make, extra in ((GaLoreAdamW, {}), (GaLorePlusAdamW, {"heads": 1, "density": 0.0})):
        torch.manual_seed(1)
        p = nn.Parameter(0.2 * torch.randn(shape).double())
        options = {**ADAMW, "update_proj_gap": 7, "scale": 0.7, "rank": 4, "proj_type": side, "basis": basis}
        optimizer = make([("w", p)], **options, **extra)
        for grad in gradients(shape, STEPS, torch.float64):
            p.grad = grad
            optimizer.step()
        finals.append((p.detach(), optimizer.state[p]["basis"]))
    torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=1e-12)


@every_headed
@pytest.mark.parametrize("basis", ["svd", "rsvd"])
def test_all_entries_exact_is_adamw(shape, rank, heads, side, basis):
    """Whatever the subspace, and whatever refreshes do to the moments in it."""
    p = nn.Parameter(0.2 * torch.randn(shape).double())
    q = nn.Parameter(p.detach().clone())
    options = dict(rank=rank, heads=heads, proj_type=side, basis=basis, update_proj_gap=3, moments="reset")
    ours = GaLorePlusAdamW([("w", p)], **ADAMW, **options, density=1.0, residual_scale=1.0, scale=1.0)
    theirs = torch.optim.AdamW([q], **ADAMW)
    for grad in gradients(shape, STEPS, torch.float64):
        p.grad, q.grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("basis", ["svd", "rsvd"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_a_run_continues_bit_for_bit_across_a_refresh(basis, state_dtype):
    def make():
        torch.manual_seed(2)
        model = Model().double()
        return model, headed(model, 6, basis=basis, stagger=True, state_dtype=state_dtype)

    def run(model, optimizer, first, last):
        for step in range(first, last):
            backward(model, step)
            optimizer.step()

    whole, first, second = make(), make(), make()
    run(*whole, 0, 17)
    run(*first, 0, 6)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(*second, 6, 17)
    for p, q in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(whole[1].state[p][key], x) for key, x in second[1].state[q].items())
    counts = [int(state["refreshes"]) for state in whole[1].state.values() if "refreshes" in state]
    assert min(counts) >= 2


def test_equal_matrices_stacked_or_in_a_loop():
    """On gradients of full rank: vectors for singular values of zero would be anyone's."""
    finals = []
    for foreach in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(Attention(), Attention(), Attention()).double()
        optimizer = headed(model, 6, stagger=True, foreach=foreach)
        grads = [gradients(p.shape, STEPS, torch.float64) for p in model.parameters()]
        for step in range(STEPS):
            for p, of_p in zip(model.parameters(), grads, strict=True):
                p.grad = of_p[step]
            optimizer.step()
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*finals, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("shape", "side", "blocks"), [((24, 10), "right", "24 rows"), ((24, 10), "left", "10 columns")]
)
def test_heads_that_do_not_divide_are_refused(shape, side, blocks):
    p = nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match=rf"w \({shape[0]}, {shape[1]}\) has {blocks}, which 7 heads do not divide"):
        GaLorePlusAdamW([("w", p)], rank=4, heads=7, proj_type=side)
    optimizer = GaLorePlusAdamW([("v", nn.Parameter(torch.zeros(14, 14)))], rank=4, heads=7)
    with pytest.raises(ValueError, match="which 7 heads do not divide"):
        optimizer.add_param_group({"params": [("w", p)], "proj_type": side})
    assert len(optimizer.param_groups) == len(optimizer.state) == 1
    optimizer.add_param_group({"params": [("w", p)], "proj_type": side, "heads": 2, "rank": 4})


def test_heads_in_groups_are_only_for_this_class():
    groups = param_groups(Model(), rank=3, min_dim=4, heads=True, verbose=False)
    with pytest.raises(ValueError, match="unknown key 'heads'"):
        GaLoreAdamW(groups)


def test_memory_is_predicted():
    with torch.device("meta"):
        groups = param_groups(Model(), rank=6, min_dim=4, heads=True, verbose=False)
    estimate = lowrank_optim.estimate_memory(groups, GaLorePlusAdamW, density=0.1)
    model = Model()
    optimizer = headed(model, 6)
    assert estimate.optimizer == lowrank_optim.state_bytes(optimizer)


# -- laws of the paper -------------------------------------------------------------------------------------------------


@pytest.mark.cpus
def test_with_one_head_and_nothing_else_is_galore(run):
    weight, grads = problem()
    options = dict(heads=1, density=0.0, residual_scale=1.0)
    close(
        run.galore_plus(weight, grads, {0, 3, 6}, **COMMON, **options),
        run.galore(weight, grads, {0, 3, 6}, **COMMON),
    )


@pytest.mark.cpus
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_with_every_entry_is_adamw(run, heads):
    weight, grads = problem()
    options = dict(heads=heads, density=1.0, residual_scale=1.0)
    close(
        run.galore_plus(weight, grads, {0, 3, 6}, **{**COMMON, "scale": 1.0}, **options),
        torch_path_end(torch.optim.AdamW, weight, grads, **ADAM),
    )


@pytest.mark.cpus
def test_on_the_sparse_set_is_adamw_and_elsewhere_galore(run):
    """One head, so the low-rank part is GaLore's; the set is that of the largest first residuals and stays."""
    weight, grads = problem()
    options = dict(heads=1, density=0.25, residual_scale=1.0)
    free = {**COMMON, "weight_decay": 0.0, "scale": 1.0}
    actual = run.galore_plus(weight, grads, {0, 3, 6}, **free, **options)
    adam = torch_path_end(torch.optim.AdamW, weight, grads, **{**ADAM, "weight_decay": 0.0})
    galore = run.galore(weight, grads, {0, 3, 6}, **free)
    p = exact(grads[0], RANK, "left", None)[0]
    lost = (grads[0] - p @ (p.T @ grads[0])).abs()
    sparse = lost >= lost.flatten().sort(descending=True).values[M * N // 4 - 1]
    assert sparse.sum() == M * N // 4
    close(actual, torch.where(sparse, adam, galore))


@pytest.mark.cpus
def test_takes_as_many_heads_as_the_rank_needs(loop):
    weight, grads = problem(steps=1)
    seen = []

    def fit_block(block, rank):
        seen.append(block)
        return exact(block, rank, "left", None)[0]

    options = dict(density=0.0, residual_scale=1.0, fit_block=fit_block)
    loop.galore_plus(weight, grads, {0}, **COMMON, heads=4, **options)  # heads of width 2, rank 3
    first = sorted(normal((4,), 0, "head").argsort()[:2].tolist())
    close(seen[0], torch.cat([grads[0][:, 2 * head : 2 * head + 2] for head in first], 1), atol=0)


@pytest.mark.cpus
def test_is_linear_in_its_residual_scale(run):
    weight, grads = problem()
    options = dict(COMMON, heads=1, density=0.25)
    none, half, whole = (
        run.galore_plus(weight, grads, {0, 3, 6}, **options, residual_scale=x) for x in (0.0, 0.5, 1.0)
    )
    assert (whole - none).norm() > 1e-3
    close(half, (none + whole) / 2)


# -- the engine --------------------------------------------------------------------------------------------------------


def test_no_entries_in_a_stack():
    p = nn.Parameter(torch.randn(2, 64, 64))
    optimizer = lowrank_optim.GaLorePlusAdamW([p], rank=4, density=0.0, state_dtype="int8")
    steps_of(optimizer, p, [torch.randn(2, 64, 64)])
    assert not any(key.startswith("entries") for key in optimizer.state[p])
