"""The state of a parameter in flat tensors: assembled from the fragments of all processes, and taken apart again.

Of state that has a cut side, a fragment holds its own lines. All other state is the same in every process. Each
process writes its part into zeros, and the bytes are summed, so no bit changes on the way.
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

Borders = dict[int, dict[str, Tensor]]  # rows of state: by the first element of a fragment, then by key
# Counters of which a parameter has a single number. The matrices of a stack may be fragments with numbers of their own.
CLOCKS = ("step", "skipped")


def whole_states(table: ParameterTable) -> Iterator[tuple[Tensor, dict[str, Tensor], Borders]]:
    """Yield (parameter, its whole state, its borders) for every parameter in flat tensors that has state.

    All ranks must exhaust the iterator, because each step sums over ranks. Every rank holds the state of one parameter
    at a time, on the device of its process group.
    """
    spread = table.spread
    for (p, part), clocks in zip(spread.items(), _clocks(table), strict=True):
        if clocks[0] >= 0:
            whole = _assembled(table, p, part)
            for key, number in zip(CLOCKS, clocks, strict=True):
                whole[key].fill_(number)
            yield p, whole, _borders(table, p, part, whole)


def take_apart(table: ParameterTable, p: Tensor, whole: Mapping[str, Any], borders: Borders) -> None:
    """Copy the whole state of a parameter to its local fragments, each its own part.

    Args:
        whole: the state by key, as `whole_states` has yielded it.
        borders: rows that replace those of `whole`, because two ranks had different last bits.
    """
    if not any(whole[key] for key in CLOCKS):
        return  # no step yet: a fragment starts with such a state by itself
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
    """Yield (description, tensor) of the state of sharded fragments that must be the same on every rank."""
    for piece, (_, fragment, _) in table.homes.items():
        if fragment.layout.sharded:
            shapes, state = _shapes(table, piece), table.state(piece)
            alike = {key: x for key, x in state.items() if not cut_dimensions(shapes.get(key, ()))}
            yield from ((f"{key} of {fragment.plan.name} ({fragment.key})", x) for key, x in alike.items())


def expected(table: ParameterTable, plan: Plan, dtype: torch.dtype, group: dict[str, Any]) -> dict[str, Tensor]:
    """Return the whole state of a parameter before its first step, on the meta device.

    Args:
        dtype: dtype of the tensor that is updated, which may differ from the parameter's.
    """
    example = torch.empty(plan.shape, dtype=dtype, device="meta")
    return fresh(example, plan, table.recipe(plan, group), group, HERE)


def check(table: ParameterTable) -> None:
    """Raise a NotImplementedError, the same on all ranks, for parameters whose fragments cannot be assembled."""
    for p, spread in table.spread.items():
        name = table.plans[p].name
        shard_checks.of_everybody(name, spread.peers.group.size(), dist.get_world_size())
        shard_checks.owes_nothing(name, spread.group["bf16_update"] == "kahan" and spread.flat.itemsize < 4)


def masters(table: ParameterTable) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (parameter, whole master weights) of parameters that are updated in another dtype than the model's.

    All ranks must exhaust the iterator, because flat tensors are summed over ranks.
    """
    for p, spread in table.spread.items():
        if spread.flat.dtype != p.dtype:
            shape = table.plans[p].shape
            whole = torch.zeros(math.prod(shape), dtype=spread.flat.dtype, device=spread.peers.device)
            whole[spread.whole] = spread.flat.detach()[spread.here].to(whole.device)
            yield p, total(whole.view(torch.uint8), spread.peers).view(whole.dtype).view(shape)
    for p, copy in table.copies.items():
        if copy.dtype != p.dtype:
            yield p, copy.detach()


def set_masters(table: ParameterTable, masters: Mapping[Tensor, Tensor]) -> None:
    """Write whole master weights to the tensors that the optimizer updates."""
    for p, spread in table.spread.items():
        if p in masters and spread.flat.dtype != p.dtype:
            spread.flat.data[spread.here] = masters[p].reshape(-1)[spread.whole].to(spread.flat)
    for p, copy in table.copies.items():
        if p in masters and copy.dtype != p.dtype:
            copy.data.copy_(masters[p])


