"""THE table: a new method adds a row here and inherits every test that loops over it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim
from lowrank_optim import LowRankOptimizer
from tests.reference import (
    apollo,
    dct,
    fira,
    flora,
    frugal,
    galore,
    galore_plus,
    golore,
    ldadam,
    q_galore,
    subset_norm,
)  # fmt: skip

# tall, wide, square, one row, rank 1, rank >= min: (shape, rank)
SHAPES = [((24, 10), 4), ((9, 22), 3), ((12, 12), 5), ((1, 16), 1), ((14, 6), 1), ((6, 8), 6), ((5, 7), 9)]


@dataclass(frozen=True)
class Kept:
    """What is kept of an m x n matrix (m projected) at rank r: elements of the basis, of each moment, other bytes."""

    basis: int
    moments: tuple[int, ...]
    other: int = 0

    def bytes(self, state_dtype: str, small: bool) -> int:
        """By the definition of each store. Small parameters are not quantized."""
        if small and state_dtype in ("int8", "int4"):
            state_dtype = "float32"
        if state_dtype in ("float32", "bfloat16"):
            return (self.basis + sum(self.moments)) * (4 if state_dtype == "float32" else 2) + self.other
        per_byte, block = (1, 256) if state_dtype == "int8" else (2, 128)
        codes = sum(-(-x // per_byte) + 4 * -(-x // block) for x in self.moments)
        return 2 * self.basis + codes + self.other


@dataclass(frozen=True)
class Case:
    """One optimizer at values away from neutral.

    Args:
        make: the class.
        kwargs: its options; odd on purpose.
        full: the torch.optim class that the rule is in full space, how its options translate, and options of ours with
            which torch has that rule at all.
        reference: the paper's loop from `tests/reference`, and its options.
        kept: persistent numbers of one matrix, counters aside.
        variants: options of the class in addition to those of the loop, each compared as well.
        basis: the state key that says which subspace, None where the random stream does.
        counters: bytes per matrix that the schedule keeps beyond the common ones.
    """

    name: str
    make: type[LowRankOptimizer]
    kwargs: dict[str, Any]
    full: tuple[type[torch.optim.Optimizer], dict[str, Any], dict[str, Any]]
    reference: Callable[..., Tensor]
    reference_kwargs: dict[str, Any]
    kept: Callable[[int, int, int], Kept]
    variants: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = ()
    basis: str | None = "basis"
    counters: int = 0

    def build(self, params: Any, **overrides: Any) -> LowRankOptimizer:
        """With those of the overrides that the class has: a test of all methods names the options of GaLore."""
        return self.make(params, **{**self.kwargs, **self.fitting(overrides)})

    def fitting(self, options: dict[str, Any]) -> dict[str, Any]:
        """Without options that only GaLore has, and without its values of options where this class has its own."""

        def fits(key: str, value: Any) -> bool:
            own = key == "basis" and "basis" in self.kwargs  # a basis that is the method's point
            return self.has(key) and not (value in _GALORES.get(key, ()) and (own or not self.has(key, value)))

        return {key: value for key, value in options.items() if fits(key, value)}

    def has(self, option: str, value: Any = None) -> bool:
        known = option in inspect.signature(self.make).parameters
        return known and (value is None or option not in self.make.choices or value in self.make.choices[option])


_GALORES = {"basis": ("svd", "rsvd"), "proj_type": ("full",), "moments": ("rotate",)}


class AveragedSGD(torch.optim.Optimizer):
    """SGD on the bias-corrected average of gradients, with decoupled decay: what Subspace-Momentum is in full space."""

    def __init__(self, params, lr, momentum, weight_decay, foreach=None):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state, beta = self.state[p], group["momentum"]
                state["t"] = state.get("t", 0) + 1
                state["m"] = beta * state.get("m", 0.0) + (1 - beta) * p.grad
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * state["m"] / (1 - beta ** state["t"]))


_ADAMW = dict(lr=0.0037, betas=(0.83, 0.97), eps=3e-7, weight_decay=0.1)
_OURS = {**_ADAMW, "update_proj_gap": 7, "scale": 0.7}
_LOOP = {**_ADAMW, "scale": 0.7}
_FULL = (torch.optim.AdamW, _ADAMW, {})


def _galore(m: int, n: int, r: int) -> Kept:
    return Kept(m * r, (n * r, n * r))


def _selected(m: int, n: int, r: int) -> Kept:
    return Kept(0, (n * r, n * r), 4 * r)


def _sparse(m: int, n: int, r: int) -> Kept:
    k = round(0.1 * m * n)
    return Kept(m * r, (n * r, n * r, k, k), 4 * k + 4)


CASES = [
    Case(
        "galore_adamw", lowrank_optim.GaLoreAdamW, _OURS, _FULL, galore.galore_adamw, {**_LOOP, "fit": galore.exact},
        _galore,
    ),
    Case(
        "galore_adafactor",
        lowrank_optim.GaLoreAdafactor,
        dict(
            update_proj_gap=7, lr=0.03, beta2_decay=-0.7, eps=(1e-5, 2e-3), d=1.1, weight_decay=0.1, scale=0.7,
        ),
        (torch.optim.Adafactor, dict(lr=0.03, beta2_decay=-0.7, eps=(1e-5, 2e-3), d=1.1, weight_decay=0.1), {}),
        galore.galore_adafactor,
        dict(
            lr=0.03, decay=-0.7, eps=(1e-5, 2e-3), d=1.1, weight_decay=0.1, scale=0.7, beta1=None, parameter=True,
            relative=True, fit=galore.exact,
        ),
        lambda m, n, r: Kept(m * r, (r, n)),
    ),
    Case(
        "fira", lowrank_optim.FiraAdamW, {**_OURS, "limit": 1.03}, _FULL, fira.fira_adamw, {**_LOOP, "gamma": 1.03},
        lambda m, n, r: replace(_galore(m, n, r), other=8),
        (
            ({"form": "code"}, {"mode": "code"}),
            ({"limit": None}, {"gamma": None}),
            ({"moments": "rotate"}, {"moments": "rotate"}),
            ({"moments": "reset"}, {"moments": "reset"}),
        ),
    ),
    Case(
        "apollo", lowrank_optim.APOLLO, {**_OURS, "limit": 1.03}, _FULL, apollo.apollo_adamw, {**_LOOP, "gamma": 1.03},
        lambda m, n, r: Kept(0, (n * r, n * r), 8),
        (
            ({"granularity": "tensor", "scale_front": True}, {"granularity": "tensor", "scale_front": True}),
            ({"limit": None, "scale": 3.0}, {"gamma": None, "scale": 3.0}),
            ({"store_projection": True}, {}),
        ),
        basis=None,
    ),
    Case(
        "ldadam", lowrank_optim.LDAdamW, {**_ADAMW, "rho": 0.85, "scale": 0.7}, _FULL, ldadam.ldadamw,
        {**_LOOP, "rho": 0.85}, lambda m, n, r: replace(_galore(m, n, r), other=4 * m * n),
    ),
    Case(
        "frugal", lowrank_optim.FRUGAL, {**_OURS, "sign_scale": 0.3, "basis": "rows"}, _FULL, frugal.frugal,
        {**_LOOP, "ratio": 0.3}, _selected, (({"basis": "topk"}, {"choose": "norm"}),), basis="index",
    ),
    Case(
        "golore", lowrank_optim.GoLoreAdamW, {**_OURS, "random_after": 10}, _FULL, golore.golore_adamw,
        {**_LOOP, "random_after": 10}, _galore,
        (({"random_after": 0}, {"random_after": 0}), ({"moments": "keep"}, {"moments": "keep"})),
    ),
    Case(
        "subset_norm", lowrank_optim.SubsetNormAdamW, {**_ADAMW, "scale": 0.7}, _FULL, subset_norm.subset_norm_adamw,
        _LOOP, lambda m, n, r: Kept(0, (m * n, n)),
        (
            ({"subset_size": 4}, {"size": 4}),
            ({"subset_size": 4, "reduce": "mean"}, {"size": 4, "reduce": "mean"}),
            ({"reduce": "mean"}, {"reduce": "mean"}),
        ),
        basis=None,
    ),
    Case(
        "subspace_momentum", lowrank_optim.SubspaceMomentum,
        dict(lr=0.0037, momentum=0.83, weight_decay=0.1, update_proj_gap=7, scale=0.7),
        (AveragedSGD, dict(lr=0.0037, momentum=0.83, weight_decay=0.1), {}), subset_norm.subspace_momentum,
        dict(lr=0.0037, beta=0.83, weight_decay=0.1, scale=0.7), lambda m, n, r: Kept(m * r, (n * r,)),
        (({"moments": "rotate"}, {"moments": "rotate"}), ({"moments": "keep"}, {"moments": "keep"})),
    ),
    Case(
        "snsm", lowrank_optim.SNSMAdamW, _OURS, _FULL, subset_norm.snsm_adamw, _LOOP,
        lambda m, n, r: Kept(m * r, (n * r, n)),
        (
            ({"subset_size": 4, "reduce": "mean"}, {"size": 4, "reduce": "mean"}),
            ({"moments": "rotate"}, {"moments": "rotate"}),
        ),
    ),
    Case(
        "dct", lowrank_optim.DCTAdamW, _OURS, _FULL, dct.dct_adamw, _LOOP,
        lambda m, n, r: replace(_selected(m, n, r), other=8 * r),
        (
            ({"norm": "l1", "dictionary": "dct3"}, {"norm": "l1", "dictionary": "dct3"}),
            ({"dictionary": "identity"}, {"dictionary": "identity"}),
            ({"error_feedback": "float32"}, {"error_feedback": True}),
            ({"moments": "keep"}, {"moments": "keep"}),
            ({"moments": "reset"}, {"moments": "reset"}),
            ({"fft": True}, {}),
            ({"fft": True, "dictionary": "dct3"}, {"dictionary": "dct3"}),
        ),
        basis="index",
    ),
    Case(
        "flora", lowrank_optim.Flora,
        dict(
            update_proj_gap=7, lr=0.03, betas=(0.8, 0.97), beta2_decay=-0.7, eps=(1e-5, 2e-3), d=1.1, weight_decay=0.1,
            scale=0.7,
        ),
        (
            torch.optim.Adafactor, dict(lr=0.03, beta2_decay=-0.7, eps=(1e-5, 2e-3), d=1.1, weight_decay=0.1),
            {"betas": (0.0, 0.97)},  # torch has no momentum here
        ),
        flora.flora,
        dict(
            lr=0.03, betas=(0.8, 0.97), eps=1e-8, decay=-0.7, factored_eps=1e-5, floor=2e-3, clip=1.1, weight_decay=0.1,
            scale=0.7,
        ),
        lambda m, n, r: Kept(0, (n * r, m, n)),
        (
            ({"scale_parameter": False, "lr": 0.003}, {"scale_parameter": False, "lr": 0.003}),
            ({"orthonormal": True}, {"orthonormal": True}),
            # a small lr: P mixes columns a hundred times apart, and the full second moment magnifies what rounding left
            ({"base": "adamw", "eps": 3e-7, "lr": 0.0007}, {"base": "adamw", "eps": 3e-7, "lr": 0.0007}),
            ({"store_projection": True}, {}),
        ),
        basis=None,
    ),
    Case(
        "galore_plus", lowrank_optim.GaLorePlusAdamW, {**_OURS, "density": 0.1, "residual_scale": 0.6}, _FULL,
        galore_plus.galore_plus_adamw, {**_LOOP, "heads": 1, "density": 0.1, "residual_scale": 0.6}, _sparse,
        (({"density": 0.0}, {"density": 0.0}), ({"density": 0.5}, {"density": 0.5})),
    ),
    Case(
        "q_galore", lowrank_optim.QGaLoreAdamW,
        {**_OURS, "state_dtype": "float32", "threshold": 0.35, "queue": 2}, _FULL,
        q_galore.q_galore_adamw, {**_LOOP, "gap": 7, "threshold": 0.35, "queue": 2}, _galore,
        (
            ({"update_proj_gap": 2}, {"gap": 2}),
            ({"update_proj_gap": 2, "threshold": 0.9}, {"gap": 2, "threshold": 0.9}),
        ),
        counters=8 + 4 * 2,
    ),
]  # fmt: skip


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
ranked = pytest.mark.parametrize("case", [case for case in CASES if case.make.ranked], ids=lambda case: case.name)


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


capturable_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.name != "ldadam"], ids=lambda case: case.name
)


# float64 shows that the algorithms are the same; float32 that the engine loses nothing but rounding. Fira without a
# limit takes some weights beyond 8, where one unit in the last place is 1e-6 already: two of them are allowed.
TOLERANCE = {torch.float32: dict(rtol=2**-22, atol=1e-6), torch.float64: dict(rtol=0, atol=1e-12)}
