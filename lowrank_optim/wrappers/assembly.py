"""The state of a parameter whose fragments are in flat tensors: put together from all processes, and taken apart.

A fragment of a side that is cut has its lines of state, and all else of it is the same in every process. What travels
is bytes, added up over zeros, so that no bit changes on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import checks as shard_checks
from ..distributed.fragments import Fragment, cut_dimensions
from ..distributed.layout import HERE
from ..distributed.lockstep import total
from ..engine.state import fresh, kept, loaded
from ..engine.table import ParameterTable, Spread
from ..recipe.plan import Plan
from ..recipe.store import Shape
from ..recipe.weights import working_dtype

Borders = dict[int, dict[str, Tensor]]  # rows of state by key, by the element at which a fragment begins
CLOCKS = ("step", "skipped")  # one of each for a stack, whose matrices may be fragments that have their own


def whole_states(table: ParameterTable) -> Iterator[tuple[Tensor, dict[str, Tensor], Borders]]:
    """(parameter, its whole state, its borders) of every parameter in flat tensors that has any.

    All ranks call it, to the end. Each holds the state of one parameter at a time, where the ranks can add up.
    """
    spread = table.spread
    for (p, one), clocks in zip(spread.items(), _clocks(table), strict=True):
        if clocks[0] >= 0:
            whole = _assembled(table, p, one)
            for key, number in zip(CLOCKS, clocks, strict=True):
                whole[key].fill_(number)
            yield p, whole, _borders(table, p, one, whole)


def take_apart(table: ParameterTable, p: Tensor, whole: Mapping[str, Any], borders: Borders) -> None:
    """Gives the fragments of a parameter that are here copies of their parts of its whole state."""
    if not any(whole[key] for key in CLOCKS):
        return  # no step yet: a fragment begins like that by itself
    stack = len(table.plans[p].batch)
    for piece in table.spread[p].pieces:
        _, fragment, group = table.homes[piece]
        shapes, ours = _shapes(table, piece), table.fresh_state(piece, group)
        parts = {key: _within(x, stack, fragment, shapes.get(key, ())) for key, x in whole.items()}
        state = loaded(fragment.plan.name, parts, ours, fragment.layout)
        for key, row in borders.get(_begin(fragment), {}).items():
            own = fragment.layout.border(state[key], shapes[key])
            if own is not None and own.shape == row.shape:
                own.copy_(row)
        table.keep(piece, state)


def replicated(table: ParameterTable) -> Iterator[tuple[str, Tensor]]:
    """(what it is, the tensor) of all state of fragments that every rank has, and has alike."""
    for piece, (_, fragment, _) in table.homes.items():
        if fragment.layout.sharded:
            shapes, state = _shapes(table, piece), table.state(piece)
            alike = {key: x for key, x in state.items() if not cut_dimensions(shapes.get(key, ()))}
            yield from ((f"{key} of {fragment.plan.name} ({fragment.key})", x) for key, x in alike.items())


def expected(table: ParameterTable, plan: Plan, dtype: torch.dtype, group: dict[str, Any]) -> dict[str, Tensor]:
    """The whole state of a parameter before its first step, without memory; `dtype`: of what is updated."""
    example = torch.empty(plan.shape, dtype=dtype, device="meta")
    return fresh(example, plan, table.recipe(plan, group), group, HERE)


def check(table: ParameterTable) -> None:
    """Raises a NotImplementedError for fragments of which there is no whole, the same on all ranks."""
    for p, one in table.spread.items():
        name = table.plans[p].name
        shard_checks.of_everybody(name, one.peers.group.size(), dist.get_world_size())
        shard_checks.owes_nothing(name, one.group["bf16_update"] == "kahan" and one.flat.itemsize < 4)


def masters(table: ParameterTable) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter, whole weights) of what is updated in another dtype than the model has it in. All ranks call it."""
    for p, one in table.spread.items():
        if one.flat.dtype != p.dtype:
            shape = table.plans[p].shape
            whole = torch.zeros(math.prod(shape), dtype=one.flat.dtype, device=one.peers.device)
            whole[one.whole] = one.flat.detach()[one.here].to(whole.device)
            yield p, total(whole.view(torch.uint8), one.peers).view(whole.dtype).view(shape)
    for p, copy in table.copies.items():
        if copy.dtype != p.dtype:
            yield p, copy.detach()


