"""How much code a step enters: what a reader has to follow, and a part of what the host has to run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_optim

ROOT = str(Path(lowrank_optim.__file__).parent)


def entered(call) -> tuple[set[str], set[tuple[str, str]]]:
    """(files, functions) of the package that a call enters."""
    functions = set()

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            functions.add((frame.f_code.co_filename[len(ROOT) + 1 :], frame.f_code.co_qualname))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {file for file, _ in functions}, functions


def steady(dtype: torch.dtype, **options) -> tuple[set[str], set[tuple[str, str]]]:
    """What a step enters between two refreshes, after the steps in which works were decided."""
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 32)).to(dtype)
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), lr=1e-3, rank=8, **options)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return entered(optimizer.step)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs qualified names of code objects")
@pytest.mark.parametrize(
    ("dtype", "options", "files", "functions"),
    [(torch.float32, {}, 20, 90), (torch.bfloat16, {"state_dtype": "bfloat16"}, 25, 140)],
)
def test_a_steady_step_enters_little(dtype, options, files, functions):
    where, what = steady(dtype, **options)
    assert len(where) <= files, sorted(where)
    assert len(what) <= functions, sorted(what)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs qualified names of code objects")
def test_a_process_that_is_alone_enters_no_code_of_several():
    where, _ = steady(torch.float32)
    assert "engine/stepper.py" in where
    assert not {file for file in where if file.startswith(("distributed/", "wrappers/"))}


def test_the_five_stops_of_a_step_are_entered_in_order():
    """As ARCHITECTURE.md names them."""
    p = nn.Parameter(torch.randn(64, 32))
    optimizer = lowrank_optim.GaLoreAdamW([p], lr=1e-3, rank=8)
    stops = ["optimizer.py", "engine/stepper.py", "engine/in_place.py", "engine/update.py", "parts/"]
    for _ in range(3):
        p.grad, order = torch.randn_like(p), []

        def profile(frame, event, _, order=order):
            name = frame.f_code.co_filename
            if event == "call" and name.startswith(ROOT):
                order.append(name[len(ROOT) + 1 :])

        sys.setprofile(profile)
        optimizer.step()
        sys.setprofile(None)
    for stop in stops:
        found = next(i for i, file in enumerate(order) if file.startswith(stop))
        order = order[found:]
