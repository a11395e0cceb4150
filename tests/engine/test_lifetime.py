"""An optimizer that is deleted is gone at once, and its memory with it: nothing refers back to it but weakly."""

from __future__ import annotations

import copy
import gc
import weakref

import torch
from torch import nn

import lowrank_optim
from lowrank_optim import step_in_backward
from tests.cases import CASES
from tests.cases import every_case as every_method
from tests.weight_cases import every_case as every_weight_method
from tests.weight_cases import net, train


def deleted(made) -> list[bool]:
    """Whether optimizers that `made` yields are gone when the last name for them is; the collector does not run."""
    gc.collect()
    gc.disable()
    try:
        references = [weakref.ref(optimizer) for optimizer in made()]
        return [reference() is None for reference in references]
    finally:
        gc.enable()


def used(make, **options):
    """An optimizer that has done everything once, and its copy."""
    p = nn.Parameter(torch.randn(24, 32))
    optimizer = make([p], **options)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.report(), optimizer.stats()
    return optimizer, copy.deepcopy(optimizer)


@every_method
def test_a_deleted_optimizer_is_gone(case):
    used(CASES[0].make, **CASES[0].kwargs)  # torch keeps the first optimizer that a process loads state into
    assert deleted(lambda: used(case.make, **case.kwargs)) == [True, True]


@every_weight_method
def test_a_deleted_optimizer_of_converted_layers_is_gone(case):
    def made():
        model = net()
        optimizer = case.build(model)
        train(model, optimizer, 2)
        return [optimizer]

    assert deleted(made) == [True]


def test_a_handle_that_was_removed_keeps_nothing():
    def made():
        model = nn.Linear(24, 32)
        optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), lr=1e-3, rank=4)
        with step_in_backward(model, optimizer):
            model(torch.randn(4, 24)).sum().backward()
            optimizer.step()
        return [optimizer]

    assert deleted(made) == [True]
