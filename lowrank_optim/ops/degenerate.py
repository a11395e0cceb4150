"""Rules for vectors and selections that a matrix does not decide, so that rounding errors do not decide them either.

All rotations of the singular vectors of equal values are valid, and LAPACK returns the rotation that its rounding
errors pick: a different CPU or number of threads gets a different rotation. The vectors u and v of a value of zero have
independent signs, and on the longer side they are any vectors outside the range of the matrix. Training continues along
these vectors. The rules here depend on subspaces and on fixed random numbers only. Where a matrix decides its vectors,
nothing changes.

The limits are those of rounding errors, so a difference just at a limit can still fall on either side of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .philox import normal, stream_of

TIE = 64  # units of rounding of the largest number within which numbers are equal; LAPACK leaves up to 20


def settle_(u: Tensor, s: Tensor, v: Tensor | None = None, eps: float | None = None, keep: int | None = None) -> int:
    """Replace the vectors of equal singular values, and of zero, by the vectors that the rules pick.

    Equal values: with X the vectors of the shorter side and N fixed random numbers, all vectors are rotated by the Q of
    `X^T N = Q R`, which undoes any rotation that X came with. Zero: the vectors are the Q of `N - U U^T N = Q R`,
    separately for u and v, and the value becomes 0. Signs are left to `fix_signs`.

    Args:
        u, v: vectors as columns (m, k), (n, k). They are changed in place.
        s: the values (k,), which descend. They are changed in place.
        eps: the unit of rounding of the decomposed matrix. None stands for that of s.
        keep: the number of leading vectors that matter. None stands for all.

    Returns:
        The number of values that are not zero.
    """
    if s.is_meta:
        return len(s)  # an estimate has no values, and needs none
    values, sides = s.tolist(), [x for x in (u, v) if x is not None]
    keep = len(values) if keep is None else keep
    if not values or not 0 < values[0] < math.inf:
        return len(values)  # a zero matrix: its vectors are the same everywhere
    near = TIE * (torch.finfo(s.dtype).eps if eps is None else eps) * values[0]
    rank = int(sum(value > near for value in values))
    for first, last in _runs(values[:rank], near):
        if first < keep:
            x = min(sides, key=len)[:, first:last]
            turn = torch.linalg.qr(x.mT @ _drawn(x))[0]
            for side in sides:
                side[:, first:last] = side[:, first:last] @ turn
    if rank < keep:
        for side in sides:
            side[:, rank:keep] = _outside(side[:, :rank], side[:, rank:keep])
        s[rank:] = 0
    return rank


def untied_(scores: Tensor, count: int, scale: Tensor) -> Tensor:
    """Change scores so that all scores that tie for the last of `count` places become zero, and keep their order.

    A selection then breaks the tie by position, and not by rounding errors.

    Args:
        scores: (..., n), changed in place and returned.
        scale: (..., 1), the largest number that the scores were computed from. It gives the size of rounding errors.
    """
    near = scale * (TIE * torch.finfo(scores.dtype).eps)
    scores.sub_(scores.topk(count).values[..., -1:])
    return scores.sub_(torch.clamp(scores, -near, near))


def _runs(values: list[float], near: float) -> list[tuple[int, int]]:
    """Return the runs of at least two equal values among descending ones, as (first, last + 1)."""
    found, first = [], 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[first] - values[i] > near:
            if i - first > 1:
                found.append((first, i))
            first = i
    return found


def _outside(known: Tensor, like: Tensor) -> Tensor:
    """Return orthonormal columns, as many as `like` has, orthogonal to the orthonormal columns of `known (m, rank)`."""
    x = _drawn(like)
    for _ in range(2):  # the second pass removes the part inside that rounding errors of the first leave
        x = torch.linalg.qr(x - known @ (known.mT @ x))[0]
    return x


def _drawn(like: Tensor) -> Tensor:
    """Return fixed random numbers in the shape of `like`."""
    return normal(tuple(like.shape), 0, stream_of("degenerate", 0), like.device).to(like.dtype)
