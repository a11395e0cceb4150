"""Find the layout of a DTensor, from its placements on the mesh and the plan of its parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from ..recipe.algebra import WHOLE, Algebra
from ..recipe.plan import Plan
from . import checks as shard_checks
from .dtensors import local
from .layout import BATCH, HERE, Cut, Layout, Replicated
from .lockstep import Peers
from .pieces import peers_of, pieces


def layout_of(p: Tensor, plan: Plan) -> Layout:
    """Return the layout of a parameter; raise a NotImplementedError for a DTensor with an unsupported layout."""
    if not hasattr(p, "device_mesh"):
        return HERE
    # A DTensor with replicas only needs no collectives: every rank has the same whole gradient.
    dtensor = cast(Any, p)
    placements, mesh = tuple(dtensor.placements), dtensor.device_mesh
    if all(placement.is_replicate() for placement in placements):
        return Replicated()
    shard_checks.layout(plan.name, placements)
    cut = pieces(plan.shape, mesh, placements)
    # `pieces` assumes that torch cuts into equal parts, the last ones shorter. The local tensor shows whether it did.
    if any(local(p).shape[natural] != piece.length for natural, piece in cut.items()):
        raise NotImplementedError(
            f"{plan.name} is sharded with the placements {placements}, but not into equal parts. Shard it with "
            "fully_shard, parallelize_module or distribute_tensor"
        )
    # From dimensions of the parameter to sides of the turned matrix: -2, -1, or -3 for the batch.
    natural = {dimension(plan, i): i for i in cut}
    sides = {side: cut[i] for side, i in natural.items()}
    shard_checks.cut_stack(plan.name, bool(plan.batch), len(sides.keys() & {-2, -1}))
    everyone = peers_of(mesh, placements)
    return Cut(mesh, placements, sides, natural, len(plan.batch), everyone, _both(mesh, placements, natural))


def _both(mesh: Any, placements: Sequence[Any], natural: Mapping[int, int]) -> Peers | None:
    """Return the ranks that have parts of the same matrix if both of its sides are cut; else None."""
    sides = {dim for side, dim in natural.items() if side != BATCH}
    # None marks mesh dimensions that cut the batch or nothing: their ranks have other matrices, or the same part.
    inside = [None if placement.is_replicate() or placement.dim not in sides else placement for placement in placements]
    return peers_of(mesh, inside) if len(sides) == 2 else None


def algebra_of_rows(layout: Layout, turned: bool) -> Algebra:
    """Return the algebra of a matrix that is cut by rows, if at all.

    Args:
        layout: of the matrix.
        turned: whether the algebra is for the transposed matrix, whose columns are then cut.
    """
    if not isinstance(layout, Cut):
        return WHOLE
    (piece,) = layout.pieces.values()
    return layout._shards({-1 if turned else -2: piece}, [layout.meter])


def dimension(plan: Plan, natural: int) -> int:
    """Return the key in `Cut.pieces` (-3, -2 or -1) for dimension `natural` of a parameter.

    Raises:
        NotImplementedError: the dimension is neither the first one of a batch nor a side of the matrix.
    """
    if len(plan.matrix) == 1:
        return -1
    rows = len(plan.batch)
    if natural < rows:
        shard_checks.batch(plan.name, natural)
        return BATCH
    if natural > rows and len(plan.shape) > rows + 2:
        raise NotImplementedError(
            f"{plan.name} {plan.shape} is read as a matrix {plan.matrix}, and sharded along dimension {natural}, which "
            "is not a side of that matrix. Shard dimension 0 (the default of fully_shard)"
        )
    # A turned matrix has its columns first, so a row of the parameter is then the last side.
    is_row = natural == rows
    return -2 if is_row != (plan.side == "right") else -1
