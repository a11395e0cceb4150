"""Decide once what happens to a parameter, and why: from its shape, its name and its group alone.

Wrappers, world sizes and devices do not enter, so a sharded run makes the same decisions as one process.
"""

from __future__ import annotations

import functools
import math
import numbers
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import key_of

# Whole components of a parameter's name that say what it is, so `head` does not match `heads` or `multihead_attn`.
_EMBEDDING_NAMES = {"wte", "wpe", "shared", "relative_attention_bias"}
_HEAD_NAMES = {"lm_head", "head", "classifier", "score", "output_projection", "output_layer", "cls"}
# Components that wrappers (DistributedDataParallel, torch.compile, activation checkpointing) put into names.
_WRAPPERS = re.compile(r"^module\.|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
_LEAST_QUANTIZED = (
    4096  # elements; below, quantizing saves too little for its error. The same threshold as bitsandbytes
)
_SMALLEST_KERNEL_RUN = 16  # a 3-D parameter whose last side is shorter is a 1-D convolution, not a stack of experts


@dataclass(frozen=True)
class Plan:
    """The decision how one parameter is updated.

    Attributes:
        name: of the parameter in the model, or `param 7` where parameters came without names.
        shape: of the parameter.
        batch: leading dimensions that count matrices: `(experts,)` for a stack of experts, `()` for one matrix.
        matrix: `(m, n)` with the projected side first, or `(n,)` for a vector.
        side: "left" (rows are projected), "right" (columns), "full" (both), "-" (not projected).
        rank: of the basis; None if the parameter is not projected.
        reason: why the parameter is not projected, or "".
        fallback: whether the group asked for a projection that this parameter cannot have (`strict=True` refuses it).
        key: of its random numbers. It follows from the name without wrappers, so that a wrapped model draws the same.
        place: number among the projected matrices, which decides when a staggered schedule refreshes it.
        among: number of matrices in the stack from which a wrapper took this matrix; 1 if there was no such stack.
    """

    name: str
    shape: tuple[int, ...]
    batch: tuple[int, ...]
    matrix: tuple[int, ...]
    side: str
    rank: int | None
    reason: str
    fallback: bool
    key: int
    place: int
    among: int = 1

    @property
    def projected(self) -> bool:
        """Whether the parameter is updated in a subspace."""
        return self.rank is not None

    @property
    def small(self) -> bool:
        """Whether its state stays in full precision in every store.

        The size of the whole parameter decides, so that all shards agree.
        """
        return len(self.matrix) < 2 or math.prod(self.shape) * self.among < _LEAST_QUANTIZED

    @functools.cached_property
    def kind(self) -> tuple[Any, ...]:
        """Return a key that is equal for matrices with state of equal shapes, which can therefore be stacked."""
        return self.matrix, self.rank, self.side, self.small

    @property
    def count(self) -> int:
        """Return the number of matrices in the parameter."""
        return math.prod(self.batch)

    def oriented(self, x: Tensor) -> Tensor:
        """Return a tensor like the parameter as `(m, n)` or `(count, m, n)`: a view if strides allow, else a copy."""
        natural = self.matrix[::-1] if self.side == "right" else self.matrix
        if self.batch or x.shape != natural:
            x = x.reshape((self.count, *natural) if self.batch else natural)
        return x.mT if self.side == "right" else x

    def natural(self, x: Tensor) -> Tensor:
        """Undo `oriented`: return x in the shape of the parameter."""
        return (x.mT if self.side == "right" else x).reshape(self.shape)


def decide(name: str, index: int, place: int, shape: torch.Size, group: dict[str, Any], ranked: bool) -> Plan:
    """Return the plan of one parameter.

    Args:
        name: of the parameter, or "" where parameters came without names.
        index: number of the parameter in the optimizer.
        place: number that it gets among the projected matrices, if it is projected.
        shape: of the parameter.
        group: options of its param group.
        ranked: False for methods that update whole matrices, without a subspace. Their rank is min(m, n).
    """
    batch, rows, columns = as_matrices(shape, group["as_matrix"])
    reason, fallback = _why_plain(name, shape, rows, columns, group, ranked)
    common: dict[str, Any] = {"reason": reason, "fallback": fallback, "shape": tuple(shape)}
    common |= {"name": name or f"param {index}", "key": key_of(group["seed"], bare_name(name) or str(index))}
    if reason:
        # A vector keeps its one dimension. Without a projected side no matrix is transposed.
        matrix = (rows, columns) if len(shape) > 1 else (columns,)
        return Plan(**common, batch=batch, matrix=matrix, side="-", rank=None, place=0)
    side = resolve_side(group["proj_type"], rows, columns)
    matrix = (columns, rows) if side == "right" else (rows, columns)
    rank = resolve_rank(group["rank"], rows, columns) if ranked else min(rows, columns)
    return Plan(**common, batch=batch, matrix=matrix, side=side, rank=rank, place=place)


def bare_name(name: str) -> str:
    """Return the name of a parameter without the components that wrappers put into it."""
    return _WRAPPERS.sub("", name)


def shape_of(p: Tensor) -> torch.Size:
    """Return the whole shape of a parameter, also where DeepSpeed (ZeRO-3) has partitioned its elements away."""
    shape: torch.Size = getattr(p, "ds_shape", p.shape)
    return shape


def as_matrices(shape: torch.Size | tuple[int, ...], rule: str) -> tuple[tuple[int, ...], int, int]:
    """Return how a parameter of `shape` is read as matrices: (batch, rows, columns).

    Args:
        shape: of the parameter. A vector counts as one row.
        rule: "flatten" reads (first, all others), as for convolutions; "batch" reads the last two dimensions as the
            matrix, as for stacks of experts; "auto" is "batch" for three dimensions, unless the last looks like a
            convolution kernel.
    """
    if len(shape) < 2:
        return (), 1, math.prod(shape)
    if rule == "auto":
        rule = "batch" if len(shape) == 3 and shape[-1] >= _SMALLEST_KERNEL_RUN else "flatten"
    if rule == "batch":
        return tuple(shape[:-2]), shape[-2], shape[-1]
    return (), shape[0], math.prod(shape[1:])


def resolve_side(proj_type: str, rows: int, columns: int) -> str:
    """Return the projected side. "std" projects the shorter side, and a square matrix counts as tall."""
    if proj_type in ("left", "right", "full"):
        return proj_type
    tall = rows >= columns
    return "right" if tall == (proj_type == "std") else "left"


def resolve_rank(rank: int | float, rows: int, columns: int) -> int:
    """Return the rank as an int, at least 1. A number that is not an int is a fraction of the shorter side."""
    return int(rank) if isinstance(rank, numbers.Integral) else max(1, round(rank * min(rows, columns)))


def names_say(name: str) -> str:
    """Return "embedding", "head" or "", judged by the components of a parameter's dotted name."""
    parts = name.lower().split(".")
    if any(part in _EMBEDDING_NAMES or "embed" in part for part in parts):
        return "embedding"
    return "head" if any(part in _HEAD_NAMES for part in parts) else ""


def _why_plain(
    name: str, shape: torch.Size, rows: int, columns: int, group: dict[str, Any], ranked: bool
) -> tuple[str, bool]:
    """Return `reason` and `fallback` of the plan: ("", False) for a parameter that can be projected."""
    if group["rank"] is None:
        return "its group has no rank", False
    if math.prod(shape) == 0:
        return "empty", False
    if len(shape) < 2 or math.prod(shape) == max(shape):
        explicit = not group["skip_embeddings"]
        return "a vector or scalar", explicit
    if group["skip_embeddings"] and names_say(name):
        return f"{names_say(name)}, by its name", False
    rank = resolve_rank(group["rank"], rows, columns)
    if ranked and rank >= min(rows, columns):
        return f"rank {rank} >= min{(rows, columns)}", True
    return "", False
