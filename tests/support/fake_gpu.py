"""An accelerator that computes nothing: tensors on the meta device, whose values nobody has.

What a program asks of the values, and all else for which the host would wait for a GPU, is answered (numbers are 1) and
noted, with the line that asked. Tensors on the CPU stay what they are.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowrank_optim

# Operators that read numbers on the device before they return: the size of the result, or an error flag.
_READING = ("masked_select", "_unique2", "equal", "_linalg_eigh", "_linalg_svd", "linalg_cholesky")
_PACKAGE = os.path.dirname(lowrank_optim.__file__) + os.sep
_LAUNCHED = ("_fused_adamw_",)  # which torch has for GPUs and not for the meta device


class FakeGPU(TorchDispatchMode):
    """What the host has done, and where.

    Attributes:
        waits: for what it has waited.
        sent: numbers that it has sent without waiting, which no graph can capture either.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.sent: list[str] = []

    def __enter__(self) -> FakeGPU:
        torch.Tensor.data_ptr, self._tensor = _address, torch.tensor  # type: ignore[method-assign]
        torch.tensor = self._made_of_numbers  # type: ignore[assignment]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.tensor = self._tensor
        del torch.Tensor.data_ptr

    def _made_of_numbers(self, *args: Any, **kwargs: Any) -> Tensor:
        """`torch.tensor`, which no dispatcher sees: on a GPU it copies from the host and waits for that."""
        x = self._tensor(*args, **kwargs)
        if x.is_meta:
            self._note(self.waits, "numbers of the host are sent")
        return x

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there, goes = any(x.is_meta for x in tensors), torch.device(kwargs.get("device") or "meta")
        slowly = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
        if name == "_local_scalar_dense" and there:
            self._note(self.waits, "a number is read")
            return torch.ones((), dtype=args[0].dtype).item()
        if name == "_to_copy" and there and goes.type != "meta":
            self._note(self.waits, "numbers are fetched")
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "copy_" and args[0].is_meta != args[1].is_meta:
            to_here = "numbers of the host are sent" if args[0].is_meta else "numbers are fetched"
            self._note(self.waits if slowly else self.sent, to_here)
            return args[0]
        if name == "_to_copy" and not there and goes.type == "meta":
            self._note(self.waits if slowly else self.sent, "numbers of the host are sent")
        elif there and name in _READING:
            self._note(self.waits, f"{name} looks")
        elif there and any(x.dim() and not x.is_meta for x in tensors):
            self._note(self.waits, f"{name} of tensors on both devices")
        return None if there and name in _LAUNCHED else func(*args, **kwargs)

    def _note(self, notes: list[str], what: str) -> None:
        frame = sys._getframe()
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        notes.append(what if frame is None else f"{what} in {frame.f_code.co_name}:{frame.f_lineno}")


def _address(x: Tensor) -> int:
    own = torch._C.TensorBase.data_ptr(x)
    return own or int(x.untyped_storage()._cdata) + x.storage_offset() * x.element_size()
