"""Counter-based random numbers (Philox4x32-10): element i of a stream is a pure function of (key, stream, i).

Nothing here has state, so the global generator is never touched, a resumed run needs nothing saved, and any device or
shard can draw just the elements it holds and get the numbers that one process would have drawn.

Reference: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
BLOCK = 1 << 14  # counters generated at once, so that the int64 temporaries stay in cache
WORKSPACE = 2 << 20  # bytes of temporaries that this takes

Stream = tuple[int, "int | Tensor"]
_Block = tuple[Tensor, list[Tensor], int]  # a piece of the result, the words for it, how many of their elements to skip


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


def philox(counter: Tensor, key: int, stream: Stream) -> list[Tensor]:
    """Four int64 tensors of 32-bit words, one word quadruple per counter."""
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2: Any
    c3: Any
    c2, c3 = (word & _MASK for word in stream)  # numbers, until the first round mixes them with the counters
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, which leaves both 32-bit halves right once the upper one is masked.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def normal(
    shape: tuple[int, ...], key: int, stream: Stream, device: torch.device | str = "cpu", start: int = 0
) -> Tensor:
    """Standard normal numbers, float32, from element `start` of the stream on.

    Box-Muller runs in float64 and is rounded once, so devices whose float32 logarithms differ by an ulp still agree.
    """

    def from_words(words: list[Tensor]) -> Tensor:
        u0, u1, u2, u3 = ((word.double() + 0.5) * 2.0**-32 for word in words)
        pairs = []
        for radius, angle in ((u0, u1), (u2, u3)):
            length = torch.sqrt(-2.0 * torch.log(radius))
            pairs += [length * torch.cos(2 * math.pi * angle), length * torch.sin(2 * math.pi * angle)]
        return torch.stack(pairs, dim=-1)

    out = torch.empty(math.prod(shape), dtype=torch.float32, device=device)
    for target, words, skip in _blocks(out, 4, start, key, stream):
        target.copy_(from_words(words).flatten()[skip : skip + target.numel()])
    return out.view(shape)


def uniform(shape: tuple[int, ...], key: int, stream: Stream, device: torch.device | str = "cpu") -> Tensor:
    """Uniform numbers in (0, 1), float32: the midpoints of 2^23 equal cells, which are floats: none is rounded to 1."""
    out = torch.empty(math.prod(shape), dtype=torch.float32, device=device)
    for target, words, skip in _blocks(out, 4, 0, key, stream):
        cells = torch.stack(words, dim=-1).flatten()[skip : skip + target.numel()] >> 9
        target.copy_((cells.double() + 0.5) * 2.0**-23)
    return out.view(shape)


def random_bits16(
    count: int, key: int, stream: Stream, start: int | Places = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform 16-bit integers as int32, elements `start` to `start + count` of the stream, or those of `Places`."""
    out = torch.empty(count, dtype=torch.int32, device=device)
    if isinstance(start, Places):
        return _bits16_of_columns(out, key, stream, start)
    for target, words, skip in _blocks(out, 8, start, key, stream):
        target.copy_(_lanes16(words).flatten()[skip : skip + target.numel()])
    return out


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
    for target, (w0, w1, w2, w3), skip in _blocks(out, 2, 0, key, stream):
        bits = torch.stack([w0 << 30 | w1 >> 2, w2 << 30 | w3 >> 2], dim=-1)
        target.copy_(bits.flatten()[skip : skip + target.numel()] % below)
    return out


def _blocks(out: Tensor, lanes: int, start: int, key: int, stream: Stream) -> Iterator[_Block]:
    """Cuts `out` into pieces of at most `BLOCK` counters."""
    position = 0
    while position < out.numel():
        first, skip = divmod(start + position, lanes)
        size = min(out.numel() - position, BLOCK * lanes - skip)
        last = -(-(start + position + size) // lanes)
        counter = torch.arange(first, last, dtype=torch.int64, device=out.device)
        yield out[position : position + size], philox(counter, key, stream), skip
        position += size
