"""What the ranks decide together, so that none of them waits in a collective that the others do not enter."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..recipe.plan import Plan
from . import checks as shard_checks
from .layout import Cut, Layout
from .lockstep import Peers, total


def agree(plans: Iterable[Plan], peers: Peers) -> None:
    """Raises a RuntimeError on all ranks of a group if not all of them mean the same matrices, in the same order."""
    table = [(plan.name, plan.shape, plan.rank, plan.side) for plan in plans]
    digest = hashlib.blake2b(repr(table).encode(), digest_size=8).digest()
    own = torch.tensor([int.from_bytes(digest, "little") >> 1], device="cpu")
    both = total(torch.cat([own, -own]), peers, dist.ReduceOp.MAX)  # the largest, and minus the smallest
    shard_checks.same_plans(int(both[0]) == -int(both[1]), dist.get_rank(), table)


class Common:
    """The decisions of one optimizer. Without a sharded parameter there are none, and nothing is sent."""

    def __init__(self, plans: Mapping[Tensor, Plan], layouts: Mapping[Tensor, Layout]) -> None:
        self.plans = plans
        self.groups: dict[Peers, list[Tensor]] = {}
        for p, layout in layouts.items():
            if layout.sharded:
                self.groups.setdefault(cast(Cut, layout).everyone, []).append(p)
        self._agreed = False

    def agree(self) -> None:
        """Once: do all ranks mean the same matrices, in the same order?"""
        for peers, params in () if self._agreed else self.groups.items():
            agree(map(self.plans.__getitem__, params), peers)
        self._agreed = True

    def norms(self, grads: Iterable[tuple[Tensor, float]]) -> dict[Tensor, float]:
        """The norms of whole gradients from those of what is here of them; one all-reduce for all parameters."""
        found, here = {}, dict(grads)
        for peers, params in self.groups.items():
            numbers = [(here.get(p, 0.0) ** 2, float(p in here)) for p in params]
            whole = total(torch.tensor(numbers, dtype=torch.float64, device="cpu"), peers)
            for p, (square, ranks) in zip(params, whole.tolist(), strict=True):
                shard_checks.gradient_on_all(self.plans[p].name, int(ranks), peers.group.size())
                found[p] = math.sqrt(square) if square == square else math.nan
        return found

    def anywhere(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        for peers in self.groups:
            flag = bool(total(torch.tensor([int(flag)], device="cpu"), peers, dist.ReduceOp.MAX))
        return flag
