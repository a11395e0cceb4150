"""Compute which part of each dimension of a DTensor is local, and which ranks have the other parts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist

from .lockstep import Peers


@dataclass(frozen=True)
class Piece:
    """The local part of one dimension that is cut.

    Attributes:
        whole: the length of the whole dimension.
        start: the index of the first local entry in it.
        length: the number of local entries; it may be 0.
        most: the length of the longest piece of any rank. It decides how work is divided, so it is equal on all ranks.
        place: the index of this piece among all pieces, in ascending order of `start`.
        count: the number of pieces.
        peers: the ranks that have the pieces, this one included.
    """

    whole: int
    start: int
    length: int
    most: int
    place: int
    count: int
    peers: Peers

    def within(self, first: int, last: int) -> tuple[int, int]:
        """Return (first, last + 1), in local indices, of the part of a global range that is in this piece.

        `first` and `last` delimit the global range in the same way: `last` is excluded.
        """
        return tuple(min(max(end - self.start, 0), self.length) for end in (first, last))  # type: ignore[return-value]


def pieces(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> dict[int, Piece]:
    """Return the local piece of each dimension of a DTensor that is cut, by dimension.

    Args:
        shape: of the whole DTensor.
        mesh, placements: its device mesh, and one placement for each dimension of the mesh.
    """
    # Several dimensions of the mesh may cut one dimension of the tensor, as FSDP and tensor parallelism do together.
    cuts: dict[int, list[int]] = {}
    for mesh_dim, placement in enumerate(placements):
        if not placement.is_replicate():
            cuts.setdefault(placement.dim % len(shape), []).append(mesh_dim)
    return {dim: _piece(shape[dim], mesh, _order(placements, mesh_dims)) for dim, mesh_dims in cuts.items()}


def peers_of(mesh: Any, placements: Sequence[Any]) -> Peers:
    """Return the ranks that have the parts of a DTensor; a placement of None counts as replicated."""
    return _peers(mesh, [i for i, cut in enumerate(placements) if cut is not None and not cut.is_replicate()])


def ranges(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> tuple[slice, ...]:
    """Return the index of the local part in the whole tensor: one slice for each dimension."""
    cut = pieces(shape, mesh, placements)
    every = (cut.get(i) for i in range(len(shape)))
    return tuple(slice(None) if piece is None else slice(piece.start, piece.start + piece.length) for piece in every)


def _order(placements: Sequence[Any], cuts: list[int]) -> list[int]:
    """Return mesh dimensions in the order in which they have cut one dimension of a tensor.

    That is ascending order, except for `_StridedShard`. FSDP uses it where tensor parallelism has cut the dimension
    already, although the mesh dimension of tensor parallelism comes after that of FSDP.
    """
    later = [mesh_dim for mesh_dim in cuts if type(placements[mesh_dim]).__name__ == "_StridedShard"]
    return [mesh_dim for mesh_dim in cuts if mesh_dim not in later] + later


def _piece(whole: int, mesh: Any, order: list[int]) -> Piece:
    """Return the local piece of a dimension of length `whole` after the cuts of some mesh dimensions, in order."""
    start, length, most, place, count = 0, whole, whole, 0, 1
    # Each cut divides the current piece into chunks of ceil(length / parts), as torch.chunk does. The last chunks may
    # be shorter or empty, and the first one is always a longest one, so `most` follows the first chunks.
    for mesh_dim in order:
        parts, mine = mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim)
        size, most = -(-length // parts), -(-most // parts)
        skipped = min(size * mine, length)
        start, length = start + skipped, min(size, length - skipped)
        place, count = place * parts + mine, count * parts
    return Piece(whole, start, length, most, place, count, _peers(mesh, order))


def _peers(mesh: Any, dims: list[int]) -> Peers:
    """Return the ranks of the submesh that contains this rank and spans the given mesh dimensions."""
    if len(dims) == 1:
        return Peers(mesh.get_group(dims[0]), mesh.device_type)
    # Fix the coordinate of this rank in all other mesh dimensions. Each `select` drops one dimension, so later ones
    # have moved forward by the number dropped before.
    ranks = mesh.mesh
    for dropped, mesh_dim in enumerate(i for i in range(mesh.ndim) if i not in dims):
        ranks = ranks.select(mesh_dim - dropped, mesh.get_local_rank(mesh_dim))
    return Peers(_group(tuple(sorted(ranks.flatten().tolist())), dist.group.WORLD), mesh.device_type)


@functools.lru_cache(maxsize=64)
def _group(ranks: tuple[int, ...], world: Any) -> dist.ProcessGroup:
    """Return one process group for ranks that span several mesh dimensions.

    A sum over one mesh dimension and then over the next may differ from a single sum in its last bits. All ranks of a
    mesh call this for the same parameters in the same order, when an optimizer is made.

    Args:
        ranks: global ranks, ascending.
        world: the default group. It is part of the cache key, so that a new default group gets new subgroups.
    """
    if len(ranks) == world.size():
        return cast(dist.ProcessGroup, world)
    # Only members of the group enter `new_group`: other ranks of the mesh make the groups of their own submeshes.
    return cast(dist.ProcessGroup, dist.new_group(list(ranks), use_local_synchronization=True))
