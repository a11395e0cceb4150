"""Free combination: every pair of choices either works or is refused with a reason, and published methods come out."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim.methods.composed import CLASHES, Composed
from tests.cases import gradients

SLOTS = {**Composed.choices, "moments": ("keep", "rotate", "reset"), "proj_type": ("std", "reverse_std", "full")}
DEFAULTS = {
    "basis": "rsvd", "refresh": "staggered", "momentum": "low", "scaling": "rms", "scaling_in": "subspace",
    "residual": "drop", "store": "float32", "moments": "keep", "proj_type": "std",
}  # fmt: skip
CHOICES = {slot: [(slot, value) for value in values] for slot, values in SLOTS.items()}
PAIRS = [pair for a, b in itertools.combinations(SLOTS, 2) for pair in itertools.product(CHOICES[a], CHOICES[b])]


def clash_of(options):
    return next(
        (reason for clash, reason in CLASHES if all(options[slot] in values for slot, values in clash.items())), None
    )


def completed(pair):
    """The rest of the slots, so that only the pair itself can clash."""
    options = {**DEFAULTS, **dict(pair)}
    free = [slot for slot in ("scaling_in", "scaling", "momentum", "basis", "residual") if slot not in dict(pair)]
    for values in itertools.product(*(SLOTS[slot] for slot in free)):
        tried = {**options, **dict(zip(free, values, strict=True))}
        if clash_of(tried) is None:
            return tried
    return options


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=lambda choice: "=".join(map(str, choice)))
def test_every_pair_works_or_says_why_not(one, other):
    options = completed((one, other))
    params = [
        nn.Parameter(0.2 * torch.randn(80, 64)),
        nn.Parameter(torch.randn(2, 10, 17)),
        nn.Parameter(torch.randn(5)),
    ]
    if clash_of(options) is not None:
        with pytest.raises(ValueError, match="mean nothing together"):
            lowrank_optim.compose(params, lr=1e-3, rank=4, update_proj_gap=3, **options)
        return
    optimizer = lowrank_optim.compose(params, lr=1e-3, rank=4, update_proj_gap=3, **options)
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 4)
    twins = copy.deepcopy(params)
    resumed = lowrank_optim.compose(twins, lr=1e-3, rank=4, update_proj_gap=3, **options)
    resumed.load_state_dict(optimizer.state_dict())
    train(optimizer, params, 4, 4)
    train(resumed, twins, 4, 4)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True)), "bit-exact resume across a refresh"
    assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(params, before, strict=True))
    shapes = {f"{i}": p.shape for i, p in enumerate(params)}
    planned = lowrank_optim.estimate_memory(shapes, Composed, rank=4, update_proj_gap=3, **options)
    assert planned.optimizer == lowrank_optim.state_bytes(optimizer)


@pytest.mark.parametrize(
    ("make", "options", "slots"),
    [
        (lowrank_optim.GaLoreAdamW, {}, {}),
        (lowrank_optim.GaLoreAdamW, *[{"moments": "rotate", "proj_type": "full"}] * 2),
        (lowrank_optim.FiraAdamW, {}, {"residual": "fira"}),
        (lowrank_optim.APOLLO, {}, {"basis": "gaussian", "residual": "apollo"}),
        (lowrank_optim.FRUGAL, {}, {"basis": "rows", "residual": "sign", "moments": "reset"}),
        (lowrank_optim.DCTAdamW, {"update_proj_gap": 3}, {"basis": "dct2", "moments": "rotate"}),
        (
            lowrank_optim.SNSMAdamW,
            {"reduce": "mean"},
            {"residual": "raw", "scaling": "subset_norm", "scaling_in": "full", "moments": "reset"},
        ),
        (lowrank_optim.SubsetNormAdamW, {"reduce": "mean"}, {"basis": "identity", "scaling": "subset_norm"}),
        (lowrank_optim.GaLorePlusAdamW, {}, {"residual": "sparse"}),
        (lowrank_optim.LDAdamW, {"rho": 0.9, "update_proj_gap": 3},
         {"basis": "power", "moments": "rotate", "residual": "error_feedback"}),
        (lowrank_optim.QGaLoreAdamW, {"basis_dtype": "float32", "state_dtype": "float32"}, {"refresh": "lazy"}),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else None,
)  # fmt: skip
def test_published_methods_are_compositions(make, options, slots):
    common = dict(lr=3e-3, betas=(0.83, 0.97), weight_decay=0.1)
    published, composed = (nn.Parameter(torch.linspace(-1, 1, 24 * 14).view(24, 14).clone()) for _ in range(2))
    ranked = {"rank": 4, "update_proj_gap": 3}
    optimizers = (
        make([("w", published)], **{**common, **(ranked if make.ranked else {}), **options}),
        lowrank_optim.compose([("w", composed)], **{**common, **ranked}, **slots),
    )
    for g in gradients((24, 14), 8):
        for p, optimizer in zip((published, composed), optimizers, strict=True):
            p.grad = g.clone()
            optimizer.step()
    assert torch.equal(published, composed)


def test_the_reason_is_in_the_message():
    p = nn.Parameter(torch.randn(9, 9))
    with pytest.raises(
        ValueError, match=r"residual='raw', scaling='rms', scaling_in='subspace' mean nothing .*take scal"
    ):
        lowrank_optim.compose([p], rank=2, residual="raw")
    with pytest.raises(ValueError, match=r"residual must be one of .*, got 'fire'; did you mean 'fira'\?"):
        lowrank_optim.compose([p], rank=2, residual="fire")
    optimizer = lowrank_optim.compose([p], rank=2)
    with pytest.raises(ValueError, match="mean nothing together"):
        optimizer.add_param_group(
            {"params": [nn.Parameter(torch.randn(9, 9))], "basis": "identity", "residual": "sign"}
        )
    assert len(optimizer.param_groups) == 1


def test_every_clash_can_be_reached():
    for clash, _ in CLASHES:
        assert all(set(values) <= set(SLOTS[slot]) for slot, values in clash.items())
