"""Store quantized weights as matrices of bytes, in which each row holds everything that a row of the weight needs.

FSDP2 shards parameters by rows, and a checkpoint puts the rows together again. FSDP2 would unpack a tensor subclass and
shard its values. A plain matrix of bytes passes through both unchanged, and no policy of mixed precision rounds it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .quantized import Int8Weight, NF4Weight, QuantizedWeight

KINDS: dict[str, type[QuantizedWeight]] = {"int8": Int8Weight, "nf4": NF4Weight}
_WORD = 4  # bytes of a float32, which must begin at a multiple of that


@dataclass(frozen=True)
class ByteRows:
    """The format of the rows of a quantized weight: the float32 numbers of the row's blocks, followed by its codes.

    A block ends with its row, so blocks do not depend on which rank has which rows. If n is a multiple of the block,
    they are the blocks of the same weight without this format.

    Attributes:
        kind: the class of the quantized weight.
        n: the length of a row.
        spans: (name, dtype, first byte, last byte + 1) of each inner tensor in a row of bytes.
    """

    kind: type[QuantizedWeight]
    n: int
    spans: tuple[tuple[str, torch.dtype, int, int], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", _spans(self.kind, self.n))

    def bytes_of(self, w: Tensor) -> Tensor:
        """Return `w (m, n)` quantized to nearest, as a matrix of bytes `(m, width)` in uint8."""
        # Rows are padded to whole words, so that the float32 numbers of the next row are aligned.
        width = -(-self.spans[-1][3] // _WORD) * _WORD
        new = torch.zeros(len(w), width, dtype=torch.uint8, device=w.device)
        if not w.is_meta:
            self.weight(new, w.dtype).copy_(w)
        return new

    def weight(self, rows: Tensor, dtype: torch.dtype) -> QuantizedWeight:
        """Return a matrix of bytes (rows, width) as a quantized weight (rows, n) in the same memory.

        `dtype` is the dtype that the weight has for torch.
        """
        # A policy of mixed precision may have cast the bytes when it gathered them. Every floating-point dtype holds
        # the integers below 256 exactly, so casting back restores them.
        rows = rows.detach() if rows.dtype == torch.uint8 else rows.detach().to(torch.uint8)
        inner = {name: rows[:, start:stop].view(kind) for name, kind, start, stop in self.spans}
        return self.kind(*(inner[name] for name in self.kind.per), shape=torch.Size((len(rows), self.n)), dtype=dtype)


def _spans(kind: type[QuantizedWeight], n: int) -> tuple[tuple[str, torch.dtype, int, int], ...]:
    """Return (name, dtype, first byte, last byte + 1) of each inner tensor in a row of bytes."""
    # Wide numbers come first, which aligns them without padding in between.
    example = kind.quantize(torch.zeros(1, n, device="cpu"), by_rows=True).parts()
    spans, start = [], 0
    for name, x in sorted(zip(kind.per, example, strict=True), key=lambda entry: -entry[1].element_size()):
        spans.append((name, x.dtype, start, start + x.nbytes))
        start += x.nbytes
    return tuple(spans)
