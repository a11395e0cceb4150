"""Plain parameters in one call: as one by one to the last bit, and as few calls as there are kinds."""

import math
from contextlib import suppress

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim.engine import fused
from lowrank_optim.engine.update import move_
from tests.cases import every_case
from tests.support.selection import FEW

SHAPES = [(1,), (3,), (513,), (7, 5), (40, 3, 3, 3), (0,), (2, 9, 20), (70, 90)]
OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.97), "weight_decay": 0.1}


def parameters(dtype=torch.float32):
    make = torch.Generator().manual_seed(4)
    some = [nn.Parameter(torch.randn(shape, generator=make).to(dtype)) for shape in SHAPES]
    some.append(nn.Parameter(torch.randn(4, 6, generator=make).to(dtype).t()))  # not row-major
    return some


def optimizer_of(params, **options):
    low_rank = nn.Parameter(torch.randn(8, 6, dtype=params[0].dtype))
    groups = [{"params": [low_rank], "rank": 2}, {"params": params[:5], "rank": None}]
    groups.append({"params": params[5:], "rank": None, "lr": 3e-2, "betas": (0.7, 0.9)})
    return lowrank_optim.GaLoreAdamW(groups, **OPTIONS, **options)


def run(optimizer, params, steps=5):
    """Gradients of all kinds: late ones, zeros, infinite ones, and some that are not row-major."""
    for step in range(steps):
        make = torch.Generator().manual_seed(100 + step)
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=make).to(p.dtype)
            g = g.mT.contiguous().mT if i == 3 else g
            p.grad = torch.zeros_like(p) if (i, step) == (2, 0) else None if i == 4 and step < 2 else g
            if (i, step) == (1, 3):
                p.grad[0] = math.inf
        optimizer.step()
    return [*params, *(x for p in params for x in optimizer.state[p].values())]


def in_chunks(monkeypatch):
    monkeypatch.setattr("lowrank_optim.engine.grouping._path", lambda member, recipe: None)


@pytest.fixture
def calls(monkeypatch):
    """The tensors of each call of a kernel that does the whole update."""
    (kind, kernel), seen = next(iter(fused._STEPS.items())), []

    def spy(recipe, w, *rest):
        seen.append([tuple(x.shape) for x in w])
        kernel(recipe, w, *rest)

    monkeypatch.setitem(fused._STEPS, kind, spy)
    return seen


@pytest.mark.filterwarnings("ignore:non-finite")
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float64, {}),
        (torch.float32, {"foreach": True}),
        (torch.float32, {"maximize": True}),
        (torch.float32, {"state_dtype": "bfloat16"}),
        (torch.float32, {"state_dtype": "int8"}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"bf16_update": "kahan"}),
    ],
)
def test_lists_equal_chunks(monkeypatch, dtype, options):
    listed, chunked = parameters(dtype), parameters(dtype)
    first = run(optimizer_of(listed, **options), listed)
    in_chunks(monkeypatch)
    for x, y in zip(first, run(optimizer_of(chunked, **options), chunked), strict=True):
        assert torch.equal(x, y)


def test_one_call_per_group_also_between_large_matrices(calls):
    small = [nn.Parameter(torch.randn(width)) for width in (5, 6, 7, 8)]
    large = [nn.Parameter(torch.randn(300, 300)) for _ in range(4)]
    params = [p for pair in zip(small, large, strict=True) for p in pair]
    optimizer = lowrank_optim.GaLoreAdamW(params, rank=3, **OPTIONS)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert calls == [[(5,), (6,), (7,), (8,)]]
    assert all(int(optimizer.state[p]["step"]) == 1 for p in params)


