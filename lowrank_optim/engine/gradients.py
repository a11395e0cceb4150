"""Norms of gradients, which every step reads first, and batches of gradients that stay in cache until they are used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice

import torch
from torch import Tensor

from . import limits
from .member import Member


def one_by_one(members: list[Member]) -> bool:
    """Whether each gradient may be updated right after its norm was taken.

    On a CPU the gradient is then still in cache. The norms of all come first where gradients are stacked, on
    accelerators (one synchronization), and where a non-finite gradient must stop the step before any update.
    """
    return all(
        member.p.is_cpu and not member.group["foreach"] and member.group["nonfinite"] == "skip" for member in members
    )


def in_cache(members: list[Member]) -> Iterator[list[Member]]:
    """Yield batches of members whose gradients stay in cache together: large ones alone, small ones in groups."""
    batch: list[Member] = []
    size = 0
    for member in members:
        # A batch of small gradients stays open meanwhile, so one kernel call still serves them together.
        if member.grad.nbytes > limits.CACHE:
            yield [member]
            continue
        if size + member.grad.nbytes > limits.CACHE:
            yield batch
            batch, size = [], 0
        batch.append(member)
        size += member.grad.nbytes
    if batch:
        yield batch


def gradient_norms(grads: list[Tensor]) -> list[float]:
    """Return the norm of each gradient, with one synchronization per device.

    A norm is reported as infinite if its square is, since second moments overflow then.
    """
    # One kernel takes many tensors of one device and dtype, and one copy brings their norms to the host.
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, grad in enumerate(grads):
        kinds.setdefault((grad.device, grad.dtype), []).append(i)
    norms = [0.0] * len(grads)
    for (_, dtype), indices in kinds.items():
        # The square of a larger norm overflows in this dtype, and so would a second moment.
        working = dtype if dtype.itemsize >= torch.float32.itemsize else torch.float32
        limit = torch.finfo(working).max ** 0.5
        parts = [_norm_parts(grads[i]) for i in indices]
        values = iter(torch.stack(torch._foreach_norm(list(chain(*parts)), 2, dtype=working)).tolist())
        for i, slices in zip(indices, parts, strict=True):
            # The slices of a large gradient: their norms add up in squares, on the host and in float64.
            norm = math.hypot(*islice(values, len(slices)))
            norms[i] = norm if norm < limit else math.inf
    return norms


def _norm_parts(grad: Tensor) -> Sequence[Tensor]:
    """Return a gradient, or slices of it: a norm on a CPU widens a whole 16-bit tensor, and a slice limits the copy."""
    large = grad.numel() > limits.SLICE and grad.is_contiguous()
    copied = large and grad.device.type == "cpu" and grad.dtype.itemsize < torch.float32.itemsize
    return torch.split(grad.view(-1), limits.SLICE) if copied else (grad,)
