"""What happens to one parameter, and why: decided once, from its shape, its name and its group alone.

Nothing about wrappers, world sizes or devices enters, so a sharded run makes the same decisions as one process.
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

# Whole components of a parameter's name that say what it is; `head` does not match `heads` or `multihead_attn`.
_EMBEDDING_NAMES = {"wte", "wpe", "shared", "relative_attention_bias"}
_HEAD_NAMES = {"lm_head", "head", "classifier", "score", "output_projection", "output_layer", "cls"}
# What wrappers (DistributedDataParallel, torch.compile, activation checkpointing) put into names.
_WRAPPERS = re.compile(r"^module\.|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
_LEAST_QUANTIZED = 4096  # elements below which quantizing saves nothing worth its error; bitsandbytes' choice
_SMALLEST_KERNEL_RUN = 16  # a 3-D parameter whose last side is shorter is a 1-D convolution, not a stack of experts


@dataclass(frozen=True)
class Plan:
    """How one parameter is updated.

    Attributes:
        name: from the model, or `param 7` where parameters came without names.
        shape: of the parameter.
        batch: leading dimensions that count matrices; `(experts,)` for a stack of experts.
        matrix: `(m, n)` with the projected side first, or `(n,)` for a vector.
        side: "left" (rows are projected), "right" (columns), "full" (both), "-" (not projected).
        rank: of the basis; None where not projected.
        reason: why not projected, or "".
        fallback: the group asked for a projection that this parameter cannot have (`strict=True` refuses it).
        key: of its random numbers; from the name as it is without wrappers, so that a wrapped model draws the same.
        place: its number among the projected matrices; decides its turn in a staggered schedule.
        among: matrices of the stack that a wrapper has taken this one out of.
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
        return self.rank is not None

    @property
    def small(self) -> bool:
        """Kept in full precision, whatever the rest is kept in; by the size of the whole parameter on any shard."""
        return len(self.matrix) < 2 or math.prod(self.shape) * self.among < _LEAST_QUANTIZED

    @functools.cached_property
    def kind(self) -> tuple[Any, ...]:
        """Equal where matrices have equal state."""
        return self.matrix, self.rank, self.side, self.small

    @property
    def count(self) -> int:
        """Number of matrices."""
        return math.prod(self.batch)

    def oriented(self, x: Tensor) -> Tensor:
        """A tensor like the parameter as `(m, n)` or `(count, m, n)`: a view where strides allow, else a copy."""
        natural = self.matrix[::-1] if self.side == "right" else self.matrix
        if self.batch or x.shape != natural:
            x = x.reshape((self.count, *natural) if self.batch else natural)
        return x.mT if self.side == "right" else x

    def natural(self, x: Tensor) -> Tensor:
        """The inverse of `oriented`."""
        return (x.mT if self.side == "right" else x).reshape(self.shape)


def decide(name: str, index: int, place: int, shape: torch.Size, group: dict[str, Any], ranked: bool) -> Plan:
    """The plan of parameter number `index`, which would be the `place`-th projected one.

    `ranked`: False for methods that serve matrices whole; their rank is that of the matrix.
    """
    batch, rows, columns = as_matrices(shape, group["as_matrix"])
    reason, fallback = _why_plain(name, shape, rows, columns, group, ranked)
    common: dict[str, Any] = {"reason": reason, "fallback": fallback, "shape": tuple(shape)}
    common |= {"name": name or f"param {index}", "key": key_of(group["seed"], bare_name(name) or str(index))}
    if reason:
        # A vector keeps its one dimension; there is no projected side, so nothing is turned.
        matrix = (rows, columns) if len(shape) > 1 else (columns,)
        return Plan(**common, batch=batch, matrix=matrix, side="-", rank=None, place=0)
    side = resolve_side(group["proj_type"], rows, columns)
    matrix = (columns, rows) if side == "right" else (rows, columns)
    rank = resolve_rank(group["rank"], rows, columns) if ranked else min(rows, columns)
    return Plan(**common, batch=batch, matrix=matrix, side=side, rank=rank, place=place)


def bare_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    return _WRAPPERS.sub("", name)


def shape_of(p: Tensor) -> torch.Size:
    """The shape of a parameter, also where DeepSpeed (ZeRO-3) has taken its elements away."""
    shape: torch.Size = getattr(p, "ds_shape", p.shape)
    return shape


def as_matrices(shape: torch.Size | tuple[int, ...], rule: str) -> tuple[tuple[int, ...], int, int]:
    """(batch, rows, columns). `"flatten"`: (out, everything else), as for convolutions; `"batch"`: the last two are
    the matrix, as for stacks of experts; `"auto"`: batch for three dimensions, unless the last is a kernel's."""
    if len(shape) < 2:
        return (), 1, math.prod(shape)
    if rule == "auto":
        rule = "batch" if len(shape) == 3 and shape[-1] >= _SMALLEST_KERNEL_RUN else "flatten"
    if rule == "batch":
        return tuple(shape[:-2]), shape[-2], shape[-1]
    return (), shape[0], math.prod(shape[1:])


def resolve_side(proj_type: str, rows: int, columns: int) -> str:
    """The side a basis is for. `std` projects the shorter one; a square matrix counts as tall."""
    if proj_type in ("left", "right", "full"):
        return proj_type
    tall = rows >= columns
    return "right" if tall == (proj_type == "std") else "left"


def resolve_rank(rank: int | float, rows: int, columns: int) -> int:
    """A whole rank; any other number is a fraction of the shorter side, at least 1."""
    return int(rank) if isinstance(rank, numbers.Integral) else max(1, round(rank * min(rows, columns)))


def names_say(name: str) -> str:
    """ "embedding", "head" or "", judged by the components of a parameter's dotted name."""
    parts = name.lower().split(".")
    if any(part in _EMBEDDING_NAMES or "embed" in part for part in parts):
        return "embedding"
    return "head" if any(part in _HEAD_NAMES for part in parts) else ""


def _why_plain(
    name: str, shape: torch.Size, rows: int, columns: int, group: dict[str, Any], ranked: bool
) -> tuple[str, bool]:
    """(reason, fallback); ("", False) for a parameter that can be projected."""
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
