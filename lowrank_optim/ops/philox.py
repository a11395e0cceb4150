"""Counter-based random numbers (Philox4x32-10): element i of a stream is a pure function of (key, stream, i).

Nothing here has state, so the global generator is never touched, a resumed run needs nothing saved, and any device or
shard can draw just the elements it holds and get the numbers that one process would have drawn.

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

WORKSPACE = 2 << 20  # bytes of temporaries that this takes


class Places(NamedTuple):
    """Which elements of a stream a piece of a larger tensor has: its element f is number `base + f + f // run * gap`.

    That is a block of columns, `run` of `run + gap`, in row-major order. `start` is the first f.
    """

    start: int
    base: int
    run: int
    gap: int


def key_of(seed: int, name: str) -> int:
    """The 64-bit key of a parameter. A hash of the name, which all ranks and runs share; Python's `hash` is salted."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def stream_of(purpose: str, time: int | Tensor) -> Stream:
    """One independent stream per purpose ("sketch", "weight", ...) and time (a step or a refresh count).

    A time on the device, `()` in int64, is read there: captured graphs then draw other numbers at each replay.
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
    """Standard normal numbers, float32, the same on all devices, from element `start` of the stream on.

    some: of the tensor of this shape only these rows, without a step.
    """
    if some is not None:
        first, stop, _ = some.indices(shape[0])
        shape, start = (stop - first, *shape[1:]), start + first * math.prod(shape[1:])
    out = torch.empty(shape, dtype=torch.float32, device=device)
    kernel("philox_normal_")(out, *numbers_of(key, stream), start)
    return out


def uniform(shape: tuple[int, ...], key: int, stream: Stream, device: torch.device | str = "cpu") -> Tensor:
    """Uniform numbers in (0, 1), float32."""
    out = torch.empty(shape, dtype=torch.float32, device=device)
    kernel("philox_uniform_")(out, *numbers_of(key, stream))
    return out


def random_bits16(
    count: int, key: int, stream: Stream, start: int | Places = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform 16-bit integers as int32, elements `start` to `start + count` of the stream, or those of `Places`."""
    out = torch.empty(count, dtype=torch.int32, device=device)
    if isinstance(start, Places):
        return _bits16_of_columns(out, key, stream, start)
    kernel("philox_bits16_")(out, *numbers_of(key, stream), start)
    return out


def numbers_of(key: int, stream: Stream) -> tuple[int, int, int, Tensor | None]:
    """(key, purpose, time, at) for an operator: schemas have signed integers, and a time on the device apart."""
    purpose, time = stream
    signed = key - (1 << 64) if key >= 1 << 63 else key
    return (signed, purpose, 0, time) if isinstance(time, Tensor) else (signed, purpose, time & 0xFFFFFFFF, None)


def _bits16_of_columns(out: Tensor, key: int, stream: Stream, places: Places) -> Tensor:
    """Row by row, as many at once as there are in a block of counters; every row is drawn whole."""
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
    """Two lanes of 16 bits per word: `(counters, 8)`, int32."""
    lanes = words[0].new_empty(len(words[0]), 8, dtype=torch.int32)
    for i, word in enumerate(words):
        lanes[:, 2 * i].copy_(word & 0xFFFF)
        lanes[:, 2 * i + 1].copy_(word >> 16)
    return lanes


def sample(below: int, count: int, key: int, stream: Stream) -> Tensor:
    """`count` different integers in [0, below), sorted, int64, on the CPU; every set of them is equally likely.

    They are the first ones of a stream of integers that is drawn until enough of it differ, so time and memory go with
    `count` and not with `below`. Of more than half of all integers those are drawn that are left out.
    """
    if 2 * count > below:
        kept = torch.ones(below, dtype=torch.bool, device="cpu")
        kept[sample(below, below - count, key, stream)] = False
        return kept.nonzero().flatten()
    drawn = math.ceil(-below * math.log1p(-count / below) + 4 * math.sqrt(count))  # as many differ, but for bad luck
    while True:
        numbers, place = _integers(drawn, below, key, stream).sort(stable=True)
        new = torch.ones_like(numbers, dtype=torch.bool)
        new[1:] = numbers[1:] != numbers[:-1]
        numbers, place = numbers[new], place[new]
        if len(numbers) >= count:
            return numbers[place <= place.kthvalue(count).values] if count else numbers[:0]
        drawn += drawn // 8 + 1


def _integers(count: int, below: int, key: int, stream: Stream) -> Tensor:
    """Uniform integers in [0, below), of 62 random bits each: the remainders differ in likelihood by below / 2^62."""
    out = torch.empty(count, dtype=torch.int64, device="cpu")
    for target, (w0, w1, w2, w3), skip in blocks(out, 2, 0, key, stream):
        bits = torch.stack([w0 << 30 | w1 >> 2, w2 << 30 | w3 >> 2], dim=-1)
        target.copy_(bits.flatten()[skip : skip + target.numel()] % below)
    return out
