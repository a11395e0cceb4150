"""Accumulate gradients in a random subspace, for any optimizer.

Reference: Hao et al., "Flora: low-rank adapters are secretly gradient compressors", ICML 2024,
https://arxiv.org/abs/2402.03293
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from . import checks, hyperparameters
from .engine.autograd import full_precision, on_gradient
from .ops import normal, orthonormalize, stream_of
from .recipe.plan import Plan, bare_name, decide
from .recipe.weights import working_dtype
from .reports.report import Report, Row, human


@dataclass
class _Sum:
    """The gradient that one parameter has gathered in this window.

    Attributes:
        p: the parameter.
        plan: whether and how its gradient is compressed.
        name: of the parameter, without the prefixes of wrappers.
        count: number of backward passes in this window that gave it a gradient.
        buffer: the compressed sum (r, n) or (batch, r, n). None for an uncompressed one, which `p.grad` holds.
    """

    p: Tensor
    plan: Plan
    name: str
    count: int = 0
    buffer: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the buffer, (r, n) or (batch, r, n)."""
        plan = self.plan
        return (*((plan.count,) if plan.batch else ()), cast(int, plan.rank), plan.matrix[1])

    @property
    def tensor(self) -> Tensor | None:
        """The tensor that holds the sum: `buffer` or `p.grad`."""
        return self.buffer if self.plan.projected else self.p.grad


