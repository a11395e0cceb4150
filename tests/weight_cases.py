"""THE table of weight-space methods: a new one adds a row and inherits the tests of test_weight_space.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim
from lowrank_optim import WeightSpaceOptimizer

VOCABULARY = 19


@dataclass(frozen=True)
class WeightCase:
    """One method at values away from neutral.

    Args:
        period: updates between its restarts.
        draws: it needs random numbers.
        keeps: converting leaves the function of the model alone.
        splits: what a sample does depends on its place in the batch, so parts of a batch are not the batch.
        retracted: factors that are changed again after their update.
        variants: options to be tried in addition to `kwargs`.
    """

    name: str
    make: type[WeightSpaceOptimizer]
    kwargs: dict[str, Any]
    period: int
    keeps: bool = True
    draws: bool = True
    splits: bool = False
    retracted: tuple[str, ...] = ()
    variants: tuple[dict[str, Any], ...] = ()
    common: dict[str, Any] = field(default_factory=lambda: dict(lr=0.013, betas=(0.83, 0.97), eps=3e-7, rank=4))

    def build(self, model: nn.Module, **overrides: Any) -> WeightSpaceOptimizer:
        return self.make(model, **{**self.common, **self.kwargs, **overrides})


WEIGHT_CASES = [
    WeightCase(
        "relora", lowrank_optim.ReLoRA, dict(merge_every=3, alpha=7.0, weight_decay=0.1), 3,
        variants=(
            dict(base="nf4"), dict(base="int8"), dict(base="nf4", exact_base=True),
            dict(reset="magnitude", reset_ratio=0.7), dict(reset="random", reset_ratio=0.9),
        ),
    ),
    WeightCase(
        "low_rank", lowrank_optim.LowRankAdamW, dict(refactor_every=3, reset_every=3, alpha=5.0, weight_decay=0.1), 3,
        keeps=False, draws=False, variants=(dict(init="random"), dict(refactor_every=None), dict(reset_every=None)),
    ),
    WeightCase(
        "sltrain", lowrank_optim.SLTrain, dict(density=0.05, refactor_every=3, reset_every=3, weight_decay=0.1), 3,
        keeps=False, variants=(dict(init="random"), dict(refactor_every=None), dict(reset_every=None)),
    ),
    WeightCase(
        "lte", lowrank_optim.LTE, dict(heads=2, merge_every=3, reset="drop", weight_decay=0.1), 3, splits=True,
        variants=(dict(base="nf4"), dict(base="int8", init="paper"), dict(reset="keep", heads=1), dict(alpha=3.0)),
    ),
    WeightCase(
        "sst", lowrank_optim.SST, dict(iteration_steps=3, iterations=2), 3,
        retracted=("U_active", "V_active"), variants=(dict(rank=7),),
    ),
    WeightCase(
        "loqt", lowrank_optim.LoQT, dict(update_proj_gap=3, gap_growth=1, scale=0.7, base="dense", stagger=False), 3,
        variants=(
            dict(base="nf4"), dict(base="int8", gap_growth=1.4), dict(basis="svd", moments="keep"), dict(stagger=True),
        ),
    ),
]  # fmt: skip

every_case = pytest.mark.parametrize("case", WEIGHT_CASES, ids=lambda case: case.name)


def every_variant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of every case: its options as they are, and with each of its variants."""
    pairs = [(case, options) for case in WEIGHT_CASES for options in ({}, *case.variants)]
    names = [case.name + "".join(f"-{k}={v}" for k, v in options.items()) for case, options in pairs]
    return pytest.mark.parametrize(("case", "options"), pairs, ids=names)(function)


class LinearNet(nn.Module):
    """Tall, wide, square and odd linear layers, with and without bias, two that share a weight, a frozen one, one that
    is too small; an embedding that is tied to the head, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.up = nn.Linear(24, 37)
        self.down = nn.Linear(37, 24, bias=False)
        self.square = nn.Linear(24, 24)
        self.first = nn.Linear(24, 24)
        self.second = nn.Linear(24, 24)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(24, 24).requires_grad_(False)
        self.gate = nn.Linear(24, 3)
        self.norm = nn.LayerNorm(24)
        self.lm_head = nn.Linear(24, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(torch.tanh(self.up(x)))
        x = x + torch.tanh(self.first(x)) - self.second(x) + self.frozen(x) * self.gate(x).sum(-1, keepdim=True)
        return self.lm_head(self.norm(self.square(x)))


CONVERTED = {"up": (37, 24), "down": (24, 37), "square": (24, 24), "first": (24, 24)}


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> LinearNet:
    torch.manual_seed(seed)
    return LinearNet().to(dtype)


def batch(step: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
