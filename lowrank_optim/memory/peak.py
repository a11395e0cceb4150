"""The most memory at once while something runs: of all tensors, and of gradients alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..reports.storages import backing, storages

_STORAGE: Any = torch.UntypedStorage  # its weak references are numbers, and equal its `_cdata`


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Most bytes of tensors alive at once that were made inside, buffers of LAPACK and BLAS aside.

    Modes follow the thread: backward is seen on the CPU, where it runs in the thread that called it. What a tensor
    subclass makes within its own operations is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._now = 0  # an upper bound: what has been freed since the last look is still in it
        self._alive: dict[int, int] = {}  # weakly referenced, so that no identity is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage._cdata for storage in _backings((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _backings(result):
            if storage._cdata not in known and storage._cdata not in self._alive:
                self._alive[storage._weak_ref()] = storage.nbytes()
                self._now += storage.nbytes()
                if self._now > self.most:
                    self.most = max(self.most, self.now)
        return result

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for key in self._alive:
            _STORAGE._free_weak_ref(key)
        self._alive = {}

    @property
    def now(self) -> int:
        """Bytes that are alive and were made inside."""
        for key in [key for key in self._alive if _STORAGE._expired(key)]:
            self._now -= self._alive.pop(key)
            _STORAGE._free_weak_ref(key)
        return self._now

    def restart(self) -> int:
        """Forgets the peak so far; returns what is alive."""
        self.most = self.now
        return self.most


def _backings(value: object) -> Iterator[Any]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and not leaf.is_meta:
            yield from backing(leaf)


class CudaPeak:
    """The same from the allocator, which sees all threads and all temporaries. Ends the run's own peak statistics."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._base = device, 0

    def __enter__(self) -> CudaPeak:
        torch.cuda.synchronize(self._device)
        self._base = torch.cuda.memory_allocated(self._device)
        self.restart()
        return self

    def __exit__(self, *exception: object) -> None:
        torch.cuda.synchronize(self._device)

    @property
    def most(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._base

    def restart(self) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device) - self._base


class Meter(Protocol):
    """What measures: `Peak` or `CudaPeak`."""

    @property
    def most(self) -> int: ...

    def restart(self) -> int: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception: Any) -> Any: ...


class GradientPeak:
    """Most bytes of gradients alive at once inside: `p.grad`, what is kept instead of it, and the newest gradient.

    Args:
        sums: what is kept of gradients elsewhere.
    """

    def __init__(self, params: Iterable[Tensor], sums: Callable[[], Iterable[Tensor]]) -> None:
        self.most = 0
        self._params, self._sums = list(params), sums
        self._handles: list[Any] = []

    def __enter__(self) -> GradientPeak:
        trained = [p for p in self._params if p.requires_grad]
        self._handles = [cast(Any, p).register_hook(self.look) for p in trained]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def look(self, *newest: Tensor) -> None:
        kept = [p.grad for p in self._params if p.grad is not None]
        self.most = max(self.most, sum(storages([*kept, *self._sums(), *newest]).values()))


@dataclass(frozen=True)
class StepPeak:
    """Of one training step, in bytes, beyond what was there before.

    Attributes:
        whole: most at once, activations and gradients included.
        update: most at once within `optimizer.step()`, beyond what was there when it was called.
        gradients: most at once of gradients.
    """

    whole: int
    update: int
    gradients: int


def measure(
    step: Callable[[], object],
    optimizer: Optimizer,
    device: torch.device,
    sums: Callable[[], Iterable[Tensor]] = tuple,
) -> StepPeak:
    """Runs `step` once. `sums`: see `GradientPeak`."""
    meter: Meter = CudaPeak(device) if device.type == "cuda" else Peak()
    gradients = GradientPeak([p for group in optimizer.param_groups for p in group["params"]], sums)
    before, update, start = 0, 0, 0

    def begins(*_: object) -> None:
        nonlocal before, start
        gradients.look()
        before, start = max(before, meter.most), meter.restart()

    def ends(*_: object) -> None:
        nonlocal update
        update = max(update, meter.most - start)

    handles = [optimizer.register_step_pre_hook(begins), optimizer.register_step_post_hook(ends)]
    try:
        with meter, gradients:
            step()
        return StepPeak(max(before, meter.most), update, gradients.most)
    finally:
        for handle in handles:
            handle.remove()
