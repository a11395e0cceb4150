"""`torch.set_default_device` and `torch.set_default_dtype` change nothing: not where counters are, and no bit."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import lowrank_optim
from tests.cases import every_case, gradients

WEIGHTS = [("tall", (24, 10), 4), ("stack", (3, 9, 12), 3), ("bias", (13,), None)]


@contextlib.contextmanager
def defaults(device, dtype):
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def trained(case, device, dtype):
    """State and weights after some steps; only made with these defaults, and stepped with them."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for _, shape, _ in WEIGHTS]
    grads = [gradients(shape, 5) for _, shape, _ in WEIGHTS]
    for cached in (lowrank_optim.ops.quantize.dynamic_map, lowrank_optim.ops.quantize.dynamic_levels):
        cached.cache_clear()
    with defaults(device, dtype):
        groups = [{"params": [(name, p)], "rank": rank} for (name, _, rank), p in zip(WEIGHTS, params, strict=True)]
        optimizer = case.build(groups, update_proj_gap=4, state_dtype="int8", foreach=True)
        for step in range(5):
            for p, some in zip(params, grads, strict=True):
                p.grad = some[step]
            optimizer.step()
    return [*params, *(x for p in params for x in optimizer.state[p].values())]


@every_case
@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.bfloat16)], ids=str)
def test_defaults_of_torch_change_nothing(case, device, dtype, monkeypatch):
    monkeypatch.setattr("lowrank_optim.recipe.plan._LEAST_QUANTIZED", 1)
    for x, y in zip(trained(case, device, dtype), trained(case, None, torch.float32), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["ReLoRA", "LowRankAdamW", "SLTrain", "LoQT", "SST", "LTE"])
@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.bfloat16)], ids=str)
def test_defaults_of_torch_change_nothing_for_layers(name, device, dtype):
    ends = []
    for defaulted in ((device, dtype), (None, torch.float32)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16))
        x, y = torch.randn(8, 24), torch.randn(8, 16)
        with defaults(*defaulted):
            optimizer = getattr(lowrank_optim, name)(model, rank=4, lr=1e-3)
            for _ in range(3):
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                optimizer.step()
        ends.append(model.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(*(end.values() for end in ends), strict=True))
