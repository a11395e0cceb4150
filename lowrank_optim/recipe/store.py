"""How a tensor lives between two steps: what a part asks for, and the protocol of the slot that keeps it."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..ops.philox import Places, Stream

Shape = tuple[int, ...]  # (m, n), or (n,) for a vector
Noise = tuple[int, Stream, "int | Places"]  # key, stream and first element of the random numbers that rounding uses


class Side(int):
    """The length of one side of a matrix, which knows which side: -2, the projected one, or -1.

    Where a matrix is cut over processes, parts are given its sides as these, and whatever they ask for that has such a
    side is cut along it as the matrix is. Arithmetic gives plain numbers: what is computed from a length is not cut.
    """

    which: int
    piece: Any  # what of it is here (`distributed/pieces.py`), for those who draw random numbers

    def __new__(cls, length: int, which: int, piece: Any = None) -> Side:
        side = super().__new__(cls, length)
        side.which, side.piece = which, piece
        return side


class Kept(NamedTuple):
    """One stored tensor: an entry of it stands for `per` elements in row-major order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    per: int = 1


class Store(abc.ABC):
    """How is a tensor kept between steps? As one stored tensor or more, told apart by a suffix to its name."""

    suffixes: ClassVar[tuple[str, ...]] = ("",)
    block: ClassVar[int] = 1  # elements that are coded together, so that nothing may cut between them
    narrow: ClassVar[bool] = True  # read gives a copy

    @abc.abstractmethod
    def layout(self, shape: Shape, working: torch.dtype) -> tuple[Kept, ...]:
        """What is kept for one matrix, for parameters whose arithmetic runs in `working`; all zeros reads as zeros."""

    @abc.abstractmethod
    def read(self, kept: Mapping[str, Tensor], shape: Shape, working: torch.dtype) -> Tensor:
        """The tensor `(..., *shape)`, writable."""

    @abc.abstractmethod
    def write_(self, kept: Mapping[str, Tensor], x: Tensor, noise: Noise | None) -> None:
        """Keeps x; without noise rounded to nearest."""

    def small(self) -> Store:
        """What keeps vectors and small matrices, where narrow numbers save nothing and cost accuracy."""
        return self

    def of(self, spec: Spec) -> Store:
        """The store fitted to the range of numbers of a tensor."""
        return self

    def rounded(self, x: Tensor, working: torch.dtype) -> Tensor:
        """What `read` would give after `write_`; x itself, where that is the same."""
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
    """A persistent tensor that a part asks for.

    Args:
        shape: for one matrix (or vector).
        steady: written at refreshes only, and rounded to nearest.
        unsigned: never negative.
        store: how it is kept, where the recipe's own choice would be wrong (indices, counts, norms).
    """

    shape: tuple[int, ...]
    steady: bool = False
    unsigned: bool = False
    store: Store | None = None


@dataclass(frozen=True)
class Exact(Store):
    """As it is, in one dtype: indices, counts, norms."""

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
