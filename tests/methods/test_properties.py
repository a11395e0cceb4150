"""For any shape, rank, dtype and option: finite weights, state as planned, bit-exact resume."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_optim import estimate_memory, state_bytes
from lowrank_optim.recipe.plan import as_matrices, resolve_rank, resolve_side
from tests.cases import CASES

sides = st.one_of(st.integers(1, 40), st.integers(60, 90))
shapes = st.one_of(
    st.tuples(sides),
    st.tuples(sides, sides),
    st.tuples(st.integers(1, 4), sides, sides),
    st.tuples(sides, st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)),
)
ranks = st.one_of(st.integers(1, 50), st.floats(0.01, 1.0))
options = st.fixed_dictionaries(
    {
        "proj_type": st.sampled_from(["std", "reverse_std", "left", "right", "full"]),
        "basis": st.sampled_from(["svd", "rsvd"]),
        "moments": st.sampled_from(["keep", "rotate", "reset"]),
        "stagger": st.booleans(),
        "update_proj_gap": st.integers(1, 5),
        "state_dtype": st.sampled_from(["float32", "bfloat16", "int8", "int4"]),
        "bf16_update": st.sampled_from(["stochastic", "kahan", "none"]),
        "foreach": st.sampled_from([None, True, False]),
        "maximize": st.booleans(),
        "scale": st.floats(0.1, 4.0),
    }
)


given_any_matrix = given(
    case=st.sampled_from(CASES),
    shape=shapes,
    rank=ranks,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    kwargs=options,
    zero=st.sampled_from(["", "rows", "all at first", "expert"]),
)


@settings(max_examples=40, deadline=None)
@given_any_matrix
def test_any_matrix(case, shape, rank, dtype, kwargs, zero):
    check_matrix(case, shape, rank, dtype, kwargs, zero)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given_any_matrix
def test_any_of_many_matrices(case, shape, rank, dtype, kwargs, zero):
    check_matrix(case, shape, rank, dtype, kwargs, zero)


def check_matrix(case, shape, rank, dtype, kwargs, zero):
    """Train a matrix for some steps and continue a copy of it; hold both against the plan and the estimate."""
    anchor, p = nn.Parameter(torch.randn(9, 9)), nn.Parameter(torch.randn(shape, dtype=dtype))
    kwargs = {**case.kwargs, **case.fitting({**kwargs, "orthonormal": True, "limit": 1.01}), "lr": 1e-3}
    optimizer = case.make([{"params": [anchor], "rank": 2}, {"params": [p], "rank": rank}], **kwargs)
    groups = [{"params": [("a", anchor)], "rank": 2}, {"params": [("p", p)], "rank": rank}]
    planned = estimate_memory(groups, case.make, **kwargs)
    assert planned.optimizer == state_bytes(optimizer)
    twin = None
    for step in range(7):
        grad = torch.randn(shape).to(dtype)
        if (zero == "rows") or (zero == "all at first" and step == 0) or (zero == "expert" and len(shape) == 3):
            grad[0] = 0
        if step == 4:
            twin, twin_p, twin_anchor = copy.deepcopy((optimizer, p, anchor))
            twin.load_state_dict(optimizer.state_dict())
        anchor.grad, p.grad = torch.randn(9, 9), grad
        optimizer.step()
        if twin is not None:
            twin_p.grad, twin_anchor.grad = grad.clone(), anchor.grad.clone()
            twin.step()
    assert p.isfinite().all()
    assert torch.equal(p, twin_p)
    assert state_bytes(optimizer) == planned.optimizer
    row = optimizer.report()[1]
    _, rows, columns = as_matrices(torch.Size(shape), "auto")
    assert (row.rank is None) == bool(row.reason)
    if row.rank is not None:
        assert not case.make.ranked or row.rank == resolve_rank(rank, rows, columns) < min(rows, columns)
    if row.rank is not None and case.basis == "basis" and case.name != "q_galore":
        basis = optimizer.state[p]["basis"].double()
        gram = basis.mT @ basis
        built = optimizer.state[p]["refreshes"] > 0
        tolerance = 1e-4 if kwargs["state_dtype"] == "float32" else 0.05
        assert (gram - torch.eye(row.rank))[built].abs().max() < tolerance if built.any() else not basis.any()


@given(rows=sides, columns=sides, proj_type=st.sampled_from(["std", "reverse_std"]))
def test_sides(rows, columns, proj_type):
    side = resolve_side(proj_type, rows, columns)
    projected = columns if side == "right" else rows
    assert projected == (min if proj_type == "std" else max)(rows, columns)
    assert resolve_side("std", rows, columns) != resolve_side("reverse_std", rows, columns)


@given(shape=shapes, rule=st.sampled_from(["auto", "flatten", "batch"]))
def test_matrices_use_every_element_once(shape, rule):
    batch, rows, columns = as_matrices(torch.Size(shape), rule)
    assert math.prod(batch) * rows * columns == math.prod(shape)
