"""DTensors from the plain tensors that they are made of, and back. Where something communicates, it says so."""

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
    """What of a tensor is in this process; the same memory."""
    return cast(Any, x).to_local() if hasattr(x, "device_mesh") else x


def meta(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor without memory, laid out as x."""
    here = torch.empty(shape_of(local(x)), dtype=dtype, device="meta")
    if not hasattr(x, "device_mesh"):
        return here
    return from_local(here, cast(Any, x).device_mesh, cast(Any, x).placements, tuple(x.shape))


def whole(x: Tensor) -> Tensor:
    """All of a tensor, which should be thin. All ranks call it."""
    return cast(Any, x).full_tensor() if hasattr(x, "device_mesh") else x


def joined(x: Tensor) -> Tensor:
    """The same, sent along with what others in lockstep send. All ranks call it."""
    if not hasattr(x, "device_mesh"):
        return x
    everyone = local(x).new_zeros(x.shape)
    part(everyone, x).copy_(local(x))
    return _summed(everyone, x)


def picked(x: Tensor, index: Tensor) -> Tensor:
    """Some rows of a tensor that is cut by rows, sent as `joined` is. All ranks call it, with the same numbers."""
    if not hasattr(x, "device_mesh"):
        return x[index]
    rows, (mine, here) = local(x).new_zeros(len(index), *x.shape[1:]), _numbers_here(x, index)
    rows[mine] = local(x)[here]
    return _summed(rows, x)


def place_(x: Tensor, index: Tensor, rows: Tensor) -> None:
    """Overwrites some rows of a tensor that is cut by rows, if at all, by what all ranks have."""
    if not hasattr(x, "device_mesh"):
        x.index_copy_(0, index, rows.to(x.dtype))
    else:
        mine, here = _numbers_here(x, index)
        local(x).index_copy_(0, here, rows[mine].to(x.dtype))


def _numbers_here(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Which of some rows are here, as places in `index`, and their numbers here."""
    here = index - first_row(x)
    mine = ((here >= 0) & (here < len(local(x)))).nonzero().squeeze(-1)
    return mine, here[mine]


def _summed(x: Tensor, example: Tensor) -> Tensor:
    dtensor = cast(Any, example)
    return total(x, peers_of(dtensor.device_mesh, dtensor.placements))


def part(x: Tensor, example: Tensor) -> Tensor:
    """What is here of a whole tensor that is to be laid out as the example is; the same memory."""
    if not hasattr(example, "device_mesh"):
        return x
    dtensor = cast(Any, example)
    return x[ranges(dtensor.shape, dtensor.device_mesh, dtensor.placements)]


def first_row(x: Tensor) -> int:
    """The number of the first row that is here."""
    dtensor = cast(Any, x)
    cut = pieces(dtensor.shape, dtensor.device_mesh, dtensor.placements) if hasattr(x, "device_mesh") else {}
    return cut[0].start if 0 in cut else 0


def like(x: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, or a DTensor of another layout, laid out as the example is; new memory. All ranks call it."""
    from torch.distributed.tensor import DTensor

    if isinstance(x, DTensor):
        same = isinstance(example, DTensor) and (x.device_mesh, x.placements) == (
            example.device_mesh,
            example.placements,
        )
        x = x.to_local() if same else x.full_tensor()
        if same:
            example_here = local(example)
            return _again(x.to(example_here.device, example_here.dtype, copy=True), example)
    if not isinstance(example, DTensor):
        return x.detach().to(x.device if example.is_meta else example.device, example.dtype, copy=True)
    here = local(example)
    return _again(part(x, example).detach().to(here.device, here.dtype, copy=True).contiguous(), example)


def laid_out(x: Tensor, example: Tensor) -> Tensor:
    """A tensor like the example of which x is what is here; the same memory."""
    return _again(x, example) if hasattr(example, "device_mesh") else x


def _again(x: Tensor, example: Any) -> Tensor:
    return from_local(x, example.device_mesh, example.placements, tuple(example.shape))


def from_local(x: Tensor, mesh: Any, placements: Sequence[Any], shape: Shape) -> Tensor:
    """A DTensor of row-major strides with this memory, also where parameters are offloaded from the mesh's devices."""
    from torch.distributed.tensor import DTensor

    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    offloaded = x.device.type != mesh.device_type and not x.is_meta
    example = torch.empty_like(x, device="meta") if offloaded else x
    made = DTensor.from_local(example, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    return cast(Any, DTensor)(x, made._spec, requires_grad=False) if offloaded else made


def moved(placement: Any, dim: int) -> Any:
    """The same cut along another dimension."""
    strided = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(dim, **strided)
