"""Weights in 16 bits: one rounding of float32 arithmetic for every block size, and no copy of them in 32 bits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim import GaLoreAdamW, estimate_memory, ops
from lowrank_optim.engine.gradients import gradient_norms
from lowrank_optim.engine.limits import CHUNK_BYTES
from lowrank_optim.engine.write import add_rounded_
from lowrank_optim.memory.peak import Peak
from lowrank_optim.ops import blocks
from lowrank_optim.ops.blocks import Columns
from lowrank_optim.recipe.algebra import WHOLE
from tests.cases import every_case
from tests.support.selection import FEW

KEY, STREAM = ops.key_of(5, "layer.weight"), ops.stream_of("weight", 3)
OPTIONS = {"rank": 3, "weight_decay": 0.1, "lr": 0.03, "density": 0.1, "orthonormal": True}


def trained(case, monkeypatch, block, shape, dtype=torch.bfloat16, steps=4, **options):
    """Parameters of one shape, and a vector, after some steps in blocks of so many elements."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for _ in range(2)] + [nn.Parameter(torch.randn(9).to(dtype))]
    optimizer = case.build(params, **{**OPTIONS, **options})
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return params, optimizer


def assert_like(ours, theirs):
    """To the rounding of products in float32, which moves few weights over a boundary of their rounding."""
    for p, q in zip(ours, theirs, strict=True):
        assert float((p != q).float().mean()) < 0.02
        torch.testing.assert_close(p.float(), q.float(), rtol=0.03, atol=1e-3)


@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((40, 200), {"proj_type": "left"}),
        ((200, 40), {"proj_type": "right", "bf16_update": "kahan"}),
        ((10, 300), {"proj_type": "right", "bf16_update": "none"}),
        ((300, 10), {"proj_type": "left", "maximize": True}),
        ((90, 150), {"proj_type": "full"}),
        ((3, 20, 150), {"proj_type": "left"}),
        ((3, 150, 20), {"proj_type": "right", "foreach": True}),
    ],
)
def test_blocks_change_nothing(case, shape, options, monkeypatch):
    whole, _ = trained(case, monkeypatch, 1 << 20, shape, **options)
    cut, optimizer = trained(case, monkeypatch, 640, shape, **options)
    assert_like(cut, whole)
    if options.get("bf16_update") == "kahan":
        assert any(bool(optimizer.state[p]["compensation"].any()) for p in cut)


