"""Decide on all ranks together, so that no rank waits in a collective that other ranks do not enter."""

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
    """Compare the plans of all ranks of a group; raise a RuntimeError on all of them if plans or their order differ."""
    table = [(plan.name, plan.shape, plan.rank, plan.side) for plan in plans]
    # Ranks compare a 63-bit hash of the table, which fits an int64. One maximum of (hash, -hash) gives the largest and
    # minus the smallest hash of all ranks; all hashes are equal if these two are.
    digest = hashlib.blake2b(repr(table).encode(), digest_size=8).digest()
    own = torch.tensor([int.from_bytes(digest, "little") >> 1], device="cpu")
    both = total(torch.cat([own, -own]), peers, dist.ReduceOp.MAX)
    shard_checks.same_plans(int(both[0]) == -int(both[1]), dist.get_rank(), table)


class Common:
    """The common decisions of one optimizer. Without a sharded parameter nothing is sent.

    Attributes:
        plans: of all parameters.
        groups: the sharded parameters, by the ranks that have parts of them.
    """

    def __init__(self, plans: Mapping[Tensor, Plan], layouts: Mapping[Tensor, Layout]) -> None:
        # `everyone` also contains ranks whose local part is empty: they have to enter the same collectives.
        self.plans = plans
        self.groups: dict[Peers, list[Tensor]] = {}
        for p, layout in layouts.items():
            if layout.sharded:
                self.groups.setdefault(cast(Cut, layout).everyone, []).append(p)
        self._agreed = False

    def agree(self) -> None:
        """Check once that all ranks have the same plans in the same order; see the function `agree`."""
        for peers, params in () if self._agreed else self.groups.items():
            agree(map(self.plans.__getitem__, params), peers)
        self._agreed = True

    def norms(self, grads: Iterable[tuple[Tensor, float]]) -> dict[Tensor, float]:
        """Return the norms of whole gradients, with one all-reduce per group of ranks. All ranks call it.

        Args:
            grads: each parameter that has a gradient, with the norm of the local part of the gradient.

        Raises:
            RuntimeError: a parameter has a gradient on a part of the ranks only.
        """
        found, here = {}, dict(grads)
        for peers, params in self.groups.items():
            # (parameters, 2): the square of the local norm, and 1 where there is a gradient. The sum of the second
            # column is the number of ranks with a gradient, so that a missing gradient is an error on all ranks.
            numbers = [(here.get(p, 0.0) ** 2, float(p in here)) for p in params]
            whole = total(torch.tensor(numbers, dtype=torch.float64, device="cpu"), peers)
            for p, (square, ranks) in zip(params, whole.tolist(), strict=True):
                shard_checks.gradient_on_all(self.plans[p].name, int(ranks), peers.group.size())
                found[p] = math.sqrt(square) if square == square else math.nan  # the square is NaN: so is the norm
        return found

    def anywhere(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. All ranks call it."""
        # A flag that one group has raised is handed on to the sums of the next group.
        for peers in self.groups:
            flag = bool(total(torch.tensor([int(flag)], device="cpu"), peers, dist.ReduceOp.MAX))
        return flag
