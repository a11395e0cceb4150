"""Provide linear layers with several low-rank heads, each of which trains on its own part of the batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import hyperparameters, ops
from ..distributed import heads as processes
from ..distributed.dtensors import first_row, local, whole
from ..recipe.weights import unpacked, working_dtype
from . import checks as layer_checks
from .base import add_to_base_
from .linear import BASES, ReparameterizedLinear
from .rows import KINDS, ByteRows

MERGED = ("B_merged", "A_merged")  # the factors as of the last merge, B' and A' below
INITS = ("code", "paper")


class MultiHeadLinear(ReparameterizedLinear):
    r"""A layer of H heads: head h is `W + s (B_h A_h - B'_h A'_h)` with frozen W, `A (H, r, n)`, `B (H, m, r)` trained.

    Here `s = alpha / r`. W holds the mean of all heads as of the last merge, and B', A' are the factors of that time. A
    head thus sees the other heads as they were then, and itself as it is.

    In training, the batch (dimension 0 of the input) is divided into H equal parts in order, and part h goes through
    head h. Inputs of `(batch * sequence, n)` are divided at whole examples if H divides the batch. Where dimension 0 is
    not the batch (it is time in torch's recurrent layers and default attention), heads see parts of that dimension.

    In evaluation, the whole input goes through `W + (s / H) sum_h (B_h A_h - B'_h A'_h)`, the weight that the next
    merge would make. Modules that read `weight` instead of calling the layer see that weight in training as well.

    Args:
        plain, rank, name, seed: see `ReparameterizedLinear`.
        heads: H.
        ranks: put one head on every process of torch.distributed. The local head takes the whole input. Evaluation and
            `weight` then use W alone, which is the same on all processes; with a single process they are as above.
        alpha: s times the rank. None means twice the rank.
        base: how W is stored: "dense" (in the dtype of `plain`), "int8" (1.03 bytes per element), "nf4" (0.56).
        by_rows: with a quantized base, for `fully_shard`; see `LowRankLinear`.
        init: A begins semi-orthogonal and B zero. "code" multiplies A by sqrt(n / r), "paper" by sqrt(m / n).
    """

    factors = ("B", "A")

    def __init__(
        self,
        plain: nn.Linear,
        rank: int | float,
        *,
        heads: int = 4,
        ranks: bool = False,
        alpha: float | None = None,
        base: str = "dense",
        by_rows: bool = False,
        init: str = "code",
        name: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__(plain, rank, name=name, seed=seed)
        given = {"heads": heads, "alpha": alpha, "base": base, "init": init}
        hyperparameters.check(given, {"base": tuple(BASES), "init": INITS})
        layer_checks.for_quantized(base, base in KINDS, {"by_rows": by_rows})
        first, world = processes.place() if ranks else (0, 1)
        self.heads, self.world, self.label = 1 if ranks else heads, world, name
        self.ranks, self.init = ranks, init
        self.scale = 2.0 if alpha is None else alpha / self.rank
        w, (m, n, r) = plain.weight.detach(), (self.out_features, self.in_features, self.rank)
        self.kind, self.rows = base, ByteRows(KINDS[base], n) if by_rows else None
        kept = BASES[base](w) if self.rows is None else self.rows.bytes_of(w)
        self.base = nn.Parameter(kept, requires_grad=False)
        length = math.sqrt(n / r if init == "code" else m / n)
        a = torch.stack([self._orthogonal(first + h, w) * length for h in range(self.heads)]).to(w.dtype)
        self.B, self.A = nn.Parameter(w.new_zeros(self.heads, m, r)), nn.Parameter(a)
        self.B_merged, self.A_merged = (nn.Parameter(torch.zeros_like(x), requires_grad=False) for x in (self.B, a))

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., m) for x (..., n)."""
        if not self.training:
            return self._evaluated(x)
        heads, shape = self.heads, x.shape
        if heads > 1 and (x.dim() < 2 or shape[0] % heads):
            raise ValueError(
                f"dimension 0 of an input {tuple(shape)} must be a batch that {heads} heads divide, one part for each. "
                f"Use batches of a multiple of {heads} (drop_last=True in the loader), or model.eval() to evaluate"
            )
        # Parts (H, rows, n) times A^T (H, n, r) and B^T (H, r, m): one batched product serves all heads.
        rows = shape[:-1].numel() // heads
        parts, y = x.reshape(heads, rows, self.in_features), linear(x, self._below(self.base), self.bias)
        y = y.reshape(heads, rows, self.out_features)
        y = torch.baddbmm(y, parts @ self.A.mT, self.B.mT, alpha=self.scale)
        y = torch.baddbmm(y, parts @ self.A_merged.mT, self.B_merged.mT, alpha=-self.scale)
        return y.view(*shape[:-1], self.out_features)

    def dense(self) -> Tensor:
        w = unpacked(self._below(self.base), working_dtype(self.B))
        if self.world > 1:
            return w
        b, a = _side_by_side(w.dtype, self._all())
        return w + (self.scale / self.heads) * (b @ a)

    def check_complete(self) -> None:
        # Factors that equal those of the last merge have not been trained since, here or elsewhere: heads train
        # together.
        if self.world > 1 and not (torch.equal(self.B, self.B_merged) and torch.equal(self.A, self.A_merged)):
            raise RuntimeError(
                "heads on other ranks have trained since the last merge, and that would be lost; call "
                "optimizer.merge_now() on every rank first"
            )

    @torch.no_grad()
    def merge_(self, count: int, stochastic: bool = True) -> None:
        """Add the mean of what the heads have learned since the last merge to W.

        The function in evaluation stays the same up to one rounding. With heads on several processes, all processes
        call it, and have the same W afterwards. For a sharded layer all ranks call it: the factors are gathered, and
        the base never is.

        Args:
            count: a number that no earlier merge had. It decides the noise of rounding.
            stochastic: round to bfloat16 or to packed codes so that small sums survive on average; else to nearest.
        """
        delta, stream = self._learned(), ops.stream_of("merge", count)
        if bool(delta.any()):  # with zeros, rounding to packed codes would only add noise
            below, start = self._below(local(self.base)), first_row(self.base) * self.in_features
            add_to_base_(below, delta, self.key, stream, stochastic=stochastic, start=start)
        self.A_merged.copy_(self.A)
        self.B_merged.copy_(self.B)
        if self.world > 1:
            total = unpacked(self._below(self.base), delta.dtype).sum(dtype=torch.float64)
            layer_checks.same_weights(self.label, processes.same_everywhere(total))

    def restart_workspace(self) -> int:
        """Return the number of elements that a merge holds at once."""
        m, n = self.out_features, self.in_features
        # Gathered factors of all processes exist twice: as they came, and side by side for the product.
        sent = 2 * self.world if self.world > 1 and self._gathers() else 1
        thin = 2 * self.rank * (m + n) * self.heads * sent
        return (2 + (self.B.dtype == torch.bfloat16)) * m * n + thin

    def made_with(self) -> dict[str, Any]:
        how = {"ranks": self.ranks, "heads": self.heads, "alpha": round(self.scale * self.rank, 9)}
        return {**super().made_with(), **how, "base": self.kind, "init": self.init}

    def refuse_shards(self) -> None:
        layer_checks.heads_of_ranks(MultiHeadLinear.__name__, self.ranks)
        codes = self.kind in KINDS and self.rows is None
        cut = [self.base, self.B, self.A, self.B_merged, self.A_merged]
        layer_checks.shards_of_rows(MultiHeadLinear.__name__, self.kind if codes else "", False, cut)

    def describe(self) -> str:
        heads = f"one of {self.world} heads" if self.world > 1 else f"{self.heads} heads"
        return f"{self.kind} base, {heads}"

    # -- the mean of heads ---------------------------------------------------------------------------------------------

    def _evaluated(self, x: Tensor) -> Tensor:
        """Return y (..., m) for x (..., n) in evaluation, with the mean of all heads."""
        y = linear(x, self._below(self.base), self.bias)
        if self.world > 1:
            return y
        b, a = _side_by_side(self.B.dtype, self._all())
        # With B (m, k) and A (k, n), two thin products with x cost rows * k * (m + n) multiplications. Composing B A
        # first costs m * n * (rows + k).
        share, (m, k), n, rows = self.scale / self.heads, b.shape, self.in_features, x.shape[:-1].numel()
        if rows * k * (m + n) > m * n * (rows + k):
            return y + linear(x, share * (b @ a))
        return y + linear(linear(x, a) * share, b)

    def _learned(self) -> Tensor:
        """Return the mean of s (B A - B' A') over all heads, (local rows of W, n), in the working dtype."""
        working, total = working_dtype(self.B), self.heads * self.world
        b, a, b_merged, a_merged = (whole(x) for x in self._all())
        here = slice(first_row(self.base), first_row(self.base) + len(local(self.base)))
        kept = [b[:, here], a, b_merged[:, here], a_merged]
        # Over processes, either the thin factors of all heads are gathered before the product, or the dense products
        # (m, n) are summed after it.
        if self.world > 1 and self._gathers():
            kept = processes.gathered(kept)
        b, a = _side_by_side(working, kept)
        product = b @ a
        if self.world > 1 and not self._gathers():
            processes.summed_(product)
        return product.mul_(self.scale / total)

    def _gathers(self) -> bool:
        """Whether gathering factors sends fewer bytes than summing products.

        The factors are those of now and of the last merge, from all other processes. The dense sum sends twice: to the
        process that adds up, and from it.
        """
        m, n = self.out_features, self.in_features
        thin = 2 * self.rank * (m + n) * self.B.element_size() * (self.world - 1)
        return thin <= 2 * m * n * working_dtype(self.B).itemsize * (self.world - 1) / self.world

    def _below(self, base: Tensor) -> Tensor:
        """Return W, or local rows of it, as a weight: rows of bytes become a quantized weight."""
        return base if self.rows is None else self.rows.weight(base, self.B.dtype)

    def _all(self) -> list[Tensor]:
        """Return B, A, B', A' in the dtype of the forward pass.

        A wrapper may train the factors in more bits. What a merge adds must be what the forward pass has seen, so that
        B' A' takes it back exactly.
        """
        return [x.to(self.B_merged.dtype) for x in (self.B, self.A, self.B_merged, self.A_merged)]

    def _orthogonal(self, head: int, like: Tensor) -> Tensor:
        """Return orthonormal rows (r, n) for head number `head` among the heads of all processes."""
        shape = self.in_features, self.rank
        if like.is_meta:
            return like.new_empty(shape[::-1])
        drawn = ops.normal(shape, self.key, ops.stream_of("A", head), like.device)
        return ops.orthonormalize(drawn.to(working_dtype(like))).mT


def _side_by_side(dtype: torch.dtype, factors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return matrices (m, 2 H r) and (2 H r, n) whose product is `sum_h B_h A_h - B'_h A'_h`.

    Args:
        dtype: of the results.
        factors: B (H, m, r), A (H, r, n), B' (H, m, r), A' (H, r, n).
    """
    # One product instead of 2 H. It is written `(B - B') A + B' (A - A')`, which is small where little was learned and
    # exactly zero where nothing was.
    b, a, b_merged, a_merged = (x.to(dtype) for x in factors)
    return torch.cat([*(b - b_merged), *b_merged], 1), torch.cat([*a, *(a - a_merged)], 0)
