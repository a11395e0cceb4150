"""Step during backward: each parameter is updated, and its gradient freed, as soon as that gradient is complete."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .. import checks
from ..engine import limits
from ..engine.autograd import full_precision, on_gradient
from ..engine.chunk import Chunk
from ..engine.gradients import gradient_norms, one_by_one
from ..engine.member import Member
from ..engine.refresh import refresh_, refresh_due
from ..engine.update import project
from ..optimizer import LowRankOptimizer
from ..reports.report import Report
from . import backward_checks
from .clipping import Clipping
from .gradient_memory import ever_thin, gradient_report

_OPTIONS = ("accumulation_steps", "accumulate", "basis_from", "clip", "clip_norm")
GRAD_NORM = "grad_norm"  # key of the first group for delayed clipping, so that checkpoints have the norm


def step_in_backward(
    model: nn.Module,
    optimizer: LowRankOptimizer,
    accumulation_steps: int = 1,
    *,
    accumulate: Literal["projected", "whole"] = "projected",
    basis_from: Literal["window", "micro-batch"] = "window",
    clip: Literal["tensor", "delayed"] = "tensor",
    clip_norm: float | None = None,
    scaler: GradScaler | None = None,
) -> StepInBackward:
    r"""Update each parameter during `loss.backward()` and free its gradient: no two layers' gradients live at once.

    The training loop does not change. `optimizer.step()` becomes the boundary of a step. It finishes what backward has
    left (a window of fewer micro-batches, gradients that were set by hand), and must still be called after each window
    of `accumulation_steps` backward passes. The optimizer keeps its groups, schedulers and checkpoints. The weights
    are those of the normal mode bit for bit, apart from the differences below.

    With accumulation and a method that reads only `R = P^T G` of a gradient (GaLore, GaLoreAdafactor, QGaLore, GoLore),
    each micro-batch is projected when it arrives:

        each backward():                C <- C + P^T G;  p.grad <- None          4 r n bytes instead of a gradient
        the k-th backward():            the step, with R = C;  C is freed

    A matrix whose basis is due for a refresh accumulates its gradient whole in that window, in `p.grad`. So does every
    matrix in the very first window. Methods that also use the rest of G (Fira, APOLLO, Flora, ...), and parameters that
    are not projected, always accumulate whole. `report()` of the handle lists which parameters do.

    To drop a window that was begun, call `optimizer.zero_grad()`. `model.zero_grad()` only clears `p.grad`: projected
    sums and the count of passes stay, so the next window raises an error at the surplus pass. A first pass whose
    gradients are all zero is a step, unlike in the normal mode, because most gradients are used before this is known.

    Memory: the largest gradient (on accelerators, and with `foreach=True`, up to 64 MiB more), and with accumulation
    the sum in the handle's `report()`.

    Args:
        model: the model that has the optimizer's parameters; also compiled, or with activation checkpointing. A model
            compiled as one graph hands out all its gradients at once, so compile its layers instead.
        optimizer: an optimizer of this package.
        accumulation_steps: k, backward passes per step.
        accumulate: "projected" accumulates coordinates where the method reads only these. "whole" accumulates all
            gradients in `p.grad`, as without this function.
        basis_from: "window" fits a basis that is due to the sum of its window. "micro-batch" fits it to the first
            gradient of the window, which is then projected like the later ones. No whole gradient ever accumulates, but
            bases follow smaller batches. With one micro-batch per step there is no difference.
        clip: "tensor" clips each gradient by its own norm. "delayed" clips all gradients by the global norm of the
            previous step, and each by its own norm, which bounds a sudden spike. The global norm of the current step is
            only known when most weights have been updated, so no step during backward can clip by it.
        clip_norm: the largest norm; None: no clipping.
        scaler: the GradScaler that scales the losses; call `scaler.step(optimizer)` and `scaler.update()` as usual.
            Gradients are divided by its scale before they are used. After an overflow, a normal step updates nothing;
            here parameters whose gradients were finite have been updated.

    Returns:
        A handle, with the gradient norm of the last step and `remove()`. It is also a context manager.

    Errors:
        TypeError: the optimizer is of another package.
        ValueError: the options cannot work together, or the model does not have the optimizer's parameters.
        RuntimeError: there were more backward passes than `accumulation_steps` since the last `optimizer.step()`.

    Example::

        optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), lr=1e-3)
        handle = lowrank_optim.step_in_backward(model, optimizer)
        loss = model(inputs).square().mean()
        loss.backward()   # weights are updated here, one by one
        optimizer.step()  # counts the step
    """
    return StepInBackward(model, optimizer, accumulation_steps, accumulate, basis_from, clip, clip_norm, scaler)


def in_backward(optimizer: Optimizer) -> StepInBackward | None:
    """Return the handle of an optimizer that steps during backward, or None."""
    mode = optimizer.mode if isinstance(optimizer, LowRankOptimizer) else None
    return mode if isinstance(mode, StepInBackward) else None


@dataclass
class _Window:
    """The gradients that one parameter has gathered since the last step.

    Attributes:
        count: backward passes that reached the parameter.
        thin: whether it gathers coordinates. Otherwise its gradient accumulates whole, in `p.grad`.
        sum: the sum of the coordinates `(..., r, n)`, or None.
    """

    count: int = 0
    thin: bool = False
    sum: Tensor | None = None


@dataclass
class StepInBackward:
    """The handle that `step_in_backward` returns. Only this function makes it."""

    model: nn.Module
    optimizer: LowRankOptimizer
    accumulation_steps: int
    accumulate: str
    basis_from: str
    clip: str
    clip_norm: float | None
    scaler: GradScaler | None
    grad_norm: float | None = field(default=None, init=False)
    """The norm of all finite gradients of the last step, before clipping. None before the first step, and after a step
    that accumulated projected gradients, because their norms are unknown."""

    def __post_init__(self) -> None:
        if self.scaler is not None and not self.scaler.is_enabled():
            self.scaler = None  # a disabled scaler does nothing, as in torch
        options = {key: getattr(self, key) for key in _OPTIONS}
        backward_checks.everything(self.model, self.optimizer, options, self.scaler is not None)
        self._windows: dict[Tensor, _Window] = {}
        self._groups: dict[Tensor, dict[str, Any]] = {}
        self._handles: list[Any] = []
        self._pending: list[Member] = []  # complete gradients that wait to be stacked with equal ones
        self._lock = threading.RLock()  # backward runs one thread per device
        self._open = False
        self._clipping = Clipping()
        self.optimizer.mode = self
        for group in self.optimizer.param_groups:
            self.attach(group)

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self.optimizer.zero_grad()
        self.remove()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("step_in_backward is bound to its parameters by hooks, which copy and pickle do not follow")

    def remove(self) -> None:
        """Return to the normal mode, in which gradients stay in `p.grad` until `optimizer.step()` uses them."""
        if any(window.count for window in self._windows.values()):
            raise RuntimeError(
                "remove() in the middle of a step: call optimizer.step() to finish the step, or optimizer.zero_grad() "
                "to drop its gradients, first"
            )
        for handle in self._handles:
            handle.remove()
        self._handles, self._windows = [], {}
        if self.optimizer.mode is self:
            self.optimizer.mode = None

    # -- during backward -----------------------------------------------------------------------------------------------

    def attach(self, group: dict[str, Any]) -> None:
        """Serve the parameters of a group."""
        for p in group["params"]:
            self._windows[p] = _Window()
            self._groups[p] = group
            self._handles.append(on_gradient(p, self._ready))

    @torch.no_grad()
    def _ready(self, p: Tensor) -> None:
        """Take the gradient of p when a backward pass has completed it; autograd calls this after accumulating."""
        with self._lock:
            self._begin()
            window, member = self._windows[p], self._member(p)
            if window.count == self.accumulation_steps:
                raise RuntimeError(
                    f"{self.optimizer.table.plans[p].name} got gradient number {window.count + 1} since the last "
                    f"optimizer.step(), and accumulation_steps is {self.accumulation_steps}. Call optimizer.step() "
                    "after each window, or optimizer.zero_grad() (not the model's) to drop one, or raise "
                    "accumulation_steps; reentrant activation checkpointing (use use_reentrant=False) also hands out "
                    "gradients of shared weights in parts"
                )
            self.optimizer.stepper.prepare([member])
            with full_precision([p]):
                # The first pass decides for the whole window: a sum is either of coordinates or of whole gradients.
                window.thin = window.thin if window.count else self._is_thin(member)
                window.count += 1
                if window.thin:
                    self._project(window, member)
            if window.count == self.accumulation_steps:
                self._complete(p)

    def _begin(self) -> None:
        """Prepare the step when its first gradient arrives; later calls of the same step do nothing."""
        if self._open:
            return
        self.optimizer.table.recheck()
        backward_checks.skips_nonfinite(self.optimizer.param_groups)
        self._open = True
        self._groups = dict(self.optimizer.table.members())
        before = self.optimizer.param_groups[0].get(GRAD_NORM) if self.clip == "delayed" else None
        scale = self.scaler.get_scale() if self.scaler is not None else 1.0
        self._clipping = Clipping(self.clip_norm, before, 1 / scale)

    def _member(self, p: Tensor) -> Member:
        """Return p as a member of the step, with the gradient in `p.grad`."""
        if p.grad is None:
            name = self.optimizer.table.plans[p].name
            raise RuntimeError(f"the gradient of {name} is gone; did another hook take it (CompressedAccumulation)?")
        return self.optimizer.table.member(p, self._groups[p], p.grad)

    def _is_thin(self, member: Member) -> bool:
        """Whether this window accumulates coordinates, in the current basis or in one fitted to the first gradient."""
        if not self._ever_thin(member.p, member.group):
            return False
        chunk = self._chunk(member)
        if self.basis_from == "micro-batch" and refresh_due(chunk):
            chunk.grads = [chunk.grads[0] * self._clipping.inverse_scale]
            if math.isfinite(gradient_norms(chunk.grads)[0]):
                for piece in chunk.pieces():
                    refresh_(piece)
        return not refresh_due(chunk)

    def _project(self, window: _Window, member: Member) -> None:
        """Add the coordinates of this micro-batch to the sum `(..., r, n)`, and free its gradient."""
        sums = [project(piece) for piece in self._chunk(member).pieces()]
        r = (sums[0] if len(sums) == 1 else torch.cat(sums)).mul_(self._clipping.inverse_scale)
        # Add 0, or NaN if the gradient is not finite: a projection may hide that, and reading a norm here would make
        # the host wait for the device.
        r.add_(torch.linalg.vector_norm(member.grad, dtype=r.dtype) * 0)
        window.sum = r if window.sum is None else window.sum.add_(r)
        member.p.grad = None
        self._clipping.partial = True

    def _chunk(self, member: Member) -> Chunk:
        """Return the chunk of a single member."""
        return next(self.optimizer.stepper.chunks([member]))

    def _complete(self, p: Tensor) -> None:
        """Use the complete gradient of p now, or keep it until enough equal matrices can be stacked."""
        self._pending.append(self._gathered(p))
        if one_by_one(self._pending) or sum(member.grad.nbytes for member in self._pending) >= limits.CHUNK_BYTES:
            self._flush()

    def _gathered(self, p: Tensor) -> Member:
        """Return p as a member, with its sum of coordinates or its whole gradient."""
        window = self._windows[p]
        if window.thin:
            return self.optimizer.table.member(p, self._groups[p], cast(Tensor, window.sum), projected=True)
        return self._member(p)

    def _flush(self) -> None:
        """Update the members whose gradients are complete, and free these gradients."""
        members, self._pending = self._pending, []
        self.optimizer.stepper.update(members, self._clipping.factor)
        for member in members:
            member.p.grad, self._windows[member.p].sum = None, None

    # -- as a mode (`engine/mode.py`) ----------------------------------------------------------------------------------

    name = "step_in_backward"
    amp_by_itself = True

    @property
    def expects_overflow(self) -> bool:
        return self.scaler is not None

    def sent(self, p: Tensor) -> None:
        """Return None: nothing is sent, because there is one process."""

    def note(self) -> str:
        """Return the remark below the table of `report()`."""
        return f"steps during backward, after {self.accumulation_steps} of them"

    # -- reports -------------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """Return a table of the gradient bytes kept between micro-batches, in windows without a refresh.

        It has one row per parameter, with the reason where the whole gradient is kept.
        """
        return gradient_report(self.optimizer.table, self.accumulation_steps, self.accumulate)

    def _ever_thin(self, p: Tensor, group: dict[str, Any]) -> bool:
        return ever_thin(self.optimizer.table, p, group, self.accumulation_steps, self.accumulate)

    def sums(self) -> Iterator[Tensor]:
        """Return the sums of coordinates, in which gradients accumulate outside `p.grad`."""
        return (window.sum for window in self._windows.values() if window.sum is not None)

    # -- optimizer.step() ----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Update the parameters that backward has left, and end the step; `optimizer.step()` calls this."""
        with self._lock:
            self._refuse_unknown_scaler()
            self._begin()
            if (
                getattr(self.optimizer, "grad_scale", self) is None
            ):  # after unscale_(), which has divided the remaining gradients
                self._clipping.inverse_scale = 1.0
            done = [p for p, window in self._windows.items() if window.count == self.accumulation_steps]
            self._refuse_late_gradients(done)
            rest = [p for p, window in self._windows.items() if window.count < self.accumulation_steps]
            # These have fewer passes than a window has, or a gradient that was set by hand. Those that no backward pass
            # reached have nothing to be updated with.
            left = [self._gathered(p) for p in rest if self._windows[p].thin or p.grad is not None]
            self.optimizer.stepper.prepare([member for member in left if not member.projected])
            if done or not self.optimizer.stepper.dry_run(left):
                self._pending += left
                self._flush()
                self.grad_norm = self._clipping.norm
                if (done or left) and not self._clipping.overflow:  # after an overflow the norm is meaningless
                    self._remember_norm()
            self._tell_scaler()
            self.forget()

    def _remember_norm(self) -> None:
        """Store the norm by which delayed clipping clips the next step."""
        if self.clip_norm is not None and self.clip == "delayed":
            self.optimizer.param_groups[0][GRAD_NORM] = self.grad_norm

    def _refuse_late_gradients(self, done: list[Tensor]) -> None:
        """Refuse gradients that were set after backward had updated their parameters."""
        waiting = {member.p for member in self._pending}
        late = [self.optimizer.table.plans[p].name for p in done if p.grad is not None and p not in waiting]
        if late:
            raise RuntimeError(
                f"{checks.few(late)} got a gradient after backward had updated it, which this step can no longer "
                "use. Drop it with optimizer.zero_grad()"
            )

    def _refuse_unknown_scaler(self) -> None:
        """Refuse a GradScaler that `step_in_backward` was not given."""
        if hasattr(self.optimizer, "grad_scale") and self.scaler is None:
            del self.optimizer.grad_scale  # the scaler sets it for the step; a later step must not find it
            raise RuntimeError(
                "scaler.step(optimizer), but step_in_backward was given no scaler, so backward has used gradients that "
                "were still scaled. Pass scaler= to it"
            )

    def _tell_scaler(self) -> None:
        """Record for the scaler whether there was an overflow; it finds no gradients that would show it."""
        if (scaler := self.scaler) is not None:
            found = torch.full((), float(self._clipping.overflow), device=scaler._device)
            scaler._per_optimizer_states[id(self.optimizer)]["found_inf_per_device"] = {found.device: found}

    def forget(self) -> None:
        """Drop all gradients gathered since the last step."""
        self._pending, self._open = [], False
        for p in self._windows:
            self._windows[p] = _Window()
