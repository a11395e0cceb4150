"""GaLore with Adafactor's factored second moment. Zhao et al. 2024, after Shazeer and Stern 2018."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .. import hyperparameters
from ..optimizer import LowRankOptimizer
from ..parts import EMA, Factored, NoMomentum, Relative
from ..parts.recipes import subspace
from ..recipe.recipe import Recipe
from .options import OPTIONS, given


class GaLoreAdafactor(LowRankOptimizer):
    r"""Adafactor on the coordinates of each gradient in a subspace that is refitted every so often.

    With `R = P^T G (r, n)` and P as in `GaLoreAdamW`:

        row <- b row + (1 - b) mean_j R^2     col <- b col + (1 - b) mean_i R^2,    b = 1 - t^beta2_decay
        D = R / max(sqrt(row col / mean(row)), eps[0])
        D <- D / max(1, rms(D) / d)
        E <- beta1 E + (1 - beta1) D                                     only with beta1; then D <- E
        a = min(lr, 1 / sqrt(t))                                         lr, without relative_step
        a <- a max(eps[1], rms(W))                                       only with scale_parameter
        W <- (1 - lr weight_decay) W - a scale P D

    Memory: `m r + r + n` elements per matrix, and `n r` more with beta1. Parameters that are not projected get
    Adafactor in full space, which equals torch.optim.Adafactor for vectors and matrices.

    Args:
        params: see `GaLoreAdamW`.
        lr, beta2_decay, eps, d, weight_decay: as in torch.optim.Adafactor. eps[0]=None stands for the epsilon of the
            dtype of the arithmetic: float32, or float64 for float64 parameters.
        beta1: decay of the average of updates; None: no average. The Adafactor rows in the paper use an average.
        scale_parameter, relative_step: see the maths. The paper's benchmark switches both off.
        rank, update_proj_gap, scale, proj_type, basis, moments, stagger: see `GaLoreAdamW`.

    Example::

        opt = lowrank_optim.GaLoreAdafactor(model.named_parameters(), lr=1e-2, rank=128, beta1=0.9)

    Differences from the paper and from its authors' code: formula and defaults are torch's (the code: Hugging Face's,
    with `eps[0]` added to the squared gradient); the average with beta1 is of updates before lr (the code: after lr, so
    that a change of lr acts late), and is read with bias correction under moments="reset"; convolutions are matrices,
    and the matrices in a stack of experts are clipped one by one (torch: the last two dimensions are the matrix, and
    the whole tensor is clipped). All other differences are those of `GaLoreAdamW`. `tests/reference/galore.py` is the
    algorithm as a loop.
    """

    __doc__ = (__doc__ or "") + OPTIONS
    rule = "Adafactor"
    choices = {"basis": ("rsvd", "svd")}

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        beta1: float | None = None,
        scale_parameter: bool = True,
        relative_step: bool = True,
        rank: int | float | str | None = "auto",
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: str = "std",
        basis: str = "rsvd",
        moments: str = "keep",
        stagger: bool = True,
        state_dtype: str = "float32",
        bf16_update: str = "stochastic",
        nonfinite: str = "skip",
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(params, given(locals()), strict=strict)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        (floor, least), beta1 = hyperparameters.pair("eps", group["eps"]), group["beta1"]
        # An average that restarts at a refresh must be read with its own clock, or most of the lr would be lost.
        restarts = group["moments"] == "reset"
        return Recipe(
            momentum=NoMomentum() if beta1 is None else EMA(beta1, debias=restarts),
            momentum_of="update",
            scaling=Factored(group["beta2_decay"], floor, group["d"]),
            step_size=Relative(least if group["scale_parameter"] else None, group["relative_step"]),
            **subspace(group),
        )
