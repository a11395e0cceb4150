"""Bytes: what is kept equals the formula, what a step adds is bounded, and both are known beforehand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim import estimate_memory, ops, param_groups, state_bytes
from lowrank_optim.engine import write
from lowrank_optim.memory.peak import Peak
from tests.cases import CASES, Net, every_case, train
from tests.support.selection import FEW

COUNTERS = 4 + 8  # step (float32) and skipped (int64); a projected matrix has two more, refreshes and refreshed_at


@every_case
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((24, 10), 4), ((9, 22), 3), ((12, 12), 5), ((3, 20, 18), 2), ((16, 4, 3, 3), 7), ((90, 71), 5), ((4, 70, 33), 3)],
)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_persistent_bytes_equal_the_formula(case, shape, rank, proj_type, state_dtype):
    p = nn.Parameter(torch.randn(shape))
    options = dict(rank=rank, proj_type=proj_type, state_dtype=state_dtype, basis_dtype="bfloat16", orthonormal=True)
    options = case.fitting(options)
    optimizer = case.build([p], **options)
    rows, columns = shape[-2:] if len(shape) == 3 else (shape[0], p[0].numel())
    count = shape[0] if len(shape) == 3 else 1
    short, long = sorted((rows, columns))
    m, n = (short, long) if options.get("proj_type", "std") == "std" else (long, short)
    kept = case.kept(m, n, rank)
    if case.name == "q_galore" and p.numel() >= 4096:  # its basis does not follow state_dtype
        kept = replace(kept, basis=0, other=kept.other + 2 * kept.basis)
    want = count * (kept.bytes(state_dtype, small=p.numel() < 4096) + 16 + case.counters) + COUNTERS
    if case.name == "q_galore" and p.numel() < 4096 and state_dtype in ("float32", "int8", "int4"):
        want -= 2 * count * kept.basis  # asked for in bfloat16
    for _ in range(3):
        p.grad = torch.randn(shape)
        optimizer.step()
    assert state_bytes(optimizer) == optimizer.report()[0].state_bytes == want
    assert estimate_memory([shape], case.make, **{**case.kwargs, **options}).optimizer == want


@pytest.mark.parametrize(
    ("hidden", "mlp", "layers", "rank", "galore", "rest"),
    [  # elements that the spec computes for the paper's models: projected matrices, and everything else in AdamW
        (512, 1376, 8, 128, 16.32e6, 65.55e6),
        (768, 2048, 12, 256, 73.14e6, 98.34e6),
        (1024, 2736, 24, 256, 195.23e6, 131.17e6),
        (2048, 5461, 24, 512, 780.12e6, 262.34e6),
        (4096, 11008, 32, 1024, 4177.53e6, 524.82e6),
    ],
    ids=["60m", "130m", "350m", "1b", "7b"],
)
def test_the_papers_models(hidden, mlp, layers, rank, galore, rest):
    block = [(hidden, hidden)] * 4 + [(mlp, hidden)] * 2 + [(hidden, mlp)]
    matrices = estimate_memory(block * layers, lowrank_optim.GaLoreAdamW, rank=rank)
    counters = 7 * layers * (COUNTERS + 16)
    assert (matrices.optimizer - counters) / 4 == pytest.approx(galore, rel=1e-3)
    others = {"embed_tokens": (32000, hidden), "lm_head": (32000, hidden)}
    others |= {f"norm{i}": (hidden,) for i in range(2 * layers + 1)}
    both = estimate_memory({"q": (hidden, hidden), **others}, lowrank_optim.GaLoreAdamW, rank=rank)
    one = estimate_memory({"q": (hidden, hidden)}, lowrank_optim.GaLoreAdamW, rank=rank)
    assert (both.optimizer - one.optimizer - COUNTERS * len(others)) / 4 == pytest.approx(rest, rel=1e-3)


@pytest.mark.few(case=FEW)
@every_case
def test_the_estimate_of_a_model_is_what_training_keeps(case):
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            groups = param_groups(Net(), min_dim=4, verbose=False)
        planned = estimate_memory(groups, case.make, dtype=dtype, bf16_update="kahan", **case.kwargs)
        model = Net().to(dtype)
        optimizer = case.build(param_groups(model, min_dim=4, verbose=False), bf16_update="kahan")
        train(model, optimizer, 3)
        assert planned.optimizer == state_bytes(optimizer)
        assert planned.weights == planned.gradients == sum(p.nbytes for p in model.parameters())
        assert planned.total > planned.weights + planned.gradients + planned.optimizer
        assert "bases" in str(planned)


def test_the_estimate_of_torchs_optimizers():
    model = Net()
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, 1)
    assert estimate_memory(model, torch.optim.AdamW).optimizer == state_bytes(adamw)
    assert estimate_memory(model, torch.optim.SGD, lr=1e-3).optimizer == 0


def most_gradients(model, optimizer, micro_batches):
    """Measured in one window, by hand: what there is when each gradient comes."""
    most, handle = 0, optimizer.mode

    def look(newest):
        nonlocal most
        sums = [] if handle is None else [w.sum for w in handle._windows.values() if w.sum is not None]
        kept = [p.grad for p in model.parameters() if p.grad is not None]
        most = max(most, sum(x.numel() * x.element_size() for x in [*kept, *sums, newest]))

    hooks = [p.register_hook(look) for p in model.parameters()]
    for micro in range(micro_batches):
        tokens = torch.arange(20).view(2, 10).add(micro) % 11
        nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    return most


@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("during", [True, False])
def test_gradients_alive_at_once_are_what_was_estimated(case, micro_batches, during):
    options = {**case.kwargs, **case.fitting({"update_proj_gap": 100, "rank": 2, "state_dtype": "bfloat16"})}
    for dtype in (torch.float32, torch.bfloat16):
        model = Net().to(dtype)
        groups = param_groups(model, min_dim=4, verbose=False)
        planned = estimate_memory(
            groups, case.make, step_in_backward=during, accumulation_steps=micro_batches, **options
        )
        optimizer = case.make(param_groups(model, min_dim=4, verbose=False), **options)
        if during:
            lowrank_optim.step_in_backward(model, optimizer, micro_batches)
        for _ in range(2):
            measured = most_gradients(model, optimizer, micro_batches)
        assert measured == planned.gradients
        sizes = [p.nbytes for p in model.parameters()]
        assert planned.gradients >= max(sizes)
        assert (planned.gradients == max(sizes)) == (during and micro_batches == 1)


def test_stacked_matrices_wait_for_each_other_during_backward(monkeypatch):
    shapes = [(64, 48)] * 10
    for limit, waiting in ((64 << 20, 10), (3 * 64 * 48 * 4, 4)):
        monkeypatch.setattr("lowrank_optim.engine.limits.CHUNK_BYTES", limit)
        planned = estimate_memory(shapes, lowrank_optim.GaLoreAdamW, rank=4, foreach=True, step_in_backward=True)
        assert planned.gradients == waiting * 64 * 48 * 4


def test_options_of_gradients_that_cannot_be_estimated():
    with pytest.raises(ValueError, match=r"step_in_backward takes optimizers of lowrank_optim, got AdamW"):
        estimate_memory([(8, 8)], torch.optim.AdamW, step_in_backward=True)
    for steps in (0, 1.5, True):
        with pytest.raises(ValueError, match="accumulation_steps must be an int >= 1"):
            estimate_memory([(8, 8)], lowrank_optim.GaLoreAdamW, rank=2, accumulation_steps=steps)
    planned = estimate_memory([(8, 8), (4, 8)], torch.optim.AdamW, accumulation_steps=2)
    assert planned.gradients == (64 + 32 + 64) * 4


def step_peak(case, params, refresh, steps=2, **options):
    """Of the step after `steps` others."""
    optimizer = case.build(params, update_proj_gap=1 if refresh else 1000, **{"orthonormal": True, **options})
    for step in range(steps + 1):
        for p in params:
            p.grad = torch.randn_like(p)
        if step < steps:
            optimizer.step()
    with Peak() as peak:
        optimizer.step()
    return peak.most


@pytest.mark.thin
@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("basis", ["svd", "rsvd"])
def test_a_steps_extra_memory_is_what_was_estimated(case, dtype, basis, monkeypatch):
    shape, rank = (384, 256), 32
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for _ in range(8)]
    options = case.fitting({"rank": rank, "basis": basis, "orthonormal": True, "density": 0.01})
    planned = estimate_memory([shape] * 8, case.make, dtype=dtype, **{**case.kwargs, **options})
    assert step_peak(case, params, refresh=False, **options) <= planned.step_workspace + 4096
    for module in (
        ops.philox,
        ops.quantize,
        ops.rounding,
        write,
        ops.factored,
        ops.reductions,
        ops.scaled,
    ):  # native kernels take less: plain torch is what was estimated
        monkeypatch.setattr(module, "kernel", lambda name: getattr(ops.reference, name))
    steady = step_peak(case, params, refresh=False, **options)
    assert 0.4 * planned.step_workspace < steady <= planned.step_workspace + 4096
    assert steady < 8 * shape[0] * shape[1] * 4, "never a copy of all gradients"
    if not case.make.ranked:
        return
    refresh = max(step_peak(case, params, refresh=True, steps=steps, **options) for steps in (0, 2))  # the first, later
    assert 0.4 * planned.refresh_workspace < refresh <= planned.refresh_workspace + planned.step_workspace


@pytest.mark.cpus
@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize("onednn", [False, True])
def test_estimates_hold_whichever_library_multiplies(case, onednn, monkeypatch):
    """oneDNN holds a block of the product, MKL holds none: the processor decides which of them it is."""
    monkeypatch.setattr("lowrank_optim.ops.products.onednn_is_faster", lambda: onednn)
    for module in (ops.philox, ops.quantize, ops.rounding, write, ops.factored, ops.reductions, ops.scaled):
        monkeypatch.setattr(module, "kernel", lambda name: getattr(ops.reference, name))
    for shape in ((384, 256), (200, 600)):
        options = case.fitting({"rank": 32, "orthonormal": True, "density": 0.01})
        planned = estimate_memory([shape] * 3, case.make, **{**case.kwargs, **options})
        params = [nn.Parameter(torch.randn(shape)) for _ in range(3)]
        steady = step_peak(case, params, refresh=False, **options)
        assert 0.4 * planned.step_workspace < steady <= planned.step_workspace + 4096


@pytest.mark.few(case=FEW)
@every_case
def test_memory_of_lists_is_what_was_estimated(case):
    """R, D and what is derived, of as many small matrices as stay in cache."""
    shape, rank, count = (48, 40), 36, 50
    options = case.fitting({"rank": rank, "orthonormal": True})
    planned = estimate_memory([shape] * count, case.make, **{**case.kwargs, **options}).step_workspace
    alone = estimate_memory([shape], case.make, **{**case.kwargs, **options}).step_workspace
    params = [nn.Parameter(torch.randn(shape)) for _ in range(count)]
    measured = step_peak(case, params, refresh=False, **options)
    assert measured <= planned + 4096 + 256 * count  # the last: numbers per matrix, such as norms
    if planned > alone:
        assert 0.4 * planned < measured


@pytest.mark.thin
@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize(
    ("shape", "rank", "options"),
    [
        ((512, 512), 4, {}),
        ((512, 256), 4, {"maximize": True}),
        ((512, 512), 64, {"state_dtype": "bfloat16"}),
        ((512, 256), 64, {"proj_type": "full"}),
        ((12, 128, 96), 8, {"dtype": torch.bfloat16}),
    ],
)
def test_estimates_hold_with_every_option(case, shape, rank, options):
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for _ in range(3)]
    options = case.fitting({"rank": rank, "orthonormal": True, **options})
    planned = estimate_memory([shape] * 3, case.make, dtype=dtype, **{**case.kwargs, **options})
    for refresh in (False, True):
        allowed = planned.step_workspace + (planned.refresh_workspace if refresh else 0)
        assert step_peak(case, params, refresh, **options) <= allowed + 4096


@pytest.mark.few(case=FEW)
@every_case
def test_a_step_of_a_large_stack_stays_within_chunks(case, monkeypatch):
    experts = nn.Parameter(torch.randn(40, 32, 64, dtype=torch.bfloat16))
    monkeypatch.setattr("lowrank_optim.engine.limits.CHUNK_BYTES", 4 * 4 * 32 * 64)
    most = step_peak(case, [experts], refresh=False, rank=4, bf16_update="none")
    assert most < 10 * 4 * 4 * 32 * 64, "gradients, weights and their like of four experts, not of forty"
    options = {**case.kwargs, **case.fitting({"rank": 4, "bf16_update": "none", "orthonormal": True})}
    assert most <= estimate_memory([experts.shape], case.make, dtype=experts.dtype, **options).step_workspace + 4096


@pytest.mark.few(case=FEW)
@every_case
def test_stacks_stay_within_the_chunk(case, monkeypatch):
    monkeypatch.setattr("lowrank_optim.engine.limits.CHUNK_BYTES", 2 * 64 * 48 * 4)
    params = [nn.Parameter(torch.randn(64, 48)) for _ in range(20)]
    most = step_peak(case, params, refresh=False, rank=4, foreach=True)
    assert most < 9 * 2 * 64 * 48 * 4, "gradients, weights and squares of two matrices, not of twenty"


def test_a_resumed_basis_is_compact_too():
    model = Net()
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), basis="svd")
    train(model, optimizer, 2)
    before = state_bytes(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert state_bytes(optimizer) == before


def test_cases_have_formulas():
    assert all(case.kept(8, 9, 2).bytes("float32", small=False) > 0 for case in CASES)
