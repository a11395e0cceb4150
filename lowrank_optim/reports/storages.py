"""The memory that tensors keep alive, counted as the allocator does: each storage once, and whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def storages(value: object) -> dict[int, int]:
    """Return the bytes of every storage that tensors within `value` keep alive, by the storage's identity."""
    found: dict[int, int] = {}
    for tensor in _tensors(value):
        for storage in backing(tensor):
            found[storage._cdata] = storage.nbytes()
    return found


def stored(value: object) -> int:
    """Return the total bytes of the storages that tensors within `value` keep alive."""
    return sum(storages(value).values())


def backing(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of a tensor; several where it wraps other tensors, as quantized weights do."""
    if is_traceable_wrapper_subclass(tensor):
        inner = (getattr(tensor, name) for name in cast(Any, tensor).__tensor_flatten__()[0])
        for part in inner:
            if isinstance(part, Tensor):  # a DTensor lists its mesh too
                yield from backing(part)
    else:
        yield tensor.untyped_storage()


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield all tensors within nested containers and objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))  # projector objects of other packages
