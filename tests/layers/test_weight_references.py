"""Engine == the method's plain loop, for weight-space methods, over at least three restarts; weights after each step.

The gradient depends on the weight, so an error would grow; it reaches the factors by autograd, through the layer.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim import ops
from lowrank_optim.layers.quantized import Int8Weight, NF4Weight
from lowrank_optim.ops.linalg import fix_signs
from tests.reference.loqt import loqt, times
from tests.reference.low_rank import low_rank
from tests.reference.relora import relora

STEPS, SEED = 14, 5
SHAPES = [((24, 17), 4), ((17, 24), 3), ((19, 19), 5), ((33, 16), 1)]
TOLERANCE = {torch.float32: dict(rtol=0, atol=1e-6), torch.float64: dict(rtol=0, atol=1e-12)}
# With an eps far below the gradients Adam scales their rounding noise to the size of lr.
ADAMW = dict(lr=0.013, betas=(0.83, 0.97), eps=0.3, weight_decay=0.1)
PACKED = {"int8": Int8Weight, "nf4": NF4Weight}

every_shape = pytest.mark.parametrize(("shape", "rank"), SHAPES)
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "fp64"])


def variants(*options):
    return pytest.mark.parametrize("options", options, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "-")


class Problem:
    """A weight and its gradients: those of `sum(G * W) + |W|^2 / 2`, with another G at each step."""

    def __init__(self, shape, dtype):
        u, _, vh = torch.linalg.svd(torch.randn(STEPS + 1, *shape, dtype=torch.float64), full_matrices=False)
        s = 1.5 * 0.7 ** torch.arange(min(shape), dtype=torch.float64)  # gaps, or singular vectors would be noise
        self.weight, *self.targets = ((u * s) @ vh).to(dtype)

    def gradient(self, w, step):
        return self.targets[step] + w

    def engine(self, make, **options):
        plain = nn.Linear(*reversed(self.weight.shape), bias=False, dtype=self.weight.dtype)
        plain.weight.data.copy_(self.weight)
        model = nn.Sequential(plain)
        optimizer = make(model, seed=SEED, **{**ADAMW, **options})
        weights, eye = [], torch.eye(self.weight.shape[1], dtype=self.weight.dtype)
        for step in range(STEPS):
            optimizer.zero_grad()
            y = model(eye).T
            ((self.targets[step] * y).sum() + y.square().sum() / 2).backward()
            optimizer.step()
            weights.append(model[0].dense().detach())
        assert optimizer.stats()["restarts"] >= 3
        return weights


def agree(got, want, dtype):
    for step, (x, y) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(x, y, **TOLERANCE[dtype], msg=lambda text, step=step: f"step {step}: {text}")


def drawn(shape, purpose, dtype):
    """What torch draws for linear layers: uniform in +-1 / sqrt(columns)."""

    def draw(count):
        u = ops.uniform(shape, ops.key_of(SEED, "0"), ops.stream_of(purpose, count))
        return ((2 * u - 1) * shape[1] ** -0.5).to(dtype)

    return draw


@every_shape
@every_dtype
@variants(
    {}, {"merge_every": 3}, {"merge_every": 1}, {"weight_decay": 0.0}, {"reset": "magnitude", "reset_ratio": 0.7},
    {"reset": "magnitude", "reset_ratio": 1.0}, {"reset": "random", "reset_ratio": 0.6}, {"base": "int8"},
    {"base": "nf4"}, {"base": "nf4", "exact_base": True}, {"base": "int8", "exact_base": True}, {"betas": (0.0, 0.5)},
)  # fmt: skip
def test_relora(shape, rank, dtype, options):
    problem = Problem(shape, dtype)
    options = {"rank": rank, "alpha": 7.0, "merge_every": 4, **options}
    got = problem.engine(lowrank_optim.ReLoRA, **options)
    base, exact = options.pop("base", "dense"), options.get("exact_base", False)

    def rounded(w, count):
        packed = PACKED[base].quantize(w)
        if count and not exact:
            packed.pack_(w, ops.key_of(SEED, "0"), ops.stream_of("merge", count))
        return packed.unpack()

    def chosen(name, step):
        size = (shape[0], rank) if name == "B" else (rank, shape[1])
        return ops.uniform(size, ops.key_of(SEED, f"0.{name}"), ops.stream_of("reset", step))

    draw = drawn((rank, shape[1]), "A", dtype)
    loop = {**ADAMW, **options, "draw": draw, "chosen": chosen, "rounded": None if base == "dense" else rounded}
    agree(got, relora(problem.weight, problem.gradient, STEPS, **loop), dtype)


@every_shape
@every_dtype
@variants(
    {}, {"init": "random"}, {"refactor_every": None}, {"reset_every": None}, {"refactor_every": 2, "reset_every": 3},
    {"alpha": 0.5}, {"refactor_every": 1, "reset_every": 1}, {"weight_decay": 0.0}, {"betas": (0.0, 0.5)},
)  # fmt: skip
def test_low_rank(shape, rank, dtype, options):
    problem = Problem(shape, dtype)
    options = {"rank": rank, "alpha": 5.0, "refactor_every": 4, "reset_every": 4, **options}
    got = problem.engine(lowrank_optim.LowRankAdamW, **options)
    (m, n), draws = shape, []
    for size, name in (((m, rank), "B"), ((rank, n), "A")):
        draws.append(drawn(size, name, dtype)(0))
    loop = {**ADAMW, **options, "draw": lambda: draws}
    agree(got, low_rank(problem.weight, problem.gradient, STEPS, **loop), dtype)


@every_shape
@every_dtype
@variants(
    {}, {"moments": "keep"}, {"compensation": 0}, {"compensation": 1}, {"gap_growth": 1}, {"weight_decay": 0.0},
    {"update_proj_gap": 1, "gap_growth": 1}, {"base": "nf4"}, {"base": "int8", "moments": "keep"},
    {"base": "nf4", "compensation": 0}, {"scale": 2.0, "base": "nf4"}, {"betas": (0.0, 0.5)},
)  # fmt: skip
def test_loqt(shape, rank, dtype, options):
    problem = Problem(shape, dtype)
    options = {"rank": rank, "scale": 0.7, "update_proj_gap": 3, "gap_growth": 1.3, "base": "dense", **options}
    got = problem.engine(lowrank_optim.LoQT, basis="svd", **options)
    base = options.pop("base")
    at = times(options.pop("update_proj_gap"), options.pop("gap_growth"), STEPS)
    assert len(at) >= 4
    loop = {"compensation": 5, **ADAMW, **options, "signs": fix_signs}
    if base != "dense":
        loop["rounded"] = lambda x: PACKED[base].quantize(x.contiguous()).unpack()
    agree(got, loqt(problem.weight, problem.gradient, STEPS, at, **loop), dtype)
