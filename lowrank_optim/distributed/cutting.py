"""Cut the ranges of flat tensors into fragments: one per parameter, or one per matrix of a stack that is cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..recipe.plan import Plan
from .deepspeed import Range
from .fragments import Fragment, Inside, Stretch, TouchedRows
from .lockstep import Peers
from .pieces import Piece


class Seat(NamedTuple):
    """The position of this process among the processes that share a flat tensor.

    Attributes:
        place: its rank in their group.
        world: the size of the group.
        peers: the group and its device.
    """

    place: int
    world: int
    peers: Peers


def fragments(
    ranges: Sequence[Range],
    plans: Sequence[Plan],
    elementwise: Sequence[bool],
    keys: Sequence[str],
    device: torch.device,
) -> Iterator[Fragment]:
    """Yield the fragments of one flat tensor, in an order that all ranks share. All ranks call it.

    Args:
        ranges: the local range of each parameter of the flat tensor's group.
        plans, elementwise, keys: of each parameter, see `cut`.
        device: of the flat tensor.
    """
    # Each process group is asked once for its peers and for the position of this process.
    groups = {own.group: peers_in(own.group, device) for own in ranges}
    seats = {group: Seat(dist.get_rank(group), dist.get_world_size(group), peers) for group, peers in groups.items()}
    yield from cut(ranges, _everywhere(ranges, device), [seats[own.group] for own in ranges], plans, elementwise, keys)


def cut(
    ranges: Sequence[Range],
    everywhere: Sequence[list[tuple[int, int]]],
    seats: Sequence[Seat],
    plans: Sequence[Plan],
    elementwise: Sequence[bool],
    keys: Sequence[str],
) -> Iterator[Fragment]:
    """Yield the fragments of one flat tensor, given the ranges of all ranks. It communicates nothing.

    Args:
        ranges: the local range of each parameter.
        everywhere: for each parameter, (start, length) of its range on every rank.
        seats: for each parameter, the position of this process.
        plans: of the parameters.
        elementwise: for each parameter, whether its rule looks at no shape.
        keys: of the state of each parameter.
    """
    for own, all_, seat, plan, flat, key in zip(ranges, everywhere, seats, plans, elementwise, keys, strict=True):
        size = math.prod(plan.shape)
        whole = any(length == size for _, length in all_)
        if whole:
            # A single rank has all of it and works alone; the others have no fragment of it.
            if own.length:
                yield Fragment(key, plan, Inside(plan.shape), own.offset, own.length)
        elif flat or len(plan.matrix) == 1:
            yield Fragment(key, replace(plan, batch=()), _stretch(own, all_, size, seat), own.offset, own.length)
        elif plan.batch:
            yield from _of_stack(own, all_, plan, key, seat)
        else:
            # Also with an empty local range: this rank takes part in the sums over ranks.
            yield Fragment(key, plan, _rows(own, all_, plan, seat), own.offset, own.length)


def _of_stack(own: Range, all_: list[tuple[int, int]], plan: Plan, key: str, seat: Seat) -> Iterator[Fragment]:
    """Yield a fragment for each matrix of a stack: the whole matrix, or the rows that the local range touches."""
    # `among` keeps the size of the whole stack, which decides how state is stored, for each of its matrices.
    size = math.prod(plan.matrix)
    part = replace(plan, shape=plan.shape[-2:], batch=(), among=plan.count)
    for number in range(plan.count):
        # The local range, and the ranges of all ranks, cut down to this matrix and counted from its first element.
        here, *there = (_within(start, length, number * size, size) for start, length in [own[1:3], *all_])
        local = own._replace(start=here[0], length=here[1], offset=own.offset + max(0, number * size - own.start))
        if any(length == size for _, length in there):
            if local.length:
                yield Fragment(f"{key}.{number}", part, Inside(part.shape, number), local.offset, local.length, number)
        else:
            layout = replace(_rows(local, there, part, seat), index=number)
            yield Fragment(f"{key}.{number}", part, layout, local.offset, local.length, number)


def _within(start: int, length: int, first: int, size: int) -> tuple[int, int]:
    """Return (start, length) of the overlap of two ranges, counted from the start of the second.

    The ranges begin at `start` and `first` and have `length` and `size` elements. Without an overlap it is (0, 0).
    """
    begin, end = max(start, first), min(start + length, first + size)
    return (begin - first, end - begin) if end > begin else (0, 0)


def _stretch(own: Range, all_: list[tuple[int, int]], size: int, seat: Seat) -> Stretch:
    """Return the layout of a flat range of a parameter with `size` elements; `all_`: the ranges of all ranks."""
    piece = Piece(size, own.start, own.length, max(length for _, length in all_), *seat)
    return Stretch(pieces={-1: piece}, natural={-1: 0}, everyone=piece.peers)


def _rows(own: Range, all_: list[tuple[int, int]], plan: Plan, seat: Seat) -> TouchedRows:
    """Return the layout of the rows of one matrix that the local range touches; `all_`: the ranges of all ranks."""
    height, width = plan.matrix[::-1] if plan.side == "right" else plan.matrix
    # Local rows include those that are shared. The piece of a rank with an empty range is empty as well.
    touched = [_touched(start, length, width) for start, length in all_]
    start, stop = _touched(own.start, own.length, width)
    piece = Piece(height, start, stop - start, max(b - a for a, b in touched), *seat)
    side = -1 if plan.side == "right" else -2
    # A row is an edge if the range of any rank begins inside it.
    return TouchedRows(
        pieces={side: piece}, natural={side: 0}, everyone=piece.peers, width=width,
        skipped=own.start % width if own.length else 0, elements=own.length,
        edges=tuple(sorted({start // width for start, length in all_ if length and start % width})),
    )  # fmt: skip


def _touched(start: int, length: int, width: int) -> tuple[int, int]:
    """Return (first, last + 1) of the rows of `width` elements that a range touches."""
    first = start // width
    return first, -(-(start + length) // width) if length else first


def peers_in(group: dist.ProcessGroup, device: torch.device) -> Peers:
    """Return the peers of a group that share flat tensors on `device`."""
    # NCCL adds up on GPUs only. Where flat tensors are offloaded to the CPU, the sums are therefore still on the GPU.
    return Peers(group, "cuda" if dist.get_backend(group) == "nccl" else device.type)


def _everywhere(ranges: Sequence[Range], device: torch.device) -> list[list[tuple[int, int]]]:
    """Return, for each parameter, (start, length) of its range on every rank of its group. All ranks call it."""
    found: dict[int, list[tuple[int, int]]] = {}
    for group in dict.fromkeys(entry.group for entry in ranges):
        # One all-gather per group: (parameters, 2) from each rank becomes (ranks, parameters, 2).
        same = [i for i, entry in enumerate(ranges) if entry.group is group]
        own = torch.tensor([ranges[i][1:3] for i in same], device=peers_in(group, device).device)
        everyone = own.new_empty(dist.get_world_size(group), *own.shape)
        dist.all_gather(list(everyone.unbind(0)), own, group=group)
        for i, numbers in zip(same, everyone.unbind(1), strict=True):
            found[i] = [(int(start), int(length)) for start, length in numbers.tolist()]
    return [found[i] for i in range(len(ranges))]
