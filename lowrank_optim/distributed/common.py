"""What the ranks decide together, so that none of them waits in a collective that the others do not enter."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..plan import Plan
from .layout import Cut, Layout, local


def agree(table: Sequence[Any], group: Any, device: torch.device) -> None:
    """Raises a RuntimeError on all ranks of a group if not all of them have the same table."""
    digest = hashlib.blake2b(repr(table).encode(), digest_size=8).digest()
    own = torch.tensor([int.from_bytes(digest, "little") >> 1], device=device)
    everyone = own.new_empty(group.size())
    dist.all_gather(list(everyone.chunk(group.size())), own, group=group)
    checks.same_plans(bool((everyone == own).all()), dist.get_rank(), table)


class Common:
    """The decisions of one optimizer. Without a sharded parameter there are none, and nothing is sent."""

    def __init__(self, plans: Mapping[Tensor, Plan], layouts: Mapping[Tensor, Layout]) -> None:
        self.plans = plans
        self.groups: dict[Any, list[Tensor]] = {}
        for p, layout in layouts.items():
            if layout.sharded:
                self.groups.setdefault(cast(Cut, layout).group, []).append(p)
        self._agreed = False

    def agree(self) -> None:
        """Once: do all ranks mean the same matrices, in the same order?"""
        for group, params in () if self._agreed else self.groups.items():
            table = [(plan.name, plan.shape, plan.rank, plan.side) for plan in map(self.plans.__getitem__, params)]
            agree(table, group, params[0].device)
        self._agreed = True

    def norms(self, grads: Iterable[tuple[Tensor, float]]) -> dict[Tensor, float]:
        """The norms of whole gradients from those of what is here of them; one all-reduce for all parameters."""
        found, here = {}, dict(grads)
        for group, params in self.groups.items():
            numbers = [(here.get(p, 0.0) ** 2, float(p in here)) for p in params]
            total = torch.tensor(numbers, dtype=torch.float64, device=local(params[0]).device)
            dist.all_reduce(total, group=group)
            for p, (square, ranks) in zip(params, total.tolist(), strict=True):
                checks.gradient_on_all(self.plans[p].name, int(ranks), group.size())
                found[p] = math.sqrt(square) if square == square else math.nan
        return found

    def anywhere(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        for group, params in self.groups.items():
            answer = torch.tensor(float(flag), device=local(params[0]).device)
            dist.all_reduce(answer, dist.ReduceOp.MAX, group=group)
            flag = bool(answer)
        return flag