def test_parameters_at_different_steps(calls):
    params = [nn.Parameter(torch.randn(9)) for _ in range(3)]
    optimizer = optimizer_of(params)
    apart = [nn.Parameter(p.detach().clone()) for p in params]
    for late in (False, True):
        for p, q in zip(params, apart, strict=True):
            p.grad = None if p is params[1] and not late else torch.randn(9)
            q.grad = p.grad
        optimizer.step()
        calls.append(None)
    assert [len(some) for some in calls if some] == [2, 2, 1]
    reference = torch.optim.AdamW(apart, **OPTIONS, fused=True)
    for p, q in zip(params, apart, strict=True):  # their last gradients again, to compare the clocks
        q.data.copy_(p.detach())
        reference.state[q] = {key: optimizer.state[p][key].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
    optimizer.step()
    reference.step()
    assert all(torch.equal(p, q) for p, q in zip(params, apart, strict=True))


@pytest.mark.thin
@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.filterwarnings("ignore:non-finite")
@pytest.mark.parametrize("side", ["std", "reverse_std"])
def test_listed_matrices_equal_chunks(case, side, monkeypatch):
    """Between refreshes as well as around them; tall, wide, square, a stack, ranks 1 and that of the matrix."""
    finals, options = [], case.fitting({"update_proj_gap": 5, "scale": 0.7, "proj_type": side})
    for chunked in (False, True):
        torch.manual_seed(5)
        params = [nn.Parameter(torch.randn(shape)) for shape in [(9, 5), (5, 9), (8, 8), (2, 20, 17), (6, 7), (11,)]]
        groups = [{"params": params[:4], "rank": 3}, {"params": params[4:5], "rank": 1}, {"params": params[5:]}]
        if chunked:
            in_chunks(monkeypatch)
        optimizer = case.build(groups, **{**options, "weight_decay": 0.1})
        finals.append(run(optimizer, params, 12))
    for x, y in zip(*finals, strict=True):
        assert torch.equal(x, y)


def test_equal_matrices_share_a_kernel(monkeypatch):
    taken = []
    monkeypatch.setattr(fused, "directions", lambda *rest, f=fused.directions: taken.append(len(rest[1])) or f(*rest))
    params = [nn.Parameter(torch.randn(shape)) for shape in [(16, 32)] * 5 + [(32, 16), (400, 300)]]
    optimizer = lowrank_optim.GaLoreAdamW(params, rank=4, update_proj_gap=3, stagger=False, **OPTIONS)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert taken == [1, 6] * 2, "large ones alone; none when a refresh is due"


@pytest.mark.few(case=FEW)
@every_case
def test_an_interrupted_list_leaves_every_weight_counted(case, monkeypatch):
    moved = []

    def interrupted(args, f=move_):
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(args.w.data_ptr())
        return f(args)

    params = [nn.Parameter(torch.randn(12, 18)) for _ in range(5)]
    options = case.fitting({"rank": 3, "update_proj_gap": 10, "stagger": False})
    optimizer = case.build([(f"w{i}", p) for i, p in enumerate(params)], **options)
    for _ in range(2):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn_like(p)
        with suppress(KeyboardInterrupt):
            optimizer.step()
        monkeypatch.setattr("lowrank_optim.engine.in_place.move_", interrupted)
    expected = [p.data_ptr() in moved for p in params]
    assert [not torch.equal(p, w) for p, w in zip(params, before, strict=True)] == expected
    assert [int(optimizer.state[p]["step"]) == 2 for p in params] == expected


def test_large_matrices_are_never_held_together(monkeypatch):
    """Also where the norms of all come first."""
    taken = []
    monkeypatch.setattr(fused, "directions", lambda *rest, f=fused.directions: taken.append(len(rest[1])) or f(*rest))
    params = [nn.Parameter(torch.randn(300, 400)) for _ in range(3)]
    optimizer = lowrank_optim.GaLoreAdamW(params, rank=4, nonfinite="raise", stagger=False, **OPTIONS)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert taken == [1, 1, 1]


def test_factors_whose_moments_restart(monkeypatch, calls):
    """Their clock is not their step."""
    finals = []
    for chunked in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(18, 20), nn.Tanh(), nn.Linear(20, 18))
        optimizer = lowrank_optim.ReLoRA(model, lr=1e-2, rank=4, merge_every=3)
        if chunked:
            assert sorted(map(len, calls[-2:])) == [2, 4], "biases; factors"
            in_chunks(monkeypatch)
        for step in range(8):
            optimizer.zero_grad()
            model(torch.randn(5, 18, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*finals)
