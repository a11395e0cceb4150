"""Convert between DTensors and the plain local tensors that they are made of.

Every function accepts plain tensors as well, which count as whole. A function communicates only if its docstring says
that all ranks call it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..recipe.plan import shape_of
from ..recipe.store import Shape
from .lockstep import total
from .pieces import peers_of, pieces, ranges


def local(x: Tensor) -> Tensor:
    """Return the local part of a tensor, in the same memory."""
    return cast(Any, x).to_local() if hasattr(x, "device_mesh") else x


def meta(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor on the meta device with the shape and layout of x."""
    here = torch.empty(shape_of(local(x)), dtype=dtype, device="meta")
    if not hasattr(x, "device_mesh"):
        return here
    return from_local(here, cast(Any, x).device_mesh, cast(Any, x).placements, tuple(x.shape))


def whole(x: Tensor) -> Tensor:
    """Return the whole tensor, which should be thin, by a collective of its own. All ranks call it."""
    return cast(Any, x).full_tensor() if hasattr(x, "device_mesh") else x


def joined(x: Tensor) -> Tensor:
    """Return the whole tensor, sent together with the sums of other tasks in lockstep. All ranks call it."""
    if not hasattr(x, "device_mesh"):
        return x
    # The local part within zeros of the whole shape: the sum over ranks puts the parts together.
    everyone = local(x).new_zeros(x.shape)
    part(everyone, x).copy_(local(x))
    return _summed(everyone, x)


def picked(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows `index` of x (k, n), (len(index), n), on every rank; sent as `joined` sends. All ranks call it.

    Args:
        x: cut by rows, if at all.
        index: global row indices, the same on all ranks.
    """
    if not hasattr(x, "device_mesh"):
        return x[index]
    # Only the chosen rows are sent: each rank fills in those that it has, and the others stay zero in the sum.
    rows, (mine, here) = local(x).new_zeros(len(index), *x.shape[1:]), _numbers_here(x, index)
    rows[mine] = local(x)[here]
    return _summed(rows, x)


def place_(x: Tensor, index: Tensor, rows: Tensor) -> None:
    """Overwrite the rows `index` of x by `rows` (len(index), n), which all ranks have.

    Args:
        x: (k, n), cut by rows, if at all. Each rank writes its local rows.
        index: global row indices.
    """
    if not hasattr(x, "device_mesh"):
        x.index_copy_(0, index, rows.to(x.dtype))
    else:
        mine, here = _numbers_here(x, index)
        local(x).index_copy_(0, here, rows[mine].to(x.dtype))


def _numbers_here(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions in `index` of the rows that are local, and their local row indices."""
    # Local rows are contiguous, so a row is local if its index relative to the first one is in range.
    here = index - first_row(x)
    mine = ((here >= 0) & (here < len(local(x)))).nonzero().squeeze(-1)
    return mine, here[mine]


def _summed(x: Tensor, example: Tensor) -> Tensor:
    """Return the sum of x over the ranks that have the parts of a DTensor. All ranks call it."""
    # Through lockstep, unlike `full_tensor`, so that tasks share one collective.
    dtensor = cast(Any, example)
    return total(x, peers_of(dtensor.device_mesh, dtensor.placements))


def part(x: Tensor, example: Tensor) -> Tensor:
    """Return the local part of a whole tensor x if it were laid out as the example is, in the same memory."""
    if not hasattr(example, "device_mesh"):
        return x
    dtensor = cast(Any, example)
    return x[ranges(dtensor.shape, dtensor.device_mesh, dtensor.placements)]


def first_row(x: Tensor) -> int:
    """Return the global index of the first local row."""
    dtensor = cast(Any, x)
    cut = pieces(dtensor.shape, dtensor.device_mesh, dtensor.placements) if hasattr(x, "device_mesh") else {}
    return cut[0].start if 0 in cut else 0


def like(x: Tensor, example: Tensor) -> Tensor:
    """Return a copy of x with the layout, device and dtype of the example. All ranks call it.

    Args:
        x: a whole plain tensor, or a DTensor of any layout.
        example: a plain tensor or a DTensor of the same global shape.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(x, DTensor):
        # A DTensor of the same layout needs no communication. Any other one is gathered first.
        same = isinstance(example, DTensor) and (x.device_mesh, x.placements) == (
            example.device_mesh,
            example.placements,
        )
        x = x.to_local() if same else x.full_tensor()
        if same:
            example_here = local(example)
            return _again(x.to(example_here.device, example_here.dtype, copy=True), example)
    if not isinstance(example, DTensor):
        # An example on the meta device has no device to copy to; x stays where it is.
        return x.detach().to(x.device if example.is_meta else example.device, example.dtype, copy=True)
    here = local(example)
    return _again(part(x, example).detach().to(here.device, here.dtype, copy=True).contiguous(), example)


def laid_out(x: Tensor, example: Tensor) -> Tensor:
    """Return the tensor that is laid out as the example is and has x as its local part, in the same memory."""
    return _again(x, example) if hasattr(example, "device_mesh") else x


def _again(x: Tensor, example: Any) -> Tensor:
    """Return the DTensor with local part x and the mesh, placements and shape of the example."""
    return from_local(x, example.device_mesh, example.placements, tuple(example.shape))


def from_local(x: Tensor, mesh: Any, placements: Sequence[Any], shape: Shape) -> Tensor:
    """Return the DTensor of a global shape with local part x, in the same memory and with row-major strides.

    x may be on another device than those of the mesh, as where FSDP offloads parameters to the CPU.
    """
    from torch.distributed.tensor import DTensor

    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    # `from_local` would move an offloaded tensor to the mesh's device. It therefore makes the specification from a
    # tensor without memory, and the DTensor is built around x itself.
    offloaded = x.device.type != mesh.device_type and not x.is_meta
    example = torch.empty_like(x, device="meta") if offloaded else x
    made = DTensor.from_local(example, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    return cast(Any, DTensor)(x, made._spec, requires_grad=False) if offloaded else made


def moved(placement: Any, dim: int) -> Any:
    """Return the placement that makes the same cut along dimension `dim`."""
    # A _StridedShard has a second argument; a plain Shard has none.
    strided = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(dim, **strided)
