"""Measurements of peak memory while code runs: of all tensors, and of gradients alone."""

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

_STORAGE: Any = torch.UntypedStorage  # a weak reference to a storage is an integer that equals its `_cdata`


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that measures the peak bytes of tensors made inside it, without buffers of LAPACK and BLAS.

    Dispatch modes belong to a thread. Backward is seen on the CPU, where it runs in the calling thread. Tensors that a
    tensor subclass makes within its own operations are not seen.

    Attributes:
        most: the peak so far, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._now = 0  # an upper bound: it still has the bytes freed since `now` was last read
        self._alive: dict[int, int] = {}  # bytes by storage; a weak reference keeps its identity from being reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage._cdata for storage in _backings((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _backings(result):
            if storage._cdata not in known and storage._cdata not in self._alive:
                self._alive[storage._weak_ref()] = storage.nbytes()
                self._now += storage.nbytes()
                # The exact number costs a pass over all storages, so it is only read where the bound is a new peak.
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
        """Return the bytes of tensors that were made inside and are alive."""
        for key in [key for key in self._alive if _STORAGE._expired(key)]:
            self._now -= self._alive.pop(key)
            _STORAGE._free_weak_ref(key)
        return self._now

    def restart(self) -> int:
        """Forget the peak so far, and return the bytes that are alive."""
        self.most = self.now
        return self.most


def _backings(value: object) -> Iterator[Any]:
    """Yield the storages of all tensors within nested arguments or results."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and not leaf.is_meta:
            yield from backing(leaf)


class CudaPeak:
    """The same measurement by CUDA's allocator, which sees all threads and all temporaries.

    It resets the device's peak statistics, so a run's own are lost.
    """

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
        """Return the peak since the last restart, beyond what was allocated on entry, in bytes."""
        return torch.cuda.max_memory_allocated(self._device) - self._base

    def restart(self) -> int:
        """Forget the peak so far, and return the bytes allocated since entry."""
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device) - self._base


class Meter(Protocol):
    """The interface of `Peak` and `CudaPeak`."""

    @property
    def most(self) -> int: ...

    def restart(self) -> int: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception: Any) -> Any: ...


class GradientPeak:
    """A context that measures the peak bytes of gradients: `p.grad`, accumulated coordinates, the newest gradient.

    Args:
        params: the parameters of the optimizer.
        sums: returns the tensors in which gradients accumulate outside `p.grad`.

    Attributes:
        most: the peak so far, in bytes.
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
        """Update the peak; called with each new gradient before autograd adds it to `p.grad`."""
        kept = [p.grad for p in self._params if p.grad is not None]
        self.most = max(self.most, sum(storages([*kept, *self._sums(), *newest]).values()))


@dataclass(frozen=True)
class StepPeak:
    """The peaks of one training step, in bytes, beyond what was allocated before it.

    Attributes:
        whole: peak of all tensors, including activations and gradients.
        update: peak within `optimizer.step()`, beyond what was allocated when it was called.
        gradients: peak of gradients alone; gradients from before the step are included.
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
    """Run `step` once and return its peaks. `sums` is that of `GradientPeak`."""
    meter: Meter = CudaPeak(device) if device.type == "cuda" else Peak()
    gradients = GradientPeak([p for group in optimizer.param_groups for p in group["params"]], sums)
    # The meter has a single peak. It restarts where `optimizer.step()` begins, so `before` keeps the earlier peak.
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
