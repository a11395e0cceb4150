"""Quantized weights as matrices of bytes, of which a row is all that a row of the weight needs.

FSDP2 shares parameters out by rows, and a checkpoint puts the rows back together. A tensor subclass it would open, and
share out its values; a plain matrix of bytes goes through both as it is, and no policy of mixed precision rounds it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .quantized import Int8Weight, NF4Weight, QuantizedWeight

KINDS: dict[str, type[QuantizedWeight]] = {"int8": Int8Weight, "nf4": NF4Weight}
_WORD = 4  # bytes of a number of a block, at a multiple of which it must begin


@dataclass(frozen=True)
class ByteRows:
    """How a weight of rows of length n is kept: in each row the numbers of its blocks, in float32, and then its codes.

    A block ends with its row, so blocks do not depend on who has which rows. Where n is a multiple of the block they
    are those of `kind` as it is.
    """

    kind: type[QuantizedWeight]
    n: int
    spans: tuple[tuple[str, torch.dtype, int, int], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", _spans(self.kind, self.n))

    def bytes_of(self, w: Tensor) -> Tensor:
        """The nearest such weight to `w (m, n)`: uint8 `(m, width)`."""
        width = -(-self.spans[-1][3] // _WORD) * _WORD
        new = torch.zeros(len(w), width, dtype=torch.uint8, device=w.device)
        if not w.is_meta:
            self.weight(new, w.dtype).copy_(w)
        return new

    def weight(self, rows: Tensor, dtype: torch.dtype) -> QuantizedWeight:
        """The weight that some such rows are, in the same memory; to torch it is of `dtype`."""
        # A policy of mixed precision that casts whatever it gathers leaves whole numbers below 256 what they are.
        rows = rows.detach() if rows.dtype == torch.uint8 else rows.detach().to(torch.uint8)
        inner = {name: rows[:, start:stop].view(kind) for name, kind, start, stop in self.spans}
        return self.kind(*(inner[name] for name in self.kind.per), shape=torch.Size((len(rows), self.n)), dtype=dtype)


def _spans(kind: type[QuantizedWeight], n: int) -> tuple[tuple[str, torch.dtype, int, int], ...]:
    """Name, dtype, first byte and first byte of the next of what a row consists of."""
    example = kind.quantize(torch.zeros(1, n, device="cpu"), by_rows=True).parts()
    spans, start = [], 0
    for name, x in sorted(zip(kind.per, example, strict=True), key=lambda one: -one[1].element_size()):
        spans.append((name, x.dtype, start, start + x.nbytes))
        start += x.nbytes
    return tuple(spans)
