"""What everything needs that works while backward runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


def on_gradient(p: Tensor, ready: Callable[[Tensor], None]) -> RemovableHandle:
    """Calls `ready(p)` whenever a backward pass has completed `p.grad`, also if p is frozen now and trained later."""
    trained = p.requires_grad
    p.requires_grad_(True)  # torch takes no hooks for frozen parameters, but keeps them while one is frozen
    handle = cast(Any, p).register_post_accumulate_grad_hook(ready)
    p.requires_grad_(trained)
    return cast(RemovableHandle, handle)


def full_precision(tensors: Iterable[Tensor]) -> ExitStack:
    """Within it no autocast reaches our products: a loop may run backward, or its step, in an autocast context."""
    stack = ExitStack()
    for kind in {device.type for device in {tensor.device for tensor in tensors}}:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
