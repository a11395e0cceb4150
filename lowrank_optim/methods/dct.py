"""DCT-AdamW: SVD-free subspaces from a fixed dictionary. Modoranu et al. 2025, https://arxiv.org/abs/2505.17967"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .. import checks
from ..optimizer import LowRankOptimizer
from ..parts import Dictionary, Drop, ErrorFeedback, Rows
from ..parts.recipes import ERRORS, adam, schedule, stores
from ..recipe.recipe import Basis, Recipe
from .options import ONE_SIDED, OPTIONS, given


class DCTAdamW(LowRankOptimizer):
    r"""AdamW on the coefficients of each gradient in the best r vectors of a fixed orthonormal dictionary.

    With G turned so that its projected side m comes first, D (m, m) the dictionary, vectors as columns:

        A = G + E                                                     only with error feedback
        every update_proj_gap steps:  I <- the r vectors with the largest norms of their coefficients D^T A
        R = D_I^T A;   E <- A - D_I R;   N = Adam(R)                  (r, n)
        W <- (1 - lr weight_decay) W - lr scale D_I N

    Memory: `2 n r` elements and 2 r int32 per matrix, and `m n` more elements with error feedback. All matrices of one
    width share one dictionary per device, `m m` elements (none where an FFT finds the coefficients).

    Args:
        params, lr, betas, eps, weight_decay, rank, scale, stagger: see `GaLoreAdamW`.
        update_proj_gap: steps between selections; 1 as published.
        dictionary: "dct2" or "dct3" (cosines), "hadamard" (Sylvester's for the power of two in m, times a small DCT),
            "random" (orthogonal), "identity" (rows of the gradient itself).
        norm: "l2", which minimizes the projection error, or "l1", as published.
        fft: find the coefficients by FFT and compute the chosen vectors, without a dictionary; cosines only. The
            numbers agree to rounding. None: where the FFT is faster, from width 512 on.
        moments: "rotate": a vector that stays selected keeps its moments and its age, a new vector begins at zero with
            its own age; "keep" leaves the moments in place, although their vectors change; "reset" sets them to zero.
        error_feedback: "none", or how E is kept: "float32", "bfloat16", "int8", "int4".
        proj_type: the side that is projected: "std", "reverse_std", "left" or "right".

    Example::

        opt = lowrank_optim.DCTAdamW(model.named_parameters(), lr=1e-3, rank=256)

    Differences from the paper and from its authors' code: rotation is on by default (with the code's default, momentum
    mixes vectors at each step); new vectors correct their bias with their own age (the code: with the global step, so
    that the first update is 3.16 lr); l2 is the default; widths may differ between matrices; int4 and int8 of E are
    correct. `tests/reference/dct.py` is the algorithm as a loop.
    """

    __doc__ = (__doc__ or "") + OPTIONS
    choices = {
        "dictionary": ("dct2", "dct3", "hadamard", "random", "identity"), "norm": ("l2", "l1"),
        "error_feedback": tuple(ERRORS), "proj_type": ONE_SIDED,
    }  # fmt: skip

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        rank: int | float | str | None = "auto",
        update_proj_gap: int = 1,
        scale: float = 1.0,
        proj_type: str = "std",
        dictionary: str = "dct2",
        norm: str = "l2",
        fft: bool | None = None,
        error_feedback: str = "none",
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
        kind, power = group["dictionary"], 2 if group["norm"] == "l2" else 1
        checks.fast_dictionary(kind, group["fft"])
        basis: Basis = Rows("norm", power) if kind == "identity" else Dictionary(kind, power, group["fft"])
        kept = ERRORS[group["error_feedback"]]
        common = {**adam(group), **stores(group), "residual": ErrorFeedback(kept) if kept else Drop()}
        return Recipe(basis=basis, refresh=schedule(group), scale=group["scale"], **common)
