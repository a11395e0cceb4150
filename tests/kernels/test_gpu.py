"""Tests that need a GPU: its kernels are the CPU's to the last bit, and methods, graphs and resuming work there.

`LOWRANK_OPTIM_TEST_DEVICE=cpu` runs the same tests, but for what CUDA alone has, so that none is run for the first time
on a rented machine. `python -m benchmarks.gpu_check` runs them before it measures.
"""

from __future__ import annotations

import copy
import io
import os

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim import backend_info
from lowrank_optim.ops import schema
from tests.cases import CASES, Net, every_case, gradients
from tests.support.calls import CALLS, DIRECTION, copied, tensors_of, ulps

DEVICE = torch.device(os.environ.get("LOWRANK_OPTIM_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no GPU")
only_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="of CUDA alone")
STEPS = 12


def moved(arguments):
    def move(x):
        return x.to(DEVICE) if isinstance(x, torch.Tensor) else [move(one) for one in x] if isinstance(x, list) else x

    return [move(x) for x in arguments]


# -- kernels -----------------------------------------------------------------------------------------------------------


@only_cuda
def test_native_kernels_are_loaded():
    said = backend_info()[DEVICE.type]
    assert said.kernels == "native", said


@pytest.mark.parametrize("name", sorted(CALLS.keys() - schema.CPU_ONLY))
@pytest.mark.parametrize("shape", [(1,), (0, 5), (3, 167), (1, 2, 1000), (64, 4096)])
def test_kernels_are_those_of_the_cpu_to_the_last_bit(name, shape):
    for variant in range(4):
        arguments = CALLS[name](shape, variant)
        theirs, ours = copied(arguments), copied(moved(arguments), misalign=variant == 1)
        getattr(torch.ops.lowrank_optim, name).default(*theirs)
        getattr(torch.ops.lowrank_optim, name).default(*ours)
        for (i, x), (_, y) in zip(tensors_of(ours), tensors_of(theirs), strict=True):
            if variant == 3 and DIRECTION.get(name) == i and y.dtype == torch.float64:
                assert ulps(x.cpu(), y) <= 8, "a count on the GPU is the exponent of the GPU's own power in double"
            else:
                assert torch.equal(x.cpu(), y), f"argument {i} of {name}"


def test_random_numbers_are_those_of_the_cpu():
    from lowrank_optim import ops

    key, stream = ops.key_of(3, "layer.weight"), ops.stream_of("test", 1)
    here, there = (ops.normal((1000, 37), key, stream, device) for device in ("cpu", DEVICE))
    assert ulps(here, there.cpu()) <= 1


# -- methods -----------------------------------------------------------------------------------------------------------

# name, shape, rank: tall, wide, equal ones to be stacked, experts, in full space
WEIGHTS = [
    ("tall", (48, 20), 6), ("wide", (18, 44), 5), ("one", (24, 24), 7), ("two", (24, 24), 7), ("stack", (3, 14, 26), 4),
    ("bias", (13,), None), ("table", (30, 16), None),
]  # fmt: skip


def groups_of(params):
    return [{"params": [(name, p)], "rank": rank} for (name, _, rank), p in zip(WEIGHTS, params, strict=True)]


def trained(case, device, steps=STEPS, dtype=torch.float64, **options):
    """The weights after some steps on the same gradients, and what made them."""
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=torch.float64).div(4) for _, shape, _ in WEIGHTS]
    grads = [gradients(shape, steps, torch.float64) for _, shape, _ in WEIGHTS]
    params = [nn.Parameter(w.to(device, dtype)) for w in start]
    optimizer = case.build(groups_of(params), **options)
    for step in range(steps):
        for p, some in zip(params, grads, strict=True):
            p.grad = some[step].to(device, dtype)
        optimizer.step()
    return params, optimizer, grads


