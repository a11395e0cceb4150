"""THE table: a new method adds a row here and inherits every test that loops over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference import galore
from torch import Tensor, nn

import lowrank_optim
from lowrank_optim import LowRankOptimizer

# tall, wide, square, one row, rank 1, rank >= min: (shape, rank)
SHAPES = [((24, 10), 4), ((9, 22), 3), ((12, 12), 5), ((1, 16), 1), ((14, 6), 1), ((6, 8), 6), ((5, 7), 9)]


@dataclass(frozen=True)
class Case:
    """One optimizer at values away from neutral.

    Args:
        make: the class.
        kwargs: its options; odd on purpose.
        full: the torch.optim class that the rule is in full space, and how its options translate.
        reference: the paper's loop from `tests/reference`, and its options.
        elements: persistent elements of an m x n matrix (m projected) at rank r, counters aside.
    """

    name: str
    make: type[LowRankOptimizer]
    kwargs: dict[str, Any]
    full: tuple[type[torch.optim.Optimizer], dict[str, Any]]
    reference: Callable[..., Tensor]
    reference_kwargs: dict[str, Any]
    elements: Callable[[int, int, int], int]

    def build(self, params: Any, **overrides: Any) -> LowRankOptimizer:
        return self.make(params, **{**self.kwargs, **overrides})


_ADAMW = dict(lr=0.0037, betas=(0.83, 0.97), eps=3e-7, weight_decay=0.1)
_GAP = dict(update_proj_gap=7)

CASES = [
    Case(
        "galore_adamw",
        lowrank_optim.GaLoreAdamW,
        {**_ADAMW, **_GAP, "scale": 0.7},
        (torch.optim.AdamW, _ADAMW),
        galore.galore_adamw,
        {**_ADAMW, "scale": 0.7},
        lambda m, n, r: m * r + 2 * n * r,
    ),
    Case(
        "galore_adafactor",
        lowrank_optim.GaLoreAdafactor,
        {**_GAP, "lr": 0.03, "beta2_decay": -0.7, "eps": (1e-5, 2e-3), "d": 1.1, "weight_decay": 0.1, "scale": 0.7},
        (torch.optim.Adafactor, dict(lr=0.03, beta2_decay=-0.7, eps=(1e-5, 2e-3), d=1.1, weight_decay=0.1)),
        galore.galore_adafactor,
        dict(
            lr=0.03, decay=-0.7, eps=(1e-5, 2e-3), d=1.1, weight_decay=0.1, scale=0.7, beta1=None, parameter=True,
            relative=True,
        ),
        lambda m, n, r: m * r + r + n,
    ),
]  # fmt: skip

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Net(nn.Module):
    """Every kind of parameter in one small model: embedding, tall, wide, square, convolution, experts, norm,
    bias, a scalar, and a head that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12, bias=False)
        self.square = nn.Linear(12, 12)
        self.experts = nn.Parameter(torch.randn(3, 12, 18) / 4)
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.norm = nn.LayerNorm(12)
        self.lm_head = nn.Linear(12, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.conv(x.mT).mT
        x = x + self.down(torch.tanh(self.up(x)))
        x = x + torch.tanh(torch.einsum("btc,ech->bteh", x, self.experts)).mean(2)[..., :12] * self.gain
        return self.lm_head(self.norm(self.square(x)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    """Some steps on data that depends on the step number alone; returns the losses."""
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 11, (4, 9), generator=generator)
        optimizer.zero_grad()
        logits = model(tokens[:, :-1]).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradients(shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Gradients as in training: a slowly turning signal in noise, with a spectrum that falls off.

    Where singular values nearly coincide, singular vectors are ill-conditioned, and two correct programs differ.
    """
    signal, drift = torch.randn(shape), torch.randn(shape)
    fall = 0.8 ** torch.arange(shape[-1])
    return [((signal + 0.05 * step * drift + 0.5 * torch.randn(shape)) * fall).to(dtype) for step in range(steps)]
