"""Engine == the paper's loop, over shapes, sides, bases and what refreshes do to the moments."""

from __future__ import annotations

import inspect

import pytest
import torch

from lowrank_optim import ops
from lowrank_optim.recipe.plan import resolve_side
from tests.cases import CASES, SHAPES, TOLERANCE, every_case, gradients, ranked
from tests.reference import galore

STEPS = 20
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "fp64"])


def problem(shape, dtype):
    """A weight of the size that layers are initialised with, and gradients."""
    return 0.2 * torch.randn(shape, dtype=dtype), gradients(shape, STEPS, dtype)


def well_posed(case, proj_type):
    """With both sides projected, R at a refresh is diagonal, and off its diagonal Adam scales rounding noise to size 1.
    That is GaLore's own ill-conditioning; an eps above the noise keeps it out of the comparison."""
    return {"eps": 0.1} if proj_type == "full" and case.name == "galore_adamw" else {}


def engine(case, weight, grads, **overrides):
    """A second, vector parameter lets a matrix that cannot be projected stand next to one that can."""
    p, other = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(torch.zeros(8, 8, dtype=weight.dtype))
    optimizer = case.build([("w", p), ("other", other)], seed=5, **overrides)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach(), optimizer


def expected(case, weight, grads, rank, side, **overrides):
    def normal(shape, count, purpose="sketch"):
        stream = ops.stream_of(f"{purpose} 0", count)
        return ops.normal(shape, ops.key_of(5, "w"), stream).to(weight.dtype)

    options = {**case.reference_kwargs, **overrides}
    if "normal" in inspect.signature(case.reference).parameters:
        options["normal"] = normal
    return case.reference(weight, grads, {0, 7, 14}, rank=rank, side=side, **options)


@every_case
@every_dtype
@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize(("shape", "rank"), [s for s in SHAPES if s[1] < min(s[0])])
def test_engine_equals_the_papers_loop(case, dtype, shape, rank, proj_type, stagger):
    if not case.has("proj_type", proj_type):
        proj_type = "std"
    weight, grads = problem(shape, dtype)
    options = well_posed(case, proj_type)
    got, _ = engine(case, weight, grads, rank=rank, proj_type=proj_type, basis="svd", stagger=stagger, **options)
    want = expected(case, weight, grads, rank, resolve_side(proj_type, *shape), **options)
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])


VARIANTS = [
    pytest.param(case, *variant, id=f"{case.name}-{'-'.join(f'{key}={x}' for key, x in variant[0].items())}")
    for case in CASES
    for variant in case.variants
]


@every_dtype
@pytest.mark.parametrize(("case", "options", "loop"), VARIANTS)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
@pytest.mark.parametrize(("shape", "rank"), [s for s in SHAPES if s[1] < min(s[0])])
def test_every_option_equals_the_loop_with_it(case, options, loop, dtype, shape, rank, proj_type):
    if not case.has("proj_type", proj_type):
        proj_type = "std"
    weight, grads = problem(shape, dtype)
    got, _ = engine(case, weight, grads, **{"rank": rank, "proj_type": proj_type, "basis": "svd", **options})
    want = expected(case, weight, grads, rank, resolve_side(proj_type, *shape), **loop)
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])
    if dtype == torch.float64 and loop and rank > 1:
        base = expected(case, weight, grads, rank, resolve_side(proj_type, *shape))
        assert (want - base).abs().max() > 1e-6, "the option must make a difference here, or the test shows nothing"


@every_dtype
@pytest.mark.parametrize("case", [case for case in CASES if case.name.startswith("galore_ada")], ids=lambda c: c.name)
@pytest.mark.parametrize(("shape", "rank"), [s for s in SHAPES if s[1] < min(s[0])])
def test_randomized_basis_equals_its_loop(case, dtype, shape, rank):
    weight, grads = problem(shape, dtype)

    def normal(shape, count):
        return ops.normal(shape, ops.key_of(5, "w"), ops.stream_of("sketch 0", count)).to(dtype)

    got, _ = engine(case, weight, grads, rank=rank, basis="rsvd")
    want = expected(case, weight, grads, rank, resolve_side("std", *shape), fit=galore.randomized(normal))
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])


@every_dtype
@pytest.mark.parametrize("moments", ["rotate", "reset"])
@pytest.mark.parametrize("proj_type", ["std", "full"])
@pytest.mark.parametrize(("shape", "rank"), SHAPES[:3])
def test_moments_at_a_refresh(dtype, shape, rank, proj_type, moments):
    case = CASES[0]
    weight, grads = problem(shape, dtype)
    options, side = well_posed(case, proj_type), resolve_side(proj_type, *shape)
    got, _ = engine(case, weight, grads, rank=rank, proj_type=proj_type, basis="svd", moments=moments, **options)
    want = expected(case, weight, grads, rank, side, moments=moments, **options)
    kept = expected(case, weight, grads, rank, side, **options)
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])
    assert (got - kept).abs().max() > 1e-3, "the option must make a difference here, or the test shows nothing"


@ranked
@every_dtype
@pytest.mark.parametrize("shape_rank", [s for s in SHAPES if s[1] >= min(s[0])])
def test_a_rank_that_saves_nothing_is_the_rule_in_full_space(case, dtype, shape_rank):
    shape, rank = shape_rank
    weight, grads = problem(shape, dtype)
    make, options, overrides = case.full
    got, optimizer = engine(case, weight, grads, rank=rank if max(shape) > 8 or rank < 8 else 7, **overrides)
    p = torch.nn.Parameter(weight.clone())
    full = make([p], **options)
    for grad in grads:
        p.grad = grad.clone()
        full.step()
    torch.testing.assert_close(got, p.detach(), **TOLERANCE[dtype])
    assert not optimizer.report()[0].rank


@every_dtype
def test_beta1_of_adafactor(dtype):
    case = next(case for case in CASES if case.name == "galore_adafactor")
    for options in (dict(parameter=False, relative=False), dict(parameter=True, relative=False)):
        weight, grads = problem((24, 10), dtype)
        names = dict(scale_parameter=options["parameter"], relative_step=options["relative"])
        got, _ = engine(case, weight, grads, rank=4, basis="svd", beta1=0.6, lr=0.01, **names)
        want = expected(case, weight, grads, 4, "right", beta1=0.6, lr=0.01, **options)
        torch.testing.assert_close(got, want, **TOLERANCE[dtype])
