"""A CUDA graph on the CPU: the operations of a stretch of code, recorded with the tensors that they read and write, and
run again without that code. What the code decided, or computed with numbers of its own, is frozen, as in a graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What reads a value from the device, or takes one there: neither can be captured.
_FORBIDDEN = ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero", "aten::equal", "aten::is_nonzero")


class Recorder(TorchDispatchMode):
    """`host`: tensors that stay on the CPU where weights are elsewhere; what is done to them is not recorded."""

    def __init__(self, host: Iterable[Tensor]) -> None:
        super().__init__()
        self.host = {_storage(x) for x in host}
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func._schema.name, func(*args, **(kwargs or {}))
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if read and all(_storage(x) in self.host for x in read):
            self.host |= {_storage(x) for x in tree_leaves(result) if isinstance(x, Tensor)}
            return result
        assert name not in _FORBIDDEN, f"{name} cannot be captured"
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            read = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and _storage(old) not in read:  # neither a view nor in place
                    old.copy_(new)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def record(code: Any, host: Iterable[Tensor]) -> Recorder:
    """Runs it once, and remembers."""
    recorder = Recorder(host)
    with recorder, torch.no_grad():
        code()
    return recorder
