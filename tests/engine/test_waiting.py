"""Between refreshes a step on a GPU waits for one thing, the norms of its gradients; a captured one for nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.cases import capturable_cases, every_case
from tests.support.fake_gpu import FakeGPU
from tests.support.selection import FEW

# tall, equal ones to be stacked, experts whose moments restart at times of their own, in full space
WEIGHTS = [("tall", (48, 20), 6), ("one", (24, 24), 7), ("two", (24, 24), 7), ("stack", (3, 14, 26), 4)]
WEIGHTS += [("bias", (13,), None), ("other", (13,), None), ("table", (30, 16), None)]
NORMS = "numbers are fetched in gradient_norms"


@pytest.fixture(autouse=True)
def kernels_of_gpus(monkeypatch):
    monkeypatch.setattr("lowrank_optim.engine.fused._DEVICES", ("meta",))


def waits(case, dtype, steps, **options):
    """What each step waits for; the first one has a refresh."""
    params = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for _, shape, _ in WEIGHTS]
    groups = [{"params": [(name, p)], "rank": rank} for (name, _, rank), p in zip(WEIGHTS, params, strict=True)]
    found = []
    with FakeGPU() as gpu:
        optimizer = case.build(groups, update_proj_gap=50, stagger=False, **options)
        for _ in range(steps):
            for p in params:
                p.grad = torch.empty_like(p)
            gpu.waits = []
            optimizer.step()
            found.append(gpu.waits)
    return optimizer, found


def where(said):
    return [one.partition(":")[0] for one in said]


@pytest.mark.thin
@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float32, {"moments": "reset"}), (torch.bfloat16, {"state_dtype": "int8"})], ids=str
)
def test_a_step_waits_for_the_norms_alone(case, dtype, options):
    _, (first, later) = waits(case, dtype, 2, **options)
    assert where(first).count(NORMS) == 1
    assert where(later) == [NORMS]


@pytest.mark.few(case=FEW)
@capturable_cases
def test_a_captured_step_waits_for_nothing(case, monkeypatch):
    optimizer, (_, later) = waits(case, torch.bfloat16, 2, capturable=True)
    assert where(later) == [NORMS], "the host's part"
    monkeypatch.setattr("lowrank_optim.engine.captured.capturing", lambda: True)
    with FakeGPU() as gpu:
        optimizer.step()
    assert gpu.waits == []
    assert gpu.sent == []


def test_the_fake_gpu_sees_every_wait():
    """The fake GPU itself."""
    x = torch.empty(3, device="meta")
    with FakeGPU() as gpu:
        for ask in (x.sum().item, x.tolist, x.cpu, x.any().__bool__, lambda: x.copy_(torch.ones(3))):
            gpu.waits = []
            ask()
            assert len(gpu.waits) == 1
        gpu.waits = []
        torch.tensor(2.0, device="meta")
        torch.ones(3).to("meta")
        torch.linalg.eigh(torch.empty(3, 3, device="meta"))
        x[torch.tensor([0, 2])]
        assert len(gpu.waits) == 4
        gpu.waits = []
        torch.full((), 2.0, device="meta")
        torch.ones(3).to("meta", non_blocking=True)
        torch.linalg.cholesky_ex(torch.empty(3, 3, device="meta"))
        assert gpu.waits == []
        assert len(gpu.sent) == 1