class CompressedAccumulation:
    r"""Gradient accumulation that keeps r x n numbers of an m x n gradient between micro-steps.

    G (m, n) is turned so that its shorter side m comes first. P (m, r) has entries N(0, 1/r) and is the same during one
    window, which is the time from one `restore` to the next:

        each backward():  C <- C + P^T G;  p.grad <- None         as soon as the gradient of p is complete
        restore():        p.grad <- P C;   C is freed;  the next window has another P

    E[P P^T] = I, so the restored gradient is right on average. Its mean square is 1 + (m + 1) / r times that of the
    sum. Clipping by norm sees that longer gradient: multiply the threshold by the square root of this factor, or use
    orthonormal=True.

    Vectors, matrices whose rank is not below m, and parameters with names of embeddings and heads are not compressed.
    They accumulate in `p.grad`.

    Memory: `4 r n` bytes per matrix (8 for float64). P is drawn at each use, which costs time and temporarily takes
    `4 m r` bytes. During the micro-steps, when activations take memory as well, at most one compressed matrix has a
    whole gradient at any time. From `restore` until `zero_grad` all of them have one, as the optimizer needs them.

    Args:
        params: `model.named_parameters()`, or tensors. Without names, an embedding looks like any other matrix.
            Convolutions are flattened to (out, rest); three dimensions are a stack of matrices.
        rank: r, an int, or a fraction in (0, 1] of the shorter side.
        seed: of P, which is a function of (seed, name, index of the window): equal on all ranks and devices.
        orthonormal: use a P with orthonormal columns. The restored gradient is then the projection of the sum on a
            random subspace, shorter by sqrt(r / m) on average instead of longer. It suits optimizers that do not depend
            on the length of the gradient.

    Errors:
        ValueError: an option is out of range; a parameter or a name is given twice; a tensor is no leaf; there is
            nothing to compress; or a state dict does not fit, and then nothing of it is loaded.
        RuntimeError: `restore` is called without a gradient since the last call, or a compressed parameter has an
            uncompressed gradient as well; or a gradient is sparse.

    Example::

        acc = lowrank_optim.CompressedAccumulation(model.named_parameters(), rank=0.25)
        for micro in range(8):
            (model(inputs[micro]).square().mean() / 8).backward()
        acc.restore()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    Scaled losses: a `GradScaler` must keep its scale within a window (update it after the step, as usual). A gradient
    that is not finite stays so, and after `restore` the scaler finds it, or `nonfinite` of our optimizers does.

    DistributedDataParallel: run all micro-steps within `no_sync()`, including the last one, because DDP would reduce
    `p.grad`, which is None. Compressing is linear, so reduce the gathered sums before `restore`:

        for tensor in acc.buffers():
            dist.all_reduce(tensor.div_(dist.get_world_size()))

    Differences from the paper and from its authors' code: it serves every optimizer (the code serves only its own step,
    during backward); gradients are summed unless `mean` is given; there is no filter on the ratio of the sides; the
    shorter side is projected; P is the same on every device; and there are checkpoints.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        rank: int | float = 0.25,
        *,
        seed: int = 0,
        orthonormal: bool = False,
    ) -> None:
        if rank is None:
            raise ValueError("rank must be an int or a fraction; accumulate without this class to compress nothing")
        hyperparameters.check({"rank": rank, "seed": seed, "orthonormal": orthonormal}, {})
        self.seed, self.orthonormal, self.window = seed, orthonormal, 0
        self._sums: list[_Sum] = _planned(params, {"rank": rank, "seed": seed})
        self._paused = False
        self._handles = [on_gradient(entry.p, functools.partial(self._gather, entry)) for entry in self._sums]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "CompressedAccumulation is attached to its parameters by hooks, which copy and pickle do not follow; build "
            "a new object for the new parameters, and call its load_state_dict"
        )

    # -- micro-steps ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _gather(self, entry: _Sum, _: Tensor) -> None:
        """Add the gradient of a parameter to its sum, as the hook that runs when the gradient is complete."""
        if self._paused:
            return
        if entry.plan.projected:
            grad = entry.p.grad
            if grad is None:
                raise RuntimeError(
                    f"the gradient of {entry.plan.name} is gone: another hook has taken it, or the parameter has two "
                    "hooks of CompressedAccumulation. Keep a single hook"
                )
            checks.gradient(entry.plan.name, grad)
            # C (r, n) += P^T G, with P^T (r, m) and G (m, n); batched for a stack.
            with full_precision([grad]):
                g = entry.plan.oriented(grad.detach()).to(working_dtype(entry.p))
                add = self._buffer(entry, g.device)
                (add.addmm_ if add.dim() == 2 else add.baddbmm_)(self._projection(entry, g.device).mT, g)
            entry.p.grad = None
        entry.count += 1

    def _buffer(self, entry: _Sum, device: torch.device) -> Tensor:
        """Return the buffer of a parameter on a device, a new one of zeros for the first gradient of a window."""
        dtype = working_dtype(entry.p)
        if entry.buffer is None:
            entry.buffer = torch.zeros(entry.shape, dtype=dtype, device=device)
        entry.buffer = entry.buffer.to(device, dtype)  # the model may have been moved or cast
        return entry.buffer

    def _projection(self, entry: _Sum, device: torch.device) -> Tensor:
        """Return P (m, r) or (batch, m, r) of this window."""
        *batch, rank, _ = entry.shape
        shape, stream = (*batch, entry.plan.matrix[0], rank), stream_of("accumulate", self.window)
        x = normal(shape, entry.plan.key, stream, device).to(working_dtype(entry.p))
        return orthonormalize(x) if self.orthonormal else x.mul_(rank**-0.5)

    # -- the end of a window -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self, mean: bool = False) -> None:
        """Put the gathered gradients into `p.grad`, free the buffers, and begin a window with new random matrices.

        A parameter without a gradient in this window stays as it is.

        Args:
            mean: divide each gradient, compressed or not, by the number of backward passes that reached its parameter.
                Do not use it for losses that are divided already. A parameter that is left out of a few micro-steps,
                such as an expert, is divided by a smaller number than the other parameters.
        """
        gathered = [entry for entry in self._sums if entry.count]
        if not gathered:
            raise RuntimeError(
                "restore() found no gradient since the last restore(): call it once per step, after backward()"
                + (" (the hooks were removed)" if not self._handles else "")
            )
        stray = [entry.plan.name for entry in gathered if entry.plan.projected and entry.p.grad is not None]
        if stray:
            raise RuntimeError(
                f"{checks.few(stray)} has an uncompressed gradient in addition to the gathered one; nothing was "
                "restored. Under DistributedDataParallel run every micro-step within no_sync(). After a backward "
                "within paused(), or after remove(), clear p.grad first"
            )
        for entry in gathered:
            if entry.plan.projected:
                self._restore(entry, entry.count if mean else 1)
            elif mean and entry.p.grad is not None:
                entry.p.grad.div_(entry.count)
        self.clear()
        self.window += 1

    def _restore(self, entry: _Sum, divisor: int) -> None:
        """Set `p.grad` of a compressed parameter to P C divided by `divisor`, and free its buffer."""
        with full_precision([entry.p]):
            c = self._buffer(entry, entry.p.device)
            p = self._projection(entry, c.device)
            # The product is made in the parameter's own orientation, (m, n) or (n, m), so that no copy has to turn it.
            whole = c.mT @ p.mT if entry.plan.side == "right" else p @ c
            entry.p.grad = whole.div_(divisor).reshape(entry.p.shape).to(entry.p.dtype)
        entry.buffer = None  # freed at once, so that not all buffers and all whole gradients exist together

    def clear(self) -> None:
        """Discard the sums of this window, as after a failed micro-step. `p.grad` is left to `zero_grad`."""
        for entry in self._sums:
            entry.count, entry.buffer = 0, None

    def buffers(self) -> list[Tensor]:
        """Return the sums of this window in the order of the parameters: compressed ones, and `p.grad` otherwise.

        They may be reduced in place. All ranks have equal lists if the same parameters had gradients.
        """
        return [entry.tensor for entry in self._sums if entry.count and entry.tensor is not None]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the gradients of backward passes inside the context in `p.grad`, whole and not counted.

        Clear them before the next backward pass outside.
        """
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def remove(self) -> None:
        """Remove all hooks, so that gradients accumulate in `p.grad` again. Gathered sums can still be restored."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # -- what a user sees ----------------------------------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """The number of bytes of all compressed buffers, once each parameter has had a gradient."""
        return sum(_bytes(entry) for entry in self._sums if entry.plan.projected)

    def report(self) -> Report:
        """Return a table with a row per parameter: the bytes kept between micro-steps, or why it is not compressed."""
        return _AccumulationReport(
            Row(
                name=entry.plan.name,
                shape=entry.plan.shape,
                method="compressed" if entry.plan.projected else "whole",
                rank=entry.plan.rank,
                side=entry.plan.side,
                state_bytes=_bytes(entry),
                full_bytes=entry.p.numel() * entry.p.element_size(),
                skipped=0,
                reason=entry.plan.reason + (" (fallback)" if entry.plan.fallback else ""),
            )
            for entry in self._sums
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and numbers from which a window continues bit for bit: the tensors in use, not copies.

        Take it between micro-steps, or after the optimizer's step: it does not contain restored gradients.
        """
        sums = {
            entry.name: {
                "count": entry.count,
                "shape": entry.plan.shape,
                "rank": entry.plan.rank,
                "sum": entry.tensor.detach(),
            }
            for entry in self._sums
            if entry.count and entry.tensor is not None
        }
        return {"seed": self.seed, "orthonormal": self.orthonormal, "window": self.window, "sums": sums}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, or raise a ValueError and change nothing.

        It sets `p.grad` of all parameters: to the sum of an uncompressed parameter, else to None.
        """
        expected = self.state_dict()
        if not isinstance(state_dict, Mapping) or state_dict.keys() != expected.keys():
            keys = list(state_dict) if isinstance(state_dict, Mapping) else state_dict
            raise _misfit(f"expected the keys {list(expected)}, got {keys!r:.80}")
        for key in ("seed", "orthonormal"):
            if state_dict[key] != expected[key]:
                raise _misfit(
                    f"it has {key}={state_dict[key]!r}, this object has {key}={expected[key]!r}; build it with the "
                    "same value"
                )
        if not isinstance(state_dict["window"], int) or state_dict["window"] < 0:
            raise _misfit(f"window must be an int >= 0, got {state_dict['window']!r}")
        saved = dict(state_dict["sums"])
        unknown = [name for name in saved if name not in {entry.name for entry in self._sums}]
        if unknown:
            raise _misfit(f"no parameter here is called {checks.few(unknown)}")
        # Everything is checked and copied before the first change.
        tensors = [_loaded(entry, saved[entry.name]) if entry.name in saved else None for entry in self._sums]
        self.clear()
        self.window = state_dict["window"]
        for entry, tensor in zip(self._sums, tensors, strict=True):
            entry.count = saved[entry.name]["count"] if tensor is not None else 0
            entry.buffer, entry.p.grad = (tensor, None) if entry.plan.projected else (None, tensor)


class _AccumulationReport(Report):
    """A report whose last line compares compressed with whole gradients."""

    @property
    def summary(self) -> str:
        """The last line of the table."""
        kept, whole = sum(row.state_bytes for row in self), sum(row.full_bytes for row in self)
        compressed = sum(row.rank is not None for row in self)
        line = f"{compressed} of {len(self)} gradients compressed; between micro-steps {human(kept)}"
        return line + f", {kept / max(whole, 1):.2f} of the {human(whole)} of whole gradients"


def _planned(params: Iterable[Any], options: dict[str, Any]) -> list[_Sum]:
    """Return an empty sum for each parameter, after checking all of them; `options` are rank and seed."""
    group = {**options, "proj_type": "std", "as_matrix": "auto", "skip_embeddings": True}
    sums: list[_Sum] = []
    for index, entry in enumerate(params):
        name, p = entry if isinstance(entry, tuple) else ("", entry)
        if not isinstance(p, Tensor):
            raise TypeError(f"params must be tensors or (name, tensor) pairs, got {type(p).__name__}")
        plan = decide(name, index, 0, p.shape, group, True)
        checks.parameter(plan.name, p)
        checks.whole(plan.name, p, "compressed accumulation")
        if not p.is_leaf:
            raise ValueError(f"{plan.name} is no leaf: only parameters keep gradients. Pass model.named_parameters()")
        sums.append(_Sum(p, plan, bare_name(plan.name)))
    _given_once("parameter", [(id(record.p), record) for record in sums])
    _given_once("name", [(record.name, record) for record in sums])
    if not any(record.plan.projected for record in sums):
        shown = "".join(f"\n  {record.plan.name}: {record.plan.reason}" for record in sums[:5])
        raise ValueError(f"nothing to compress:{shown}\nLower rank, pass matrices, or accumulate without this class")
    return sums


def _given_once(what: str, sums: list[tuple[int | str, _Sum]]) -> None:
    """Raise a ValueError for a key that occurs twice; `what` names the kind of key."""
    seen = set()
    for key, entry in sums:
        if key in seen:
            raise ValueError(f"a {what} was given twice: {entry.plan.name}. Pass model.named_parameters(), once")
        seen.add(key)


def _loaded(entry: _Sum, saved: Mapping[str, Any]) -> Tensor:
    """Return a copy of a saved sum, on the parameter's device and in the dtype of its sum; raise if it does not fit."""
    shape = entry.shape if entry.plan.projected else entry.plan.shape
    saved = saved if isinstance(saved, Mapping) else {}
    tensor, count = saved.get("sum"), saved.get("count")
    whole = isinstance(tensor, Tensor) and isinstance(count, int) and count > 0
    got = tuple(saved.get("shape", ())), saved.get("rank"), tuple(tensor.shape) if isinstance(tensor, Tensor) else None
    if not whole or got != (entry.plan.shape, entry.plan.rank, shape):
        wanted = f"{entry.plan.shape} at rank {entry.plan.rank} with a sum {shape}"
        raise _misfit(f"{entry.name} is {wanted} here, was {got[0]} at rank {got[1]} with a sum {got[2]} of {count}")
    dtype = working_dtype(entry.p) if entry.plan.projected else entry.p.dtype
    return cast(Tensor, tensor).detach().to(entry.p.device, dtype, copy=True)


def _misfit(what: str) -> ValueError:
    """Return the error for a state dict that does not fit for the reason `what`."""
    return ValueError(f"the state dict does not fit: {what}; nothing was loaded")


def _bytes(entry: _Sum) -> int:
    """Return the number of bytes that are kept of a parameter's gradient between micro-steps."""
    if not entry.plan.projected:
        return entry.p.numel() * entry.p.element_size()
    return entry.plan.count * entry.shape[-2] * entry.shape[-1] * working_dtype(entry.p).itemsize