@every_case
@pytest.mark.parametrize("foreach", [True, False])
def test_methods_train_as_on_the_cpu(case, foreach):
    """In float64, so that a difference is an error and not rounding that a refresh magnified."""
    ours, theirs = trained(case, DEVICE, foreach=foreach)[0], trained(case, "cpu")[0]
    for (name, _, _), p, q in zip(WEIGHTS, ours, theirs, strict=True):
        torch.testing.assert_close(
            p.detach().cpu(), q.detach(), rtol=1e-7, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


@every_case
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_a_resumed_run_is_the_run(case, state_dtype, monkeypatch):
    """bfloat16 weights, across a refresh, through a file."""
    monkeypatch.setattr("lowrank_optim.recipe.plan._LEAST_QUANTIZED", 1)
    params, optimizer, grads = trained(case, DEVICE, 5, torch.bfloat16, state_dtype=state_dtype)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    again = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = case.build(groups_of(again), state_dtype=state_dtype)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(4):
        for some, one in ((params, optimizer), (again, resumed)):
            for p, g in zip(some, grads, strict=True):
                p.grad = g[step].to(DEVICE, torch.bfloat16)
            one.step()
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lowrank_optim.GaLoreAdamW, lowrank_optim.GaLoreAdamW8bit, lowrank_optim.FiraAdamW])
def test_a_step_needs_little_memory(make, dtype, monkeypatch):
    """Between refreshes: some chunks of float32, however many and however large the weights are."""
    from lowrank_optim.memory.peak import measure

    monkeypatch.setattr("lowrank_optim.engine.limits.CHUNK_BYTES", 1 << 20)
    params = [nn.Parameter(torch.randn(512, 512, device=DEVICE).to(dtype)) for _ in range(24)]
    optimizer = make(params, rank=64, stagger=False)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    peak = measure(optimizer.step, optimizer, DEVICE, list)
    whole = sum(4 * p.numel() for p in params)
    assert peak.whole < whole / 3, "a second copy of all gradients is 1"


# -- graphs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "ldadam"], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@only_cuda
def test_a_captured_step_is_the_step(case, dtype):
    """Across refreshes, with a changing lr, and with noise of its own in each step."""
    torch.manual_seed(0)
    models = [Net().to(DEVICE, dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    live, replayed = (
        case.build(model.named_parameters(), capturable=True, update_proj_gap=4, lr=torch.tensor(0.01, device=DEVICE))
        for model in models
    )
    graph = None
    for step in range(11):
        for model, optimizer in zip(models, (live, replayed), strict=True):
            _static_gradients(model, step)
            for group in optimizer.param_groups:
                group["lr"].fill_(0.01 * 0.8**step)
            if optimizer is live or step < 2:
                optimizer.step()
                continue
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    optimizer.step()
            assert optimizer.prepare()
            graph.replay()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q), name


def _static_gradients(model, step):
    """As a graph of forward and backward leaves them: always in the same memory."""
    tokens = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(step)).to(DEVICE)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()
    logits = model(tokens[:, :-1]).float()
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()


# -- the training loop -------------------------------------------------------------------------------------------------


def test_step_in_backward_on_this_device():
    torch.manual_seed(0)
    models = [Net().to(DEVICE) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    plain, inside = (lowrank_optim.GaLoreAdamW(model.named_parameters(), rank=3) for model in models)
    lowrank_optim.step_in_backward(models[1], inside)
    for step in range(6):
        for model, optimizer in zip(models, (plain, inside), strict=True):
            optimizer.zero_grad()
            tokens = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(step)).to(DEVICE)
            logits = model(tokens[:, :-1]).float()
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-4, atol=2e-5)


def test_an_optimizer_moves_with_its_model():
    """From the CPU to the GPU in the middle of a run, as `model.to(device)` does it."""
    case = CASES[0]
    params, optimizer, grads = trained(case, "cpu", 5)
    others, other, _ = trained(case, "cpu", 5)
    for p in params:
        p.data = p.data.to(DEVICE)
        p.grad = None
    for step in range(5, 5 + 4):
        for some, one in ((params, optimizer), (others, other)):
            for p, g in zip(some, grads, strict=True):
                p.grad = g[step % 5].to(p.device, p.dtype)
            one.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["ReLoRA", "LowRankAdamW", "SLTrain", "LoQT", "SST"])
def test_weight_space_methods_train_as_on_the_cpu(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16)).double()
    ends = []
    for device in ("cpu", DEVICE):
        one = copy.deepcopy(model).to(device)
        optimizer = getattr(lowrank_optim, name)(one, rank=4, lr=1e-3)
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64).to(device) for n in (24, 16))
            optimizer.zero_grad()
            (one(x) - y).square().mean().backward()
            optimizer.step()
        ends.append(one(torch.ones(2, 24, dtype=torch.float64, device=device)).cpu())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)
