"""Counter-based random numbers (Philox4x32-10): element i of a stream is a pure function of (key, stream, i).

Nothing here has state, so the global generator is never touched, a resumed run needs nothing saved, and any device or
shard can draw just the elements it holds and get the numbers that one process would have drawn.

Reference: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
import math
import zlib

import torch
from torch import Tensor

from .reference import BLOCK, Stream, blocks, philox
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


def key_of(seed: int, name: str) -> int:
    """The 64-bit key of a parameter. A hash of the name, which all ranks and runs share; Python's `hash` is salted."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def stream_of(purpose: str, time: int | Tensor) -> Stream:
    """One independent stream per purpose ("sketch", "weight", ...) and time (a step or a refresh count).

    A time on the device, `()` in int64, is read there: captured graphs then draw other numbers at each replay.
    """
    return zlib.crc32(purpose.encode()), time


def normal(shape: tuple[int, ...], key: int, stream: Stream, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers, float32, the same on all devices (see `reference.philox_normal_`)."""
    out = torch.empty(shape, dtype=torch.float32, device=device)
    kernel("philox_normal_")(out, *numbers_of(key, stream))
    return out


def uniform(shape: tuple[int, ...], key: int, stream: Stream, device: torch.device | str = "cpu") -> Tensor:
    """Uniform numbers in (0, 1), float32."""
    out = torch.empty(shape, dtype=torch.float32, device=device)
    kernel("philox_uniform_")(out, *numbers_of(key, stream))
    return out


def random_bits16(count: int, key: int, stream: Stream, start: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Uniform 16-bit integers as int32, elements `start` to `start + count` of the stream."""
    out = torch.empty(count, dtype=torch.int32, device=device)
    kernel("philox_bits16_")(out, *numbers_of(key, stream), start)
    return out


def numbers_of(key: int, stream: Stream) -> tuple[int, int, int, Tensor | None]:
    """(key, purpose, time, at) for an operator: schemas have signed integers, and a time on the device apart."""
    purpose, time = stream
    signed = key - (1 << 64) if key >= 1 << 63 else key
    return (signed, purpose, 0, time) if isinstance(time, Tensor) else (signed, purpose, time & 0xFFFFFFFF, None)


def sample(below: int, count: int, key: int, stream: Stream) -> Tensor:
    """`count` different integers in [0, below), sorted, int64, on the CPU; every set of them is equally likely.

    They are the first ones of a stream of integers that is drawn until enough of it differ, so time and memory go with
    `count` and not with `below`. Of more than half of all integers those are drawn that are left out.
    """
    if 2 * count > below:
        kept = torch.ones(below, dtype=torch.bool)
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
    out = torch.empty(count, dtype=torch.int64)
    for target, (w0, w1, w2, w3), skip in blocks(out, 2, 0, key, stream):
        bits = torch.stack([w0 << 30 | w1 >> 2, w2 << 30 | w3 >> 2], dim=-1)
        target.copy_(bits.flatten()[skip : skip + target.numel()] % below)
    return out
