"""Fill the residual slot with exact Adam on the few entries where the projection errs most (GaLore+)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.degenerate import untied_
from ..recipe.algebra import Algebra
from ..recipe.recipe import Clock, Recipe, Residual, State, Update
from ..recipe.store import Exact, Shape, Spec
from .momentum import EMA
from .scaling import RMS

_WORK = 1 << 18  # elements of P and of D that are gathered at once, about 1 MiB each


@dataclass(frozen=True)
class Sparse(Residual):
    """The correction `weight (U - P D)` on a fixed sparse set of entries, where U is the direction of Adam itself.

    The set holds the largest entries of `|G - P P^T G|` at the first refresh. Its moments see every gradient from then
    on and do not depend on the basis. With weight 1 these entries follow Adam. The state `entries_age` is 0 before the
    first refresh, 1 at it, and grows by 1 with each gradient.

    Args:
        density: share of the entries of a matrix.
        weight: of the correction.
        momentum, scaling: the two moments of Adam.
    """

    density: float
    weight: float
    momentum: EMA
    scaling: RMS

    def uncut(self) -> Mapping[int, str]:
        why = "its entries are the largest of the whole gradient, and ranks would keep unequal shares; take density=0"
        return dict.fromkeys((-2, -1), why) if self.density else {}

    def spec(self, shape: Shape) -> dict[str, Spec]:
        count = round(self.density * math.prod(shape))
        if not count:
            return {}
        whole = Exact(torch.int32)
        return {
            "entries": Spec((count,), store=whole),
            "entries_age": Spec((1,), store=whole),
            "entries_avg": Spec((count,)),
            "entries_avg_sq": Spec((count,), unsigned=True),
        }

    def workspace(self, shape: Shape, coordinates: int) -> int:
        count, rank = round(self.density * math.prod(shape)), coordinates // shape[1]
        choosing = 2 * math.prod(shape)  # at the first refresh only
        return max(choosing, coordinates + 12 * count + 3 * min(count * rank, _WORK + rank))

    def begin_(self, algebra: Algebra, recipe: Recipe, st: State, basis: State, g: Tensor) -> None:
        if "entries" in st:
            rest = g.clone()
            recipe.basis.add_up_(rest, recipe.basis.down(algebra, g, basis), basis, alpha=-1, beta=1)
            count, largest = st["entries"].shape[-1], algebra.largest(g).unsqueeze(-1)
            entries = untied_(rest.abs_().flatten(-2), count, largest).topk(count).indices.sort().values
            st["entries"].copy_(entries)
            st["entries_age"].fill_(1)

    def after(
        self, algebra: Algebra, recipe: Recipe, st: State, g: Tensor, r: Tensor, d: Tensor, gain: Clock
    ) -> Update:
        d = d * gain
        if "entries" not in st:
            return Update(d)
        chosen = g.flatten(-2).gather(-1, st["entries"].long())
        st["entries_age"].add_(st["entries_age"] > 0)
        t = (st["entries_age"] - 1).clamp(min=1).to(g.dtype)
        moments = {"exp_avg": st["entries_avg"], "exp_avg_sq": st["entries_avg_sq"]}
        numerator, correction = self.momentum(moments, chosen, t)
        exact = self.scaling(algebra, moments, numerator, chosen, t) * correction
        return Update(d, entries=(st["entries"], (exact - _entries_of(recipe, st, d, g)) * self.weight))


def _entries_of(recipe: Recipe, st: State, d: Tensor, g: Tensor) -> Tensor:
    """Return `P D` at the entries only, `(..., k)`: products of gathered rows of P and columns of D, in pieces."""
    positions, basis, columns = st["entries"].long(), st["basis"], d.mT
    parts = []
    for piece in torch.split(positions, max(1, _WORK // basis.shape[-1]), dim=-1):
        row, column = piece // g.shape[-1], piece % g.shape[-1]
        if g.dim() == 2:
            parts.append((basis[row] * columns[column]).sum(-1))
        else:
            batch = torch.arange(len(g), device=g.device).unsqueeze(-1)
            parts.append((basis[batch, row] * columns[batch, column]).sum(-1))
    return torch.cat(parts, dim=-1)
