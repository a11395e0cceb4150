"""Helpers for work that runs inside `loss.backward()` or inside a user's autocast region."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


def on_gradient(p: Tensor, ready: Callable[[Tensor], None]) -> RemovableHandle:
    """Call `ready(p)` each time a backward pass has completed `p.grad`, also if `p` is frozen now and trained later."""
    # torch refuses a hook on a frozen parameter, but keeps a hook whose parameter is frozen later. So the parameter
    # counts as trained while the hook is registered.
    trained = p.requires_grad
    p.requires_grad_(True)
    handle = cast(Any, p).register_post_accumulate_grad_hook(ready)
    p.requires_grad_(trained)
    return cast(RemovableHandle, handle)


def full_precision(tensors: Iterable[Tensor]) -> ExitStack:
    """Return a context without autocast on the devices of `tensors`.

    A training loop may call `step()` or `backward()` inside an autocast region, which would run the projections in 16
    bits.
    """
    # Autocast has a switch per device type, and the parameters of a model may be on several.
    stack = ExitStack()
    for device_type in {device.type for device in {tensor.device for tensor in tensors}}:
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
    return stack
