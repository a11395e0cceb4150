"""ddp_project on GPUs, where a sum is complete for the host before it is there: one process whose sums come late."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lowrank_optim import ddp_project
from tests.cases import CASES, Net

GALORE = next(case for case in CASES if case.name == "galore_adamw")


class Underway(torch.futures.Future):
    """Complete at once, as those of NCCL. Its tensor is there for who waits, and in a callback of its own."""

    def __init__(self, flat):
        super().__init__()
        self.flat, self.sum = flat, flat.clone()
        flat.fill_(torch.nan)
        self.set_result([flat])

    def wait(self):
        self.flat.copy_(self.sum)
        return super().wait()

    def then(self, callback):
        self.flat.copy_(self.sum)
        return super().then(callback)


class Work:
    def __init__(self, flat):
        self.future = Underway(flat)

    def get_future(self):
        return self.future


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses(model, optimizer, backward_passes=1):
    found = []
    for step in range(9):  # refreshes before steps 0 and 7
        optimizer.zero_grad()
        for k in range(backward_passes):
            tokens = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(10 * step + k))
            logits = model(tokens[:, :-1]).float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # R is sent in float32, next to values in bfloat16
def test_sums_that_come_late_are_waited_for(alone, monkeypatch, dtype, passes):
    found = []
    for late in (False, True):
        torch.manual_seed(0)
        model = Net().to(dtype)
        optimizer = GALORE.build(model.named_parameters())
        wrapped = DistributedDataParallel(model)
        ddp_project(wrapped, optimizer)
        if late:
            monkeypatch.setattr("lowrank_optim.modes.ddp_project.dist.all_reduce", lambda flat, **_: Work(flat))
        found.append(losses(wrapped, optimizer, passes))
        assert all(int(state["skipped"]) == 0 for state in optimizer.state.values())
    assert found[0] == found[1]
