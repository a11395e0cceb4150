"""How a parameter and its state lie over processes: what of them is here, and which algebra fits.

Everything above this folder works on what is here, a plain tensor. State that has the cut side of its matrix is cut as
the matrix is, and kept as a DTensor, so that checkpoints know; all other state is the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..kept import Shape, Side, Spec, Store
from ..ops.philox import Places
from ..plan import Plan
from .algebra import WHOLE, Algebra
from .shards import Meter, Shards

_BATCH = -3


class Layout:
    """Here is all of it, an ordinary tensor."""

    sharded = False  # True: a step needs all ranks
    first = 0  # number of the first matrix of the batch that is here
    key: tuple[Any, ...] = ()  # equal where matrices can be stacked

    def here(self, x: Tensor) -> Tensor:
        """A parameter, its gradient or a tensor of its state, as far as it is here; the same memory."""
        return x

    def here_all(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def plan(self, plan: Plan) -> Plan:
        """The plan of what is here."""
        return plan

    def matrix(self, plan: Plan) -> Shape:
        """The shape of the whole matrix, for `Recipe.spec`; a side that is cut is a `Side`."""
        return plan.matrix

    def weight(self, plan: Plan) -> Shape:
        """The shape of what is here of the parameter, as a matrix that is not turned, for `number`."""
        return plan.matrix

    def spec(self, spec: dict[str, Spec]) -> dict[str, Spec]:
        """The shapes of what is here, from those of the whole."""
        return spec

    def zeros(self, batch: Shape, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A new tensor of state: one of `shape`, as `matrix` led to it, for each matrix."""
        return torch.zeros(batch + shape, dtype=dtype, device=device)

    def gather(self, x: Tensor) -> Tensor | None:
        """The whole of a tensor of state, a copy on the CPU of rank 0; None on other ranks. All ranks call it."""
        return None if _others() else x.detach().to("cpu", copy=True)

    def part(self, whole: Tensor, ours: Tensor) -> Tensor:
        """What of a whole tensor belongs where `ours` is, in its dtype and layout; new memory. All ranks call it."""
        return like(whole, ours)

    def number(self, shape: Shape, element: int) -> int | Places:
        """The number in the whole tensor of an element of what is here of it, `shape` as from `spec`."""
        return element

    def algebra(self, layouts: Sequence[Layout]) -> Algebra:
        """Of matrices with these layouts, which are equal but for what they count."""
        return WHOLE

    @property
    def place(self) -> str:
        """What of a DTensor is here, in words."""
        return ""

    @property
    def sent(self) -> tuple[float | None, float | None]:
        """Bytes handed to collectives per step and per refresh, on average."""
        return None, None


@dataclass(frozen=True, eq=False)
class Replicated(Layout):
    """A DTensor that every rank has whole."""

    def here(self, x: Tensor) -> Tensor:
        return local(x)

    def here_all(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: local(tensor) for key, tensor in state.items()}

    def gather(self, x: Tensor) -> Tensor | None:
        return super().gather(cast(Any, x).full_tensor() if hasattr(x, "device_mesh") else x)

    @property
    def place(self) -> str:
        return "replicated"