def set_masters(table: ParameterTable, masters: Mapping[Tensor, Tensor]) -> None:
    """Writes them where the optimizer updates them."""
    for p, one in table.spread.items():
        if p in masters and one.flat.dtype != p.dtype:
            one.flat.data[one.here] = masters[p].reshape(-1)[one.whole].to(one.flat)
    for p, copy in table.copies.items():
        if p in masters and copy.dtype != p.dtype:
            copy.data.copy_(masters[p])


def _clocks(table: ParameterTable) -> list[list[float]]:
    """CLOCKS of each parameter, the latest of all fragments; -1 where nobody has state."""
    numbers = []
    for one in table.spread.values():
        states = [state for piece in one.pieces if (state := table.state(piece))]
        numbers.append([max((float(state[key]) for state in states), default=-1.0) for key in CLOCKS])
    if not numbers:
        return []
    peers = next(iter(table.spread.values())).peers
    latest = total(torch.tensor(numbers, dtype=torch.float64), peers, dist.ReduceOp.MAX)
    return latest.tolist()


def _assembled(table: ParameterTable, p: Tensor, one: Spread) -> dict[str, Tensor]:
    """The sum of what all ranks have, each within zeros."""
    stack = len(table.plans[p].batch)
    wanted = expected(table, table.plans[p], one.flat.dtype, one.group)
    whole = torch.zeros(sum(x.nbytes for x in wanted.values()), dtype=torch.uint8, device=one.peers.device)
    views = _views(whole, wanted)
    for piece in one.pieces:
        fragment, shapes = table.homes[piece].fragment, _shapes(table, piece)
        for key, x in table.state(piece).items():
            shape = shapes.get(key, ())
            own = None if key in CLOCKS else fragment.layout.once(x, shape)
            if own is not None:
                there = fragment.layout.once(_within(views[key], stack, fragment, shape), shape)
                cast(Tensor, there).copy_(own)
    return _views(total(whole, one.peers), wanted)


def _borders(table: ParameterTable, p: Tensor, one: Spread, whole: Mapping[str, Tensor]) -> Borders:
    """Rows that a cut divides are in two processes, and may differ in a last bit: what is here and not in `whole`."""
    stack, found = len(table.plans[p].batch), Borders()
    for piece in one.pieces:
        fragment, shapes = table.homes[piece].fragment, _shapes(table, piece)
        for key, x in table.state(piece).items():
            own = fragment.layout.border(x, shapes.get(key, ()))
            if own is not None:
                there = fragment.layout.border(_within(whole[key], stack, fragment, shapes[key]), shapes[key])
                if not torch.equal(own.cpu(), cast(Tensor, there).cpu()):
                    found.setdefault(_begin(fragment), {})[key] = own.to("cpu", copy=True)
    return found


def _begin(fragment: Fragment) -> int:
    """The number of its first element in the parameter."""
    return (fragment.matrix or 0) * math.prod(fragment.plan.matrix) + fragment.layout.begin


def _views(whole: Tensor, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of which `whole` has the bytes, in the order of the keys; wide numbers are first in memory."""
    order = sorted(wanted, key=lambda key: -wanted[key].itemsize)
    parts = torch.split(whole, [wanted[key].nbytes for key in order])
    found = {key: part.view(wanted[key].dtype).view(wanted[key].shape) for key, part in zip(order, parts, strict=True)}
    return {key: found[key] for key in wanted}


def _shapes(table: ParameterTable, piece: Tensor) -> dict[str, Shape]:
    """Of the state of a fragment that parts have asked for, with its cut sides."""
    _, fragment, group = table.homes[piece]
    recipe = table.recipe(fragment.plan, group)
    return {key: one.shape for key, one in kept(fragment.plan, recipe, fragment.layout, working_dtype(piece))}


def _within(whole: Tensor, stack: int, fragment: Fragment, shape: Shape) -> Tensor:
    """What belongs to a fragment of a whole tensor of state, of which `stack` dimensions count matrices."""
    if fragment.matrix is not None and whole.dim():
        whole = whole.flatten(0, stack - 1)[fragment.matrix]
    return fragment.layout.within(whole, shape)
