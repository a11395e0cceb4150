"""Philox: random numbers that are functions of a key, a stream and a position, and rounding by such numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..signatures import Mutated

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
BLOCK = 1 << 14  # counters of a piece, so that the int64 temporaries stay in cache
DRAWING = 17  # temporaries per normal number of such a piece, in elements of float32

Stream = tuple[int, "int | Tensor"]  # purpose and time; both are 32-bit words of the counter
_Block = tuple[Tensor, list[Tensor], int]  # a piece of the result, its random words, how many of their elements to skip


def philox(counter: Tensor, key: int, stream: Stream) -> list[Tensor]:
    """Return four words of 32 bits per counter, as four int64 tensors like `counter` (Philox4x32-10)."""
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


def blocks(out: Tensor, lanes: int, start: int, key: int, stream: Stream) -> Iterator[_Block]:
    """Cut the flat `out` into pieces of at most `BLOCK` counters.

    Args:
        lanes: elements that the four words of a counter give.
        start: the number of the first element of `out` in the stream.
    """
    position = 0
    while position < out.numel():
        first, skip = divmod(start + position, lanes)
        size = min(out.numel() - position, BLOCK * lanes - skip)
        last = -(-(start + position + size) // lanes)
        counter = torch.arange(first, last, dtype=torch.int64, device=out.device)
        yield out[position : position + size], philox(counter, key, stream), skip
        position += size


def philox_bits16_(out: Mutated, key: int, purpose: int, time: int, at: Tensor | None = None, start: int = 0) -> None:
    """Write uniform 16-bit integers: the elements from `start` on of the stream (purpose, time).

    Args:
        at: a tensor of one integer, which replaces `time` and is read on the device.
    """
    for target, words, skip in blocks(out.view(-1), 8, start, key, (purpose, time if at is None else at.view(()))):
        lanes = target.new_empty(len(words[0]), 8)  # (counters, 8): two halves of each word, the lower one first
        for i, word in enumerate(words):
            lanes[:, 2 * i].copy_(word & 0xFFFF)
            lanes[:, 2 * i + 1].copy_(word >> 16)
        target.copy_(lanes.flatten()[skip : skip + target.numel()])


def philox_noise16_(out: Mutated, key: int, purpose: int, time: int, at: Tensor | None = None, start: int = 0) -> None:
    """Write uniform numbers: the 16-bit integers as midpoints of 65536 equal cells of (0, 1)."""
    flat, size = out.view(-1), BLOCK * 8
    for position in range(0, out.numel(), size):
        piece = flat[position : position + size]
        bits = torch.empty(piece.shape, dtype=torch.int32, device=out.device)
        philox_bits16_(bits, key, purpose, time, at, start + position)
        piece.copy_(bits).add_(0.5).mul_(2.0**-16)


def philox_uniform_(out: Mutated, key: int, purpose: int, time: int, at: Tensor | None = None, start: int = 0) -> None:
    """Write uniform numbers: midpoints of 2^23 equal cells of (0, 1). Float32 holds them, so none becomes 1."""
    for target, words, skip in blocks(out.view(-1), 4, start, key, (purpose, time if at is None else at.view(()))):
        cells = torch.stack(words, dim=-1).flatten()[skip : skip + target.numel()] >> 9
        target.copy_((cells.double() + 0.5) * 2.0**-23)


def philox_normal_(out: Mutated, key: int, purpose: int, time: int, at: Tensor | None = None, start: int = 0) -> None:
    """Write standard normal numbers by Box and Muller: `sqrt(-2 log u)` times the cosine and the sine of `2 pi v`.

    Logarithm, cosine and sine are polynomials, because those of libraries differ in their last bits.
    """
    for target, words, skip in blocks(out.view(-1), 4, start, key, (purpose, time if at is None else at.view(()))):
        pairs = _normal_pair(torch.stack(words[::2], dim=-1), torch.stack(words[1::2], dim=-1))
        target.copy_(torch.stack(pairs, dim=-1).flatten()[skip : skip + target.numel()])


# Minimax polynomials in double for -2 log(1 + x) / x and for cosine and sine of quarter turns. Their relative errors
# are below 2^-33.
_LOG = (
    *(-2.000000000069894, 1.0000000066099737, -0.6666666302869585, 0.4999986696525973, -0.4000022680367106),
    *(0.3334095800110999, -0.28571005412477596, 0.24821176285110688, -0.2204231241325923, 0.21762395628763806),
    *(-0.2146772654188622, 0.1196994964197827),
)
_COSINE = (0.9999999999439587, -1.2337005395654945, 0.25366918260255533, -0.020859936041659748, 0.0009033629646812772)
_SINE = (1.5707963267877518, -0.6459640961024318, 0.07969258184293669, -0.0046812606280718936, 0.00015819507558202523)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Return `c0 + c1 x + c2 x^2 + ...` by Horner's rule, each product and each sum rounded."""
    *lower, linear, highest = coefficients
    result = (x * highest).add_(linear)
    for coefficient in reversed(lower):
        result.mul_(x).add_(coefficient)
    return result


def _normal_length(word: Tensor) -> Tensor:
    """Return `sqrt(-2 log u)`, rounded to float32 but kept in float64, for u in (0, 1) given by a word of 32 bits.

    The number u is the midpoint of the cell number `word` of 2^32 equal cells.
    """
    x, exponent = torch.frexp((word.double() + 0.5) * 2.0**-32)
    small = x < 0.5**0.5  # these x are doubled, so that x - 1 is at most 0.42 in magnitude, where the polynomial holds
    x, halvings = torch.where(small, x * 2, x) - 1, small.double() - exponent
    log = halvings * (2 * math.log(2)) + x * _polynomial(x, _LOG)
    return torch.sqrt(log.float().double()).float().double()  # only this way torch rounds roots correctly


def _normal_pair(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two normal numbers of each pair of words, in float64.

    The angle is one of 2^32 midpoints. It is the nearest of four quarter turns and at most half a quarter turn more or
    less, where the polynomials hold.
    """
    turn = (angle + (1 << 29)) & _MASK
    quarter, past = turn >> 30, (turn & 0x3FFFFFFF) - (1 << 29)
    x, length = (past.double() + 0.5) * 2.0**-30, _normal_length(radius)
    square = x * x
    along, across = length * _polynomial(square, _COSINE), length * (x * _polynomial(square, _SINE))
    odd = (quarter & 1).bool()
    first, second = torch.where(odd, across, along), torch.where(odd, along, across)
    return torch.where((quarter + 1 & 2).bool(), -first, first), torch.where((quarter & 2).bool(), -second, second)


def round_to_bfloat16_(
    out: Mutated, x: Tensor, key: int, purpose: int, time: int, at: Tensor | None = None, start: int = 0
) -> None:
    """Round x to bfloat16 stochastically.

    16 random bits are added below the last bit of bfloat16 and cut off. They carry with a probability that is the
    distance from the number below, in units of the last bit.
    """
    bits = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    philox_bits16_(bits, key, purpose, time, at, start)
    bits.add_(x.view(torch.int32)).bitwise_and_(-65536)
    out.copy_(bits.view(torch.float32))