@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize("how", ["stochastic", "kahan", "none"])
def test_a_step_is_one_rounding_of_a_step_in_float32(case, how, monkeypatch):
    """The first step, from the same gradient; whose weights in float32 begin where those in bfloat16 do."""
    monkeypatch.setattr(blocks, "BLOCK", 900)
    narrow = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((48, 33), (20, 130), (7,))]
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    for p, q in zip(narrow, wide, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.float()
    case.build(narrow, **OPTIONS, bf16_update=how).step()
    case.build(wide, **OPTIONS).step()
    for p, q in zip(narrow, wide, strict=True):
        ulp = torch.maximum(p.abs(), q.abs()).detach().log2().floor().exp2() * 2**-7
        assert float(((p - q).detach().abs() / ulp).max()) <= (1.001 if how == "stochastic" else 0.501)


def test_float16_weights_are_rounded_to_nearest(monkeypatch):
    from tests.cases import CASES

    case = CASES[0]
    whole, _ = trained(case, monkeypatch, 1 << 20, (30, 200), torch.float16)
    cut, _ = trained(case, monkeypatch, 640, (30, 200), torch.float16)
    assert_like(cut, whole)


# -- random numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 3, 1000])
def test_columns_are_rounded_as_in_the_whole(start):
    w, x = torch.randn(13, 90).bfloat16(), torch.randn(13, 90) * 0.01
    whole, parts = w.clone(), w.clone()
    add_rounded_(whole, x, 0.97, noise=(KEY, STREAM, start, 90))
    for first, stop in ((0, 5), (5, 37), (37, 90)):
        noise = KEY, STREAM, start + first, 90
        add_rounded_(parts, x[:, first:stop].contiguous(), 0.97, first=first, noise=noise)
    assert torch.equal(whole, parts)
    exact = w.float().mul(0.97).add(x)
    assert torch.equal(whole, ops.round_to_bfloat16(exact, KEY, STREAM, start)), "the numbers of a step before this"


def test_a_factor_on_the_device_is_the_number(monkeypatch):
    w, owed, x = torch.randn(4, 30).bfloat16(), torch.randn(4, 30).mul(1e-3).bfloat16(), torch.randn(4, 30)
    for options in ({}, {"owed": owed}, {"noise": (KEY, STREAM, 7, 30)}):
        results = []
        for keep in (0.93, torch.tensor(0.93), torch.tensor(0.93, dtype=torch.float64)):
            y, rest = w.clone(), owed.clone()
            add_rounded_(y, x, keep, **{**options, **({"owed": rest} if "owed" in options else {})})
            results.append((y, rest))
        for y, rest in results[1:]:
            assert torch.equal(y, results[0][0])
            assert torch.equal(rest, results[0][1])
    assert not torch.equal(results[0][0], w)


# -- float32 accuracy --------------------------------------------------------------------------------------------------


def test_a_gradient_in_16_bits_is_projected_in_float32(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    basis, g = torch.randn(3, 50, 7), torch.randn(3, 50, 300).bfloat16()
    exact = basis.double().mT @ g.double()
    for one, narrow in ((basis, g), (basis[0], g[0]), (basis[0], g[0].mT.contiguous().mT)):
        r = WHOLE.project(one, narrow)
        assert r.dtype == torch.float32
        torch.testing.assert_close(r.double(), exact if one.dim() == 3 else exact[0], rtol=1e-4, atol=1e-5)


def test_norms_of_weights_in_16_bits(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    for x in (torch.randn(3, 40, 170), torch.randn(40, 170), torch.randn(2050), torch.randn(0, 5)):
        size = WHOLE.size(x.bfloat16())
        assert size.dtype == torch.float32
        torch.testing.assert_close(size, WHOLE.size(x.bfloat16().float()), equal_nan=True)


def test_blocks_cover_every_column_once(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4096)
    for shape in ((10, 1000), (5000, 130), (2, 33, 65), (70_000,), (3, 0), (0, 200), (1, 1)):
        found = list(blocks.blocks(shape))
        assert [column for one in found for column in range(one.first, one.stop)] == list(range(shape[-1]))
        assert all(one.whole == shape[-1] for one in found)
        few = all(one.stop - one.first <= 64 for one in found)
        assert few or blocks.largest_block(shape) <= 4096
    assert len(list(blocks.blocks((2048, 4096), "cuda"))) == 1, "launches cost time"
    assert list(blocks.blocks((8192, 4096), "cuda"))[1] == (1024, 2048, 4096)
    assert Columns(2, 5, 9).of(torch.arange(9)).tolist() == [2, 3, 4]


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stochastic", "kahan", "none"])
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_a_matrix_larger_than_a_chunk_takes_no_chunk(how, proj_type):
    """Extra memory of a step: coordinates, and one block."""
    p = nn.Parameter(torch.zeros(4096, 5120, dtype=torch.bfloat16))
    assert p.numel() * 4 > CHUNK_BYTES
    options = {"rank": 8, "proj_type": proj_type, "basis": "rsvd", "weight_decay": 0.1, "bf16_update": how}
    optimizer = GaLoreAdamW([p], lr=0.01, **options)
    p.grad = torch.randn(4096, 5120).bfloat16()
    optimizer.step()
    with Peak() as peak:
        optimizer.step()
    assert peak.most < CHUNK_BYTES / 8
    planned = estimate_memory([p.shape], GaLoreAdamW, dtype=p.dtype, **options).step_workspace
    assert planned / 3 < peak.most <= planned + 4096


def test_only_methods_that_read_all_of_a_gradient_copy_it():
    shape, sizes = (2048, 1024), {}
    for make in (GaLoreAdamW, lowrank_optim.FiraAdamW):
        sizes[make] = estimate_memory([shape], make, dtype=torch.bfloat16, rank=8).step_workspace
    assert sizes[GaLoreAdamW] < 2048 * 1024 * 4 < sizes[lowrank_optim.FiraAdamW]


def test_plain_parameters_in_16_bits_are_cut_on_accelerators_too(monkeypatch):
    monkeypatch.setattr("lowrank_optim.engine.limits.CHUNK_BYTES", 16 * 300)
    for dtype, count in ((torch.bfloat16, 4), (torch.float32, 1)):
        p = nn.Parameter(torch.randn(1000, dtype=dtype))
        p.grad = torch.randn_like(p)
        optimizer = GaLoreAdamW([p, nn.Parameter(torch.randn(9, 9))], rank=3)
        chunk = next(optimizer.stepper.chunks([optimizer.table.member(p, optimizer.param_groups[0], p.grad)]))
        there = replace(chunk, params=[p.detach().to("meta")], grads=[p.grad.to("meta")])
        assert [len(piece.params[0]) for piece in there.pieces()] == ([300, 300, 300, 100] if count == 4 else [1000])


def test_norms_of_gradients_in_16_bits_are_taken_in_slices(monkeypatch):
    monkeypatch.setattr("lowrank_optim.engine.limits.SLICE", 100)
    grads = [torch.randn(30, 17).bfloat16(), torch.randn(8).bfloat16(), torch.randn(90, 4), torch.zeros(0).bfloat16()]
    grads.append(torch.randn(40, 20).bfloat16()[:, ::2])
    for norm, grad in zip(gradient_norms(grads), grads, strict=True):
        assert norm == pytest.approx(float(grad.double().norm()), rel=1e-6)
    grads[0][29, 3], grads[1][0] = float("nan"), float("inf")
    assert not any(map(math.isfinite, gradient_norms(grads[:2])))
    assert gradient_norms([torch.full((300,), 3e38, dtype=torch.bfloat16)]) == [math.inf]
