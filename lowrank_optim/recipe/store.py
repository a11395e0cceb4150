"""Describe how a tensor is kept between two steps: the request of a part, and the protocol of the store slot."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..ops.philox import Places, Stream

Shape = tuple[int, ...]  # (m, n), or (n,) for a vector
Noise = tuple[int, Stream, "int | Places"]  # key, stream and first element of the random numbers for rounding


class Side(int):
    """The length of one side of a sharded matrix, as an int that remembers which side it is.

    Parts get the sides of a sharded matrix as `Side`. A tensor that they request with such a length is sharded along it
    in the same way as the matrix. Arithmetic with a `Side` gives a plain int, and tensors of plain lengths are whole.
    """

    which: int  # -2, the projected side, or -1
    piece: Any  # the local range of this side (`distributed/pieces.py`), for drawing local random numbers

    def __new__(cls, length: int, which: int, piece: Any = None) -> Side:
        side = super().__new__(cls, length)
        side.which, side.piece = which, piece
        return side


class Kept(NamedTuple):
    """The shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    per: int = 1  # elements of the open tensor, in row-major order, that one stored entry stands for


class Store(abc.ABC):
    """The slot that answers: how is a tensor kept between steps?

    A store keeps one open tensor as one or more stored tensors, whose names differ by a suffix. For example,
    `parts.Int8` keeps the state `exp_avg` as codes (`exp_avg`) and one number per block (`exp_avg_peak`).
    """

    suffixes: ClassVar[tuple[str, ...]] = ("",)
    block: ClassVar[int] = 1  # elements that are coded together, so a slice may not cut between them
    narrow: ClassVar[bool] = True  # True: `read` returns a copy, which the engine must write back

    @abc.abstractmethod
    def layout(self, shape: Shape, working: torch.dtype) -> tuple[Kept, ...]:
        """Return the stored tensors for an open tensor of `shape`, one per suffix.

        Args:
            shape: of the open tensor of one matrix.
            working: dtype of the arithmetic, float32 or float64.

        Stored tensors that are all zero must read as zeros, because that is how state begins.
        """

    @abc.abstractmethod
    def read(self, kept: Mapping[str, Tensor], shape: Shape, working: torch.dtype) -> Tensor:
        """Return the open tensor `(..., *shape)`, writable, in the dtype `working`, from the stored ones by suffix."""

    @abc.abstractmethod
    def write_(self, kept: Mapping[str, Tensor], x: Tensor, noise: Noise | None) -> None:
        """Store x in the stored tensors by suffix. Without noise, narrow stores round to nearest."""

    def small(self) -> Store:
        """Return the store for vectors and small matrices, where narrow numbers save nothing and cost accuracy."""
        return self

    def of(self, spec: Spec) -> Store:
        """Return the store fitted to the range of a tensor: an unsigned tensor needs no code for negative numbers."""
        return self

    def rounded(self, x: Tensor, working: torch.dtype) -> Tensor:
        """Return the result of `read` after `write_`, or x itself where both are the same."""
        layout = self.layout(tuple(x.shape), working)
        if not self.narrow:
            return x.to(layout[0].dtype)
        kept = {
            suffix: torch.zeros(shape, dtype=dtype, device=x.device)
            for suffix, (shape, dtype, _) in zip(self.suffixes, layout, strict=True)
        }
        self.write_(kept, x, None)
        return self.read(kept, tuple(x.shape), working)


class Spec(NamedTuple):
    """The request of a part for one persistent tensor.

    Args:
        shape: of the tensor for one matrix or vector.
        steady: whether it changes at refreshes only; it is then rounded to nearest.
        unsigned: whether it is never negative.
        store: the store that keeps it, where the recipe's own choice would be wrong (indices, counts, norms).
    """

    shape: tuple[int, ...]
    steady: bool = False
    unsigned: bool = False
    store: Store | None = None


@dataclass(frozen=True)
class Exact(Store):
    """Keep a tensor as it is, in one dtype: for indices, counts and norms."""

    dtype: torch.dtype
    narrow: ClassVar[bool] = False

    def layout(self, shape: Shape, working: torch.dtype) -> tuple[Kept, ...]:
        return (Kept(shape, self.dtype),)

    def read(self, kept: Mapping[str, Tensor], shape: Shape, working: torch.dtype) -> Tensor:
        return kept[""]

    def write_(self, kept: Mapping[str, Tensor], x: Tensor, noise: Noise | None) -> None:
        kept[""].copy_(x)

    def rounded(self, x: Tensor, working: torch.dtype) -> Tensor:
        return x.to(self.dtype)
