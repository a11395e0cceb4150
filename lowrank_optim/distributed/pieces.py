"""Which part of each dimension of a DTensor is in this process, and who has the other parts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist

from .lockstep import Peers


@dataclass(frozen=True)
class Piece:
    """What is here of one dimension.

    Attributes:
        whole, start, length: all of it, and what is here.
        most: the length of the longest piece; the same on all ranks, as what decides how work is divided must be.
        place, count: its number among all pieces, in their order, and how many there are.
        peers: those who have the others.
    """

    whole: int
    start: int
    length: int
    most: int
    place: int
    count: int
    peers: Peers

    def within(self, first: int, last: int) -> tuple[int, int]:
        """Where in this piece numbers `first` to `last` of the dimension begin and end."""
        return tuple(min(max(at - self.start, 0), self.length) for at in (first, last))  # type: ignore[return-value]


def pieces(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> dict[int, Piece]:
    """The dimensions of a DTensor that are cut, by their number."""
    cuts: dict[int, list[int]] = {}
    for at, one in enumerate(placements):
        if not one.is_replicate():
            cuts.setdefault(one.dim % len(shape), []).append(at)
    return {dim: _piece(shape[dim], mesh, _order(placements, some)) for dim, some in cuts.items()}


def peers_of(mesh: Any, placements: Sequence[Any]) -> Peers:
    """Those who have any other part of a DTensor; a placement of None counts as replicated."""
    return _peers(mesh, [at for at, one in enumerate(placements) if one is not None and not one.is_replicate()])


def ranges(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> tuple[slice, ...]:
    """What of a whole tensor is here."""
    cut = pieces(shape, mesh, placements)
    every = (cut.get(i) for i in range(len(shape)))
    return tuple(slice(None) if one is None else slice(one.start, one.start + one.length) for one in every)


def _order(placements: Sequence[Any], cuts: list[int]) -> list[int]:
    """Dimensions of the mesh in the order in which they have cut one dimension of a tensor.

    That is their own order, but for `_StridedShard`: FSDP comes to it when tensor parallelism, which is on a later
    dimension of the mesh, has cut it already.
    """
    later = [at for at in cuts if type(placements[at]).__name__ == "_StridedShard"]
    return [at for at in cuts if at not in later] + later


def _piece(whole: int, mesh: Any, order: list[int]) -> Piece:
    start, length, most, place, count = 0, whole, whole, 0, 1
    for at in order:
        parts, mine = mesh.size(at), mesh.get_local_rank(at)
        size, most = -(-length // parts), -(-most // parts)
        skipped = min(size * mine, length)
        start, length = start + skipped, min(size, length - skipped)
        place, count = place * parts + mine, count * parts
    return Piece(whole, start, length, most, place, count, _peers(mesh, order))


def _peers(mesh: Any, dims: list[int]) -> Peers:
    if len(dims) == 1:
        return Peers(mesh.get_group(dims[0]), mesh.device_type)
    ranks = mesh.mesh
    for i, at in enumerate(i for i in range(mesh.ndim) if i not in dims):
        ranks = ranks.select(at - i, mesh.get_local_rank(at))
    return Peers(_group(tuple(sorted(ranks.flatten().tolist())), dist.group.WORLD), mesh.device_type)


@functools.lru_cache(maxsize=64)
def _group(ranks: tuple[int, ...], world: Any) -> dist.ProcessGroup:
    """One group over several dimensions of a mesh: sums over one after the other may differ in their last bits.

    All ranks of a mesh come here for the same parameters in the same order, when an optimizer is made.
    """
    if len(ranks) == world.size():
        return cast(dist.ProcessGroup, world)
    return cast(dist.ProcessGroup, dist.new_group(list(ranks), use_local_synchronization=True))