def _clocks(table: ParameterTable) -> list[list[float]]:
    """Return the CLOCKS of each parameter, the maximum over all fragments; -1 where no rank has state."""
    numbers = []
    for spread in table.spread.values():
        states = [state for piece in spread.pieces if (state := table.state(piece))]
        numbers.append([max((float(state[key]) for state in states), default=-1.0) for key in CLOCKS])
    if not numbers:
        return []
    peers = next(iter(table.spread.values())).peers
    latest = total(torch.tensor(numbers, dtype=torch.float64), peers, dist.ReduceOp.MAX)
    return latest.tolist()


def _assembled(table: ParameterTable, p: Tensor, spread: Spread) -> dict[str, Tensor]:
    """Return the whole state of p: the sum over ranks of their local parts within zeros."""
    stack = len(table.plans[p].batch)
    wanted = expected(table, table.plans[p], spread.flat.dtype, spread.group)
    whole = torch.zeros(sum(x.nbytes for x in wanted.values()), dtype=torch.uint8, device=spread.peers.device)
    views = _views(whole, wanted)
    for piece in spread.pieces:
        fragment, shapes = table.homes[piece].fragment, _shapes(table, piece)
        for key, x in table.state(piece).items():
            shape = shapes.get(key, ())
            own = None if key in CLOCKS else fragment.layout.once(x, shape)
            if own is not None:
                place = fragment.layout.once(_within(views[key], stack, fragment, shape), shape)
                cast(Tensor, place).copy_(own)
    return _views(total(whole, spread.peers), wanted)


def _borders(table: ParameterTable, p: Tensor, spread: Spread, whole: Mapping[str, Tensor]) -> Borders:
    """Return the local border rows that differ from `whole`.

    A row that a cut divides has its state in two processes, which may differ in the last bits.
    """
    stack, found = len(table.plans[p].batch), Borders()
    for piece in spread.pieces:
        fragment, shapes = table.homes[piece].fragment, _shapes(table, piece)
        for key, x in table.state(piece).items():
            own = fragment.layout.border(x, shapes.get(key, ()))
            if own is not None:
                known = fragment.layout.border(_within(whole[key], stack, fragment, shapes[key]), shapes[key])
                if not torch.equal(own.cpu(), cast(Tensor, known).cpu()):
                    found.setdefault(_begin(fragment), {})[key] = own.to("cpu", copy=True)
    return found


def _begin(fragment: Fragment) -> int:
    """Return the index of the fragment's first element in the whole parameter."""
    return (fragment.matrix or 0) * math.prod(fragment.plan.matrix) + fragment.layout.begin


def _views(whole: Tensor, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return views of the bytes `whole` as tensors like `wanted`, with its keys in their order.

    Tensors with wider elements come first in memory, so every view is aligned.
    """
    order = sorted(wanted, key=lambda key: -wanted[key].itemsize)
    parts = torch.split(whole, [wanted[key].nbytes for key in order])
    found = {key: part.view(wanted[key].dtype).view(wanted[key].shape) for key, part in zip(order, parts, strict=True)}
    return {key: found[key] for key in wanted}


def _shapes(table: ParameterTable, piece: Tensor) -> dict[str, Shape]:
    """Return the shapes of the state of a fragment by key, in which cut sides are marked."""
    _, fragment, group = table.homes[piece]
    recipe = table.recipe(fragment.plan, group)
    return {key: spec.shape for key, spec in kept(fragment.plan, recipe, fragment.layout, working_dtype(piece))}


def _within(whole: Tensor, stack: int, fragment: Fragment, shape: Shape) -> Tensor:
    """Return the part of a whole state tensor that belongs to a fragment.

    Args:
        stack: leading dimensions of the parameter that count its matrices.
    """
    if fragment.matrix is not None and whole.dim():
        whole = whole.flatten(0, stack - 1)[fragment.matrix]
    return fragment.layout.within(whole, shape)
