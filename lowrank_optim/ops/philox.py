"""Counter-based random numbers (Philox4x32-10): element i of a stream is a pure function of (key, stream, i).

Nothing here has state. So the global generator is never touched, a resumed run needs no saved state, and a device or
shard that draws its local elements only gets the numbers that a single process draws.

Reference: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from .reference.random import BLOCK, Stream, blocks, philox
from .schema import kernel

__all__ = [
    "BLOCK",
    "WORKSPACE",
    "Stream",
    "key_of",
    "normal",
    "numbers_of",
    "philox",
    "random_bits16",
    "sample",
    "stream_of",
    "uniform",
]

WORKSPACE = 2 << 20  # bytes of temporaries of a draw


class Places(NamedTuple):
    """The elements of a stream for a block of columns of a matrix in row-major order.

    Element f of the block has the number `base + f + f // run * gap`.

    Args:
        start: the first element f of the block that is drawn.
        base: the number of the first element of the block.
        run: the columns of the block.
        gap: the remaining columns of the matrix.
    """

    start: int
    base: int
    run: int
    gap: int


def key_of(seed: int, name: str) -> int:
    """Return the 64-bit key of a parameter: a hash that all ranks and runs share (Python's `hash` is salted)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def stream_of(purpose: str, time: int | Tensor) -> Stream:
    """Return the stream of a purpose and a time; all streams are independent.

    Args:
        purpose: such as "sketch" or "weight".
        time: a count of steps or refreshes. A tensor () in int64 is read on the device, so that a captured graph draws
            new numbers at each replay.
    """
    return zlib.crc32(purpose.encode()), time


def normal(
    shape: tuple[int, ...],
    key: int,
    stream: Stream,
    device: torch.device | str = "cpu",
    start: int = 0,
    some: slice | None = None,
) -> Tensor:
    """Return standard normal numbers in float32, the same on all devices, from element `start` of the stream on.

    Args:
        some: draw only these rows of the tensor of this shape; a slice without a step. None draws all rows.
    """
    if some is not None:
        first, stop, _ = some.indices(shape[0])
        shape, start = (stop - first, *shape[1:]), start + first * math.prod(shape[1:])
    out = torch.empty(shape, dtype=torch.float32, device=device)
    kernel("philox_normal_")(out, *numbers_of(key, stream), start)
    return out


def uniform(shape: tuple[int, ...], key: int, stream: Stream, device: torch.device | str = "cpu") -> Tensor:
    """Return uniform numbers in (0, 1), float32."""
    out = torch.empty(shape, dtype=torch.float32, device=device)
    kernel("philox_uniform_")(out, *numbers_of(key, stream))
    return out


def random_bits16(
    count: int, key: int, stream: Stream, start: int | Places = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Return uniform 16-bit integers (count,) as int32: elements of the stream from `start` on, or at `Places`."""
    out = torch.empty(count, dtype=torch.int32, device=device)
    if isinstance(start, Places):
        return _bits16_of_columns(out, key, stream, start)
    kernel("philox_bits16_")(out, *numbers_of(key, stream), start)
    return out


def numbers_of(key: int, stream: Stream) -> tuple[int, int, int, Tensor | None]:
    """Return (key, purpose, time, at) for an operator.

    Integers of schemas are signed. A time on the device has an argument of its own, `at`.
    """
    purpose, time = stream
    signed = key - (1 << 64) if key >= 1 << 63 else key
    return (signed, purpose, 0, time) if isinstance(time, Tensor) else (signed, purpose, time & 0xFFFFFFFF, None)


def _bits16_of_columns(out: Tensor, key: int, stream: Stream, places: Places) -> Tensor:
    """Draw the elements at `places` into `out`, as many rows at a time as fit into a block of counters.

    Each row is drawn whole, and the elements that `out` has are copied.
    """
    start, base, run, gap = places
    stop, wide = start + out.numel(), -(-run // 8) + 1
    some = max(1, BLOCK // wide)
    for row in range(start // run, -(-stop // run), some):
        rows = torch.arange(row, min(row + some, -(-stop // run)), dtype=torch.int64, device=out.device)
        first = base + rows * (run + gap)
        counter = (first // 8).unsqueeze(-1) + torch.arange(wide, dtype=torch.int64, device=out.device)
        lanes = _lanes16(philox(counter.flatten(), key, stream)).view(len(rows), -1)
        found = lanes.gather(1, (first % 8).unsqueeze(-1) + torch.arange(run, device=out.device)).flatten()
        low, high = max(start, row * run), min(stop, (row + len(rows)) * run)
        out[low - start : high - start].copy_(found[low - row * run : high - row * run])
    return out


def _lanes16(words: list[Tensor]) -> Tensor:
    """Return the two halves of each word, (counters, 8), int32."""
    lanes = words[0].new_empty(len(words[0]), 8, dtype=torch.int32)
    for i, word in enumerate(words):
        lanes[:, 2 * i].copy_(word & 0xFFFF)
        lanes[:, 2 * i + 1].copy_(word >> 16)
    return lanes


def sample(below: int, count: int, key: int, stream: Stream) -> Tensor:
    """Return `count` different integers in [0, below), sorted, int64, on the CPU; all sets are equally likely.

    They are the first different integers of a stream, so time and memory grow with `count` and not with `below`. Where
    `count` is more than half of `below`, the integers that are left out are drawn instead.
    """
    if 2 * count > below:
        kept = torch.ones(below, dtype=torch.bool, device="cpu")
        kept[sample(below, below - count, key, stream)] = False
        return kept.nonzero().flatten()
    drawn = math.ceil(
        -below * math.log1p(-count / below) + 4 * math.sqrt(count)
    )  # enough of these differ with high probability
    while True:
        numbers, place = _integers(drawn, below, key, stream).sort(stable=True)
        new = torch.ones_like(numbers, dtype=torch.bool)
        new[1:] = numbers[1:] != numbers[:-1]
        numbers, place = numbers[new], place[new]
        if len(numbers) >= count:
            return numbers[place <= place.kthvalue(count).values] if count else numbers[:0]
        drawn += drawn // 8 + 1


def _integers(count: int, below: int, key: int, stream: Stream) -> Tensor:
    """Return uniform integers (count,) in [0, below), int64.

    They are remainders of 62 random bits, whose probabilities differ by a factor of `1 + below / 2^62` at most.
    """
    out = torch.empty(count, dtype=torch.int64, device="cpu")
    for target, (w0, w1, w2, w3), skip in blocks(out, 2, 0, key, stream):
        bits = torch.stack([w0 << 30 | w1 >> 2, w2 << 30 | w3 >> 2], dim=-1)
        target.copy_(bits.flatten()[skip : skip + target.numel()] % below)
    return out
