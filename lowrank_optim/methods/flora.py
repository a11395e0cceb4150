"""Flora: low-rank adapters are secretly gradient compressors. Hao et al., ICML 2024, https://arxiv.org/abs/2402.03293"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .. import checks, hyperparameters
from ..optimizer import LowRankOptimizer
from ..parts import EMA, Drop, Factored, Identity, Never, Random, Raw, Relative
from ..parts.recipes import adam, adamw, schedule, stores
from ..recipe.plan import Plan
from ..recipe.recipe import Recipe
from .options import ONE_SIDED, OPTIONS, given


class Flora(LowRankOptimizer):
    r"""Momentum kept in a random subspace, which is drawn again every so often.

    With G turned so that its projected side m comes first, P (m, r) of entries N(0, 1/r):

        every update_proj_gap steps:  P_old <- P;  P <- random numbers, drawn again;  M <- P^T P_old M
        U = Adafactor's scaled gradient, see `GaLoreAdafactor`, in full space         (m, n)
        M <- beta1 M + (1 - beta1) P^T U                                              (r, n)
        U <- P (M - (1 - beta1) P^T U) + (1 - beta1) U       the past from M, the present as it is
        U <- U / max(1, rms(U) / d);   a = lr max(eps[1], rms(W))                     lr, without scale_parameter
        W <- (1 - lr weight_decay) W - a scale U

    base="adamw" averages G instead, and divides by Adam's full second moment after bias correction.

    Memory: `n r + m + n` elements per matrix (base="adamw": `n r + m n`). P is not kept: each step draws it again, from
    the seed and the number of refreshes. A step holds one (m, n) tensor (base="adamw": two). Parameters that are not
    projected get Adafactor with momentum, or AdamW.

    Args:
        params, lr, weight_decay, rank, scale, stagger: see `GaLoreAdamW`.
        betas: decays of the momentum and of the second moment; only base="adamw" uses the second.
        eps: None: (None, 1e-3) as in torch.optim.Adafactor, or 1e-8 for base="adamw".
        beta2_decay, d, scale_parameter: see `GaLoreAdafactor`.
        base: "adafactor", as published, or "adamw".
        update_proj_gap: steps between transfers, the paper's kappa. Each transfer multiplies M by about
            sqrt(1 + (m + 1) / r). A gap in which momentum fades by less is refused, because M would grow without bound.
        orthonormal: use an orthonormal P. Transfers then shrink M by sqrt(r / m), and any gap is stable.
        store_projection: keep P, for `m r` more elements, instead of drawing it at each step, which costs time.
        moments: "rotate" (the paper's transfer), "keep" or "reset".
        proj_type: the side that is projected: "std", "reverse_std", "left" or "right".

    Example::

        opt = lowrank_optim.Flora(model.named_parameters(), lr=1e-3, rank=256)

    Differences from the paper and from its authors' code: momentum averages scaled gradients (as in the code; in the
    paper: gradients); the transfer comes before the step; weights decay with lr (the code: with a); Adafactor is
    torch's; matrices may have any ratio of sides; P is the same on every device. `tests/reference/flora.py` is the
    algorithm as a loop.
    """

    __doc__ = (__doc__ or "") + OPTIONS
    choices = {"base": ("adafactor", "adamw"), "proj_type": ONE_SIDED}
    rule = "Adafactor"

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | tuple[float | None, float] | None = None,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        rank: int | float | str | None = "auto",
        update_proj_gap: int = 1000,
        scale: float = 1.0,
        proj_type: str = "std",
        base: str = "adafactor",
        beta2_decay: float = -0.8,
        d: float = 1.0,
        scale_parameter: bool = True,
        orthonormal: bool = False,
        store_projection: bool = False,
        moments: str = "rotate",
        stagger: bool = True,
        state_dtype: str = "float32",
        bf16_update: str = "stochastic",
        nonfinite: str = "skip",
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(params, given(locals()), strict=strict)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        basis = Random(group["orthonormal"], kept=group["store_projection"])
        common = {"basis": basis, "refresh": schedule(group), "scale": group["scale"], "scaling_in": "full"}
        rest, restarts = 1 - group["betas"][0], group["moments"] == "reset"
        if group["base"] == "adamw":
            return Recipe(**adam(_with_eps(group)), **stores(group), **common, residual=Raw(rest, corrected=True))
        return Recipe(**_adafactor(group, clip=None), **common, residual=Raw(rest, restarts, group["d"]))

    def plain(self, group: dict[str, Any]) -> Recipe:
        if group["base"] == "adamw":
            return adamw(_with_eps(group))
        return Recipe(basis=Identity(), refresh=Never(), residual=Drop(), **_adafactor(group, clip=group["d"]))

    def refuse(self, plan: Plan, group: dict[str, Any]) -> None:
        checks.stable_transfers(plan, group)


def _with_eps(group: dict[str, Any]) -> dict[str, Any]:
    """Return the group with the default eps of base="adamw"."""
    return {**group, "eps": 1e-8 if group["eps"] is None else group["eps"]}


def _adafactor(group: dict[str, Any], clip: float | None) -> dict[str, Any]:
    """Return the parts of Adafactor with momentum, for a `Recipe`."""
    restarts = group["moments"] == "reset"  # an average that restarts must be read with its own clock
    floor, least = hyperparameters.pair("eps", (None, 1e-3) if group["eps"] is None else group["eps"])
    return {
        "momentum": EMA(group["betas"][0], debias=restarts),
        "momentum_of": "update",
        "scaling": Factored(group["beta2_decay"], floor, clip),
        "step_size": Relative(least if group["scale_parameter"] else None, decay=False),
        **stores(group),
    }
