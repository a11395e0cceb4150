"""DistributedDataParallel: two processes train like one with the joined batch, and stay equal bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.cases import Net, case_of, every_case
from tests.support.processes import Chosen, same_everywhere, shared_gradients, spawn
from tests.support.selection import FEW, selected

STEPS = 16  # refreshes before steps 0, 7 and 14, for most methods
DTYPES = (torch.float32, torch.bfloat16)


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def batch(step):
    return torch.randint(0, 11, (8, 9), generator=torch.Generator().manual_seed(step))


def trained(model, optimizer, rank=0, world=1):
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batch(step).chunk(world)[rank]).backward()
        optimizer.step()


def from_data(case, rank, world):
    """The largest difference from one process with the joined batch, in float64; None if ranks differ."""
    torch.manual_seed(0)
    one = Net().double()
    model = DistributedDataParallel(copy.deepcopy(one))
    trained(model, case.build(model.named_parameters(), moments="rotate"), rank, world)
    if not same_everywhere(model.parameters()):
        return None
    trained(one, case.build(one.named_parameters(), moments="rotate"))
    return max((p - q).abs().max().item() for p, q in zip(model.parameters(), one.parameters(), strict=True))


def from_chosen_gradients(case, rank, dtype):
    """The same where averaging rounds nothing, so that every bit must be that of one process."""
    torch.manual_seed(0)
    one = Chosen(dtype)
    model, grads = DistributedDataParallel(copy.deepcopy(one)), shared_gradients(one, STEPS)
    for twin, shift in ((model, (-1) ** rank / 8), (one, 0)):
        options = {"rank": 4, "state_dtype": "bfloat16"} if dtype == torch.bfloat16 else {"rank": 4}
        optimizer = case.build(twin.named_parameters(), **options)
        for some in grads:
            optimizer.zero_grad()
            twin([(g + shift).to(dtype) for g in some]).backward()
            optimizer.step()
    if not same_everywhere(model.parameters()):
        return None
    return max((p - q).abs().max().item() for p, q in zip(model.parameters(), one.parameters(), strict=True))


def worker(rank, world, cases):
    found = {(case.name, "data"): from_data(case, rank, world) for case in map(case_of, cases)}
    found |= {(name, dtype): from_chosen_gradients(case_of(name), rank, dtype) for name in cases for dtype in DTYPES}
    return found


@pytest.fixture(scope="module")
def results(request):
    return spawn(worker, 2, [case.name for case in selected(request, "case")])


@pytest.mark.few(case=FEW)
@every_case
def test_two_processes_equal_one(case, results):
    got = results[case.name, "data"]
    assert got is not None, "ranks differ"
    assert got < 1e-9


@pytest.mark.few(case=FEW)
@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_is_that_of_one_process_where_averaging_rounds_nothing(case, dtype, results):
    assert results[case.name, dtype] == 0
