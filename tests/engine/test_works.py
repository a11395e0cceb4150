"""What a stepper keeps between steps is what it would decide again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim import step_in_backward
from lowrank_optim.engine import grouping
from tests.cases import every_case

SHAPES = [(24, 32), (24, 32), (40, 16), (3, 20, 24), (32,), ()]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def run(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape).to(p.dtype)
        optimizer.step()


@pytest.fixture
def decisions(monkeypatch):
    """How many members each decision was about."""
    found = []
    works = grouping.works
    monkeypatch.setattr(grouping, "works", lambda members, *rest: found.append(len(members)) or works(members, *rest))
    return found


def test_a_steady_step_decides_nothing(decisions):
    params = parameters()
    optimizer = lowrank_optim.GaLoreAdamW(params, lr=0.01, rank=4, update_proj_gap=100, stagger=False)
    run(optimizer, params, 2)
    decisions.clear()
    run(optimizer, params, 5, first=2)
    assert not decisions


@pytest.mark.parametrize(
    "edit",
    [
        lambda group, p: group.update(betas=(0.3, 0.5)),
        lambda group, p: group.update(maximize=True),
        lambda group, p: group.update(foreach=True),
        lambda group, p: group.update(scale=3.0),
        lambda group, p: setattr(p, "data", p.data.double()),
        lambda group, p: setattr(p, "data", p.data.mT.contiguous().mT),
    ],
    ids=["betas", "maximize", "foreach", "scale", "dtype", "strides"],
)
def test_an_edit_is_seen_by_the_next_step(edit):
    """As by an optimizer whose stepper has kept nothing."""
    kept, fresh = parameters(), parameters()
    ours, theirs = (lowrank_optim.GaLoreAdamW(params, lr=0.01, rank=4, update_proj_gap=100) for params in (kept, fresh))
    run(ours, kept, 4), run(theirs, fresh, 4)
    for optimizer, params in ((ours, kept), (theirs, fresh)):
        edit(optimizer.param_groups[0], params[0])
    theirs._serve(theirs.table, theirs.stepper.watch)
    before = [p.detach().clone() for p in kept]
    run(ours, kept, 3, first=4), run(theirs, fresh, 3, first=4)
    assert all(torch.equal(p, q) for p, q in zip(kept, fresh, strict=True))
    assert not any(torch.equal(p, w) for p, w in zip(kept, before, strict=True))


def test_a_matrix_that_missed_a_step_has_a_clock_of_its_own():
    """It was updated with others, from which it then differs by a step."""
    kept, alone = parameters(), parameters()
    together = lowrank_optim.GaLoreAdamW(kept, lr=0.01, rank=4, update_proj_gap=100, stagger=False)
    apart = [
        lowrank_optim.GaLoreAdamW([{"params": [p], "rank": 4}, {"params": [q], "rank": 4}], lr=0.01, stagger=False)
        for p, q in ((alone[0], nn.Parameter(torch.randn(20, 24))),)
    ]
    for step in range(8):
        torch.manual_seed(step)
        for p in kept:
            p.grad = torch.randn(p.shape)
        alone[0].grad = kept[0].grad.clone()
        if step in (3, 4):
            kept[0].grad = alone[0].grad = None
        together.step()
        apart[0].step()
    assert int(together.state[kept[0]]["step"]) == 6
    assert int(together.state[kept[1]]["step"]) == 8
    assert torch.allclose(kept[0], alone[0], atol=1e-6)


@every_case
def test_recipes_do_not_depend_on_lr(case):
    """So they can be kept while a scheduler changes it."""
    optimizer = case.build([nn.Parameter(torch.randn(24, 32))])
    group = optimizer.param_groups[0]
    before = optimizer.recipe(group), optimizer.plain(group)
    assert (optimizer.recipe({**group, "lr": 17.0}), optimizer.plain({**group, "lr": 17.0})) == before


def test_an_optimizer_has_one_mode_at_a_time():
    model = nn.Linear(24, 32)
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), lr=0.01, rank=4)
    handle = step_in_backward(model, optimizer)
    with pytest.raises(ValueError, match="steps during backward already"):
        step_in_backward(model, optimizer)
    assert optimizer.mode is handle
    assert copy.deepcopy(optimizer).mode is None
    handle.remove()
    assert optimizer.mode is None


def test_tensors_that_are_refused_are_refused_at_every_step():
    """A wrapper has put copies in place of parameters, which a captured step cannot serve."""
    p = nn.Parameter(torch.randn(24, 32))
    optimizer = lowrank_optim.GaLoreAdamW([p], lr=0.01, rank=4, capturable=True)
    copy_of_p = nn.Parameter(p.detach().clone())
    optimizer.param_groups[0]["params"] = [copy_of_p]
    copy_of_p.grad = torch.randn(24, 32)
    for _ in range(3):
        with pytest.raises(NotImplementedError, match="capturable=True"):
            optimizer.step()
    assert torch.equal(copy_of_p, p)