@dataclass(frozen=True, eq=False)
class Cut(Replicated):
    """A DTensor that is cut along one dimension, over one dimension of its mesh.

    Attributes:
        cut: the dimension of the turned matrix, -2 or -1, or that of a batch of matrices, -3.
        natural: the same dimension of the parameter.
        whole, start, length: of that dimension: all of it, and what is here.
    """

    mesh: Any
    placements: tuple[Any, ...]
    group: Any
    cut: int
    natural: int
    whole: int
    start: int
    length: int
    meter: Meter = field(default_factory=Meter)
    sharded = True

    @property
    def first(self) -> int:  # type: ignore[override]
        return self.start if self.cut == _BATCH else 0

    @property
    def key(self) -> tuple[Any, ...]:  # type: ignore[override]
        return id(self.group), self.cut, self.whole, self.start

    def plan(self, plan: Plan) -> Plan:
        shape = list(plan.shape)
        shape[self.natural] = self.length
        if self.cut == _BATCH:
            return replace(plan, shape=tuple(shape), batch=(self.length, *plan.batch[1:]))
        matrix = list(plan.matrix)
        matrix[self.cut] = self.length
        return replace(plan, shape=tuple(shape), matrix=tuple(matrix))

    def matrix(self, plan: Plan) -> Shape:
        if self.cut == _BATCH:
            return plan.matrix
        sides = list(plan.matrix)
        sides[self.cut] = Side(self.whole, self.cut)
        return tuple(sides)

    def weight(self, plan: Plan) -> Shape:
        shape = self._shape_here(self.matrix(plan))
        return shape[::-1] if plan.side == "right" else shape

    def spec(self, spec: dict[str, Spec]) -> dict[str, Spec]:
        return {key: one._replace(shape=self._shape_here(one.shape)) for key, one in spec.items()}

    def zeros(self, batch: Shape, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        cut = [len(batch) + i for i, side in enumerate(shape) if isinstance(side, Side)]
        here = batch + tuple(map(int, self._shape_here(shape)))
        if self.cut == _BATCH:
            cut, here = [0], (self.length, *here[1:])
        x = torch.zeros(here, dtype=dtype, device=device)
        return self._distributed(x, batch + tuple(map(int, shape)), cut[0]) if cut else x

    def number(self, shape: Shape, element: int) -> int | Places:
        cut = [i for i, side in enumerate(shape) if isinstance(side, Side)]
        if not cut:
            return element
        if cut[0] == 0:
            return self.start * math.prod(shape[1:]) + element
        gap = self.whole - self.length
        return Places(element, self.start, self.length, gap) if self.length else 0

    def algebra(self, layouts: Sequence[Layout]) -> Algebra:
        if self.cut == _BATCH:
            return WHOLE
        meters = [cast(Cut, one).meter for one in layouts]
        return Shards(self.cut, self.whole, self.start, self.length, self.group, meters)

    def cut_blocks(self, spec: dict[str, Spec]) -> list[str]:
        """State that is cut and quantized in blocks, which a cut would divide."""
        cut = [key for key, one in spec.items() if any(isinstance(side, Side) for side in one.shape)]
        return [key for key in cut if cast(Store, spec[key].store).block > 1]

    @property
    def place(self) -> str:
        return f"{self.length} of {self.whole} {'columns' if self.natural else 'rows'}"

    @property
    def sent(self) -> tuple[float | None, float | None]:
        return self.meter.sent

    def _shape_here(self, shape: Shape) -> Shape:
        return tuple(Side(self.length, side.which) if isinstance(side, Side) else side for side in shape)

    def _distributed(self, x: Tensor, shape: Shape, cut: int) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        placements = [Shard(cut) if one.is_shard() else one for one in self.placements]
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return DTensor.from_local(x, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


HERE = Layout()


def layout_of(p: Tensor, plan: Plan) -> Layout:
    """Raises a NotImplementedError for a DTensor that is laid out in a way that nobody here understands."""
    if not hasattr(p, "device_mesh"):
        return HERE
    dtensor = cast(Any, p)
    placements, mesh = tuple(dtensor.placements), dtensor.device_mesh
    cuts = [i for i, one in enumerate(placements) if not one.is_replicate()]
    if not cuts:
        return Replicated()
    checks.layout(plan.name, placements)
    (at,) = cuts
    natural = placements[at].dim % len(plan.shape)
    whole, size = plan.shape[natural], -(-plan.shape[natural] // mesh.size(at))
    start = min(size * mesh.get_local_rank(at), whole)
    cut = _dimension(plan, natural)
    length = min(size, whole - start)
    if local(p).shape[natural] != length:
        raise NotImplementedError(f"{plan.name} is cut into {placements}, but not into equal parts")
    return Cut(mesh, placements, mesh.get_group(at), cut, natural, whole, start, length)


def local(x: Tensor) -> Tensor:
    """What of a tensor is in this process; the same memory."""
    return cast(Any, x).to_local() if hasattr(x, "device_mesh") else x


def _others() -> bool:
    """Is this another rank than 0?"""
    return dist.is_available() and dist.is_initialized() and dist.get_rank() > 0


def like(x: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, or a DTensor of another layout, laid out as the example is; new memory. All ranks call it."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

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
    shape, start = compute_local_shape_and_global_offset(example.shape, example.device_mesh, example.placements)
    part = x[tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))]
    here = local(example)
    return _again(part.detach().to(here.device, here.dtype, copy=True).contiguous(), example)


def _again(x: Tensor, example: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    layout = example.device_mesh, example.placements
    return DTensor.from_local(x, *layout, run_check=False, shape=example.shape, stride=example.stride())


def _dimension(plan: Plan, natural: int) -> int:
    """The dimension of the turned matrix that a dimension of the parameter is."""
    if len(plan.matrix) == 1:
        return -1
    rows = len(plan.batch)
    if natural < rows:
        checks.batch(plan.name, natural, plan.projected)
        return _BATCH
    if natural > rows and len(plan.shape) > rows + 2:
        raise NotImplementedError(
            f"{plan.name} {plan.shape} is read as a matrix {plan.matrix}, and cut along dimension {natural}, which is "
            "no side of it. Shard dimension 0 (the default of fully_shard)"
        )
    is_row = natural == rows
    return -2 if is_row != (plan.side == "right") else -1
