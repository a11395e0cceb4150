"""Norms of gradients, and batches of gradients that stay in cache until they are used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice

import torch
from torch import Tensor

from . import limits
from .member import Member


def one_by_one(members: list[Member]) -> bool:
    """On CPU a gradient is still in cache from its norm when it is projected at once. Where gradients are stacked, on
    accelerators (one synchronisation), and where a bad one must stop all, the norms of all come first."""
    return all(one.p.is_cpu and not one.group["foreach"] and one.group["nonfinite"] == "skip" for one in members)


def in_cache(members: list[Member]) -> Iterator[list[Member]]:
    """Members whose gradients stay in cache together: large ones alone, and many small ones."""
    some: list[Member] = []
    size = 0
    for one in members:
        if one.grad.nbytes > limits.CACHE:
            yield [one]
            continue
        if size + one.grad.nbytes > limits.CACHE:
            yield some
            some, size = [], 0
        some.append(one)
        size += one.grad.nbytes
    if some:
        yield some


def gradient_norms(grads: list[Tensor]) -> list[float]:
    """One synchronisation per device; infinite also where only their squares would be."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, grad in enumerate(grads):
        kinds.setdefault((grad.device, grad.dtype), []).append(i)
    norms = [0.0] * len(grads)
    for (_, dtype), same in kinds.items():
        working = dtype if dtype.itemsize >= torch.float32.itemsize else torch.float32
        limit = torch.finfo(working).max ** 0.5
        parts = [_norm_parts(grads[i]) for i in same]
        values = iter(torch.stack(torch._foreach_norm(list(chain(*parts)), 2, dtype=working)).tolist())
        for i, own in zip(same, parts, strict=True):
            norm = math.hypot(*islice(values, len(own)))
            norms[i] = norm if norm < limit else math.inf
    return norms


def _norm_parts(grad: Tensor) -> Sequence[Tensor]:
    """On CPU a norm widens all that it is given, so what is kept in 16 bits is given in slices."""
    large = grad.numel() > limits.SLICE and grad.is_contiguous()
    copied = large and grad.device.type == "cpu" and grad.dtype.itemsize < torch.float32.itemsize
    return torch.split(grad.view(-1), limits.SLICE) if copied else (grad,)
