"""Gradients accumulated in a random subspace, for any optimizer. Hao et al., "Flora: low-rank adapters are secretly
gradient compressors", ICML 2024, https://arxiv.org/abs/2402.03293"""

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
    """What one parameter has gathered in this window: in `buffer` if it is compressed, in `p.grad` if it is not."""

    p: Tensor
    plan: Plan
    name: str  # without wrappers
    count: int = 0
    buffer: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the buffer."""
        plan = self.plan
        return (*((plan.count,) if plan.batch else ()), cast(int, plan.rank), plan.matrix[1])

    @property
    def tensor(self) -> Tensor | None:
        return self.buffer if self.plan.projected else self.p.grad


class CompressedAccumulation:
    r"""Gradient accumulation that keeps r x n numbers of an m x n gradient between micro-steps.

    With G turned so that its shorter side m comes first, P (m, r) of entries N(0, 1/r), the same for one window:

        each backward():  C <- C + P^T G;  p.grad <- None         as soon as the gradient of p is complete
        restore():        p.grad <- P C;   C is freed;  the next window has another P

    E[P P^T] = I, so the restored gradient is right on average; its mean square is 1 + (m + 1) / r times that of the
    sum. Clipping by norm sees that length: raise its threshold by the root of it, or use orthonormal=True.

    Vectors, matrices whose rank is not below m, and by their names embeddings and heads, accumulate in `p.grad`.

    Memory: `4 r n` bytes per matrix (8 for float64). P is drawn at each use, which costs time and holds `4 m r` bytes
    for a moment. During the micro-steps, when activations live too, compressed matrices have no two whole gradients at
    once. From `restore` until `zero_grad` all have theirs, as the optimizer needs them.

    Args:
        params: `model.named_parameters()`, or tensors; without names nobody can tell an embedding from a matrix.
            Convolutions are flattened to (out, rest), three dimensions are a stack of matrices.
        rank: r, an int, or a fraction in (0, 1] of the shorter side.
        seed: of P, a function of (seed, name, number of the window): equal on all ranks and devices.
        orthonormal: P with orthonormal columns instead: the restored gradient is the sum's projection on a random
            subspace, shorter by sqrt(r / m) on average instead of longer. For optimizers that do not mind the length.

    Errors:
        ValueError: an option out of range; a parameter or a name given twice; a tensor that is no leaf; nothing to
            compress; a state dict that does not fit, of which then nothing is loaded.
        RuntimeError: `restore` without a gradient since the last one, or beside an uncompressed gradient; a sparse
            gradient.

    Example::

        acc = lowrank_optim.CompressedAccumulation(model.named_parameters(), rank=0.25)
        for micro in range(8):
            (model(inputs[micro]).square().mean() / 8).backward()
        acc.restore()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    Scaled losses: a `GradScaler` must keep its scale within a window (update it after the step, as usual); what is not
    finite stays so, and is found by it, or by `nonfinite` of our optimizers, after `restore`.

    DistributedDataParallel: run all micro-steps within `no_sync()`, the last one too, because DDP would reduce p.grad,
    which is gone. Compressing is linear, so reduce what was gathered, before `restore`:

        for tensor in acc.buffers():
            dist.all_reduce(tensor.div_(dist.get_world_size()))

    Differences from the paper and from its authors' code: for every optimizer (the code: only its own step, during
    backward); the sum, unless `mean` is asked for; no filter on the ratio of the sides; the shorter side is projected;
    P is the same on every device; checkpoints.
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
        self._handles = [on_gradient(one.p, functools.partial(self._gather, one)) for one in self._sums]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "CompressedAccumulation hangs on its parameters by hooks, which copy and pickle do not follow; build a "
            "new one for the new parameters, and load_state_dict"
        )

    # -- micro-steps ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _gather(self, one: _Sum, _: Tensor) -> None:
        """The gradient of one parameter is complete."""
        if self._paused:
            return
        if one.plan.projected:
            grad = one.p.grad
            if grad is None:
                raise RuntimeError(
                    f"the gradient of {one.plan.name} is gone; is another hook at work, or this one twice?"
                )
            checks.gradient(one.plan.name, grad)
            with full_precision([grad]):
                g = one.plan.oriented(grad.detach()).to(working_dtype(one.p))
                add = self._buffer(one, g.device)
                (add.addmm_ if add.dim() == 2 else add.baddbmm_)(self._projection(one, g.device).mT, g)
            one.p.grad = None
        one.count += 1

    def _buffer(self, one: _Sum, device: torch.device) -> Tensor:
        dtype = working_dtype(one.p)
        if one.buffer is None:
            one.buffer = torch.zeros(one.shape, dtype=dtype, device=device)
        one.buffer = one.buffer.to(device, dtype)  # the model may have been moved or cast
        return one.buffer

    def _projection(self, one: _Sum, device: torch.device) -> Tensor:
        """P of this window."""
        *batch, rank, _ = one.shape
        shape, stream = (*batch, one.plan.matrix[0], rank), stream_of("accumulate", self.window)
        x = normal(shape, one.plan.key, stream, device).to(working_dtype(one.p))
        return orthonormalize(x) if self.orthonormal else x.mul_(rank**-0.5)

    # -- the end of a window -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self, mean: bool = False) -> None:
        """Puts the gathered gradients into `p.grad`, frees the buffers, and goes on to the next random matrices.

        A parameter without a gradient in this window is left alone.

        Args:
            mean: divides each gradient, compressed or not, by the number of backward passes that reached its
                parameter. Not for losses that are already divided. A parameter that some micro-steps leave out, such as
                an expert, is then divided by less than the others.
        """
        gathered = [one for one in self._sums if one.count]
        if not gathered:
            raise RuntimeError(
                "restore() found no gradient since the last restore(): call it once per step, after backward()"
                + (" (the hooks were removed)" if not self._handles else "")
            )
        stray = [one.plan.name for one in gathered if one.plan.projected and one.p.grad is not None]
        if stray:
            raise RuntimeError(
                f"{checks.few(stray)} has an uncompressed gradient beside the gathered one; nothing was restored. "
                "Under DistributedDataParallel run every micro-step within no_sync(); what a backward within paused() "
                "or after remove() leaves in p.grad must be cleared before"
            )
        for one in gathered:
            if one.plan.projected:
                self._restore(one, one.count if mean else 1)
            elif mean and one.p.grad is not None:
                one.p.grad.div_(one.count)
        self.clear()
        self.window += 1

    def _restore(self, one: _Sum, divisor: int) -> None:
        with full_precision([one.p]):
            c = self._buffer(one, one.p.device)
            p = self._projection(one, c.device)
            # the product comes in the parameter's own layout, so that no copy has to turn it
            whole = c.mT @ p.mT if one.plan.side == "right" else p @ c
            one.p.grad = whole.div_(divisor).reshape(one.p.shape).to(one.p.dtype)
        one.buffer = None  # one after the other: buffers and whole gradients need not all fit together

    def clear(self) -> None:
        """Forgets what this window has gathered, as after a failed micro-step. `p.grad` is left to `zero_grad`."""
        for one in self._sums:
            one.count, one.buffer = 0, None

    def buffers(self) -> list[Tensor]:
        """What this window has gathered, in the order of the parameters: compressed sums, and `p.grad` of the others.

        To be reduced in place; all ranks have equal lists if the same parameters had gradients.
        """
        return [one.tensor for one in self._sums if one.count and one.tensor is not None]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, backward leaves gradients in `p.grad`, whole and not counted: take them away before the next."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def remove(self) -> None:
        """Detaches all hooks for good; gradients accumulate as ever. What was gathered can still be restored."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # -- what a user sees ----------------------------------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """Of all buffers of compressed matrices, once each has had a gradient."""
        return sum(_bytes(one) for one in self._sums if one.plan.projected)

    def report(self) -> Report:
        """One row per parameter: what is kept of its gradient between micro-steps, or why that is all of it."""
        return _AccumulationReport(
            Row(
                name=one.plan.name,
                shape=one.plan.shape,
                method="compressed" if one.plan.projected else "whole",
                rank=one.plan.rank,
                side=one.plan.side,
                state_bytes=_bytes(one),
                full_bytes=one.p.numel() * one.p.element_size(),
                skipped=0,
                reason=one.plan.reason + (" (fallback)" if one.plan.fallback else ""),
            )
            for one in self._sums
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers from which a window continues bit for bit; it holds the tensors in use, not copies.

        To be taken between micro-steps, or after the optimizer's step: a restored gradient is no longer part of it.
        """
        sums = {
            one.name: {"count": one.count, "shape": one.plan.shape, "rank": one.plan.rank, "sum": one.tensor.detach()}
            for one in self._sums
            if one.count and one.tensor is not None
        }
        return {"seed": self.seed, "orthonormal": self.orthonormal, "window": self.window, "sums": sums}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken, or raises a ValueError and leaves everything as it was.

        Sets `p.grad` of all parameters: to the gradients that were accumulating in them, or to None.
        """
        expected = self.state_dict()
        if not isinstance(state_dict, Mapping) or state_dict.keys() != expected.keys():
            keys = list(state_dict) if isinstance(state_dict, Mapping) else state_dict
            raise _misfit(f"expected the keys {list(expected)}, got {keys!r:.80}")
        for key in ("seed", "orthonormal"):
            if state_dict[key] != expected[key]:
                raise _misfit(f"it has {key}={state_dict[key]!r}, this object {key}={expected[key]!r}; build it alike")
        if not isinstance(state_dict["window"], int) or state_dict["window"] < 0:
            raise _misfit(f"window must be an int >= 0, got {state_dict['window']!r}")
        saved = dict(state_dict["sums"])
        unknown = [name for name in saved if name not in {one.name for one in self._sums}]
        if unknown:
            raise _misfit(f"no parameter here is called {checks.few(unknown)}")
        tensors = [_loaded(one, saved[one.name]) if one.name in saved else None for one in self._sums]
        self.clear()
        self.window = state_dict["window"]
        for one, tensor in zip(self._sums, tensors, strict=True):
            one.count = saved[one.name]["count"] if tensor is not None else 0
            one.buffer, one.p.grad = (tensor, None) if one.plan.projected else (None, tensor)


class _AccumulationReport(Report):
    @property
    def summary(self) -> str:
        kept, whole = sum(row.state_bytes for row in self), sum(row.full_bytes for row in self)
        compressed = sum(row.rank is not None for row in self)
        line = f"{compressed} of {len(self)} gradients compressed; between micro-steps {human(kept)}"
        return line + f", {kept / max(whole, 1):.2f} of the {human(whole)} of whole gradients"


def _planned(params: Iterable[Any], options: dict[str, Any]) -> list[_Sum]:
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
    _given_once("parameter", [(id(one.p), one) for one in sums])
    _given_once("name", [(one.name, one) for one in sums])
    if not any(one.plan.projected for one in sums):
        shown = "".join(f"\n  {one.plan.name}: {one.plan.reason}" for one in sums[:5])
        raise ValueError(f"nothing to compress:{shown}\nLower rank, pass matrices, or accumulate without this class")
    return sums


def _given_once(what: str, sums: list[tuple[int | str, _Sum]]) -> None:
    seen = set()
    for key, one in sums:
        if key in seen:
            raise ValueError(f"a {what} was given twice: {one.plan.name}. Pass model.named_parameters(), once")
        seen.add(key)


def _loaded(one: _Sum, saved: Mapping[str, Any]) -> Tensor:
    """A copy of a saved sum, where and as this parameter needs it."""
    shape = one.shape if one.plan.projected else one.plan.shape
    saved = saved if isinstance(saved, Mapping) else {}
    tensor, count = saved.get("sum"), saved.get("count")
    whole = isinstance(tensor, Tensor) and isinstance(count, int) and count > 0
    got = tuple(saved.get("shape", ())), saved.get("rank"), tuple(tensor.shape) if isinstance(tensor, Tensor) else None
    if not whole or got != (one.plan.shape, one.plan.rank, shape):
        wanted = f"{one.plan.shape} at rank {one.plan.rank} with a sum {shape}"
        raise _misfit(f"{one.name} is {wanted} here, was {got[0]} at rank {got[1]} with a sum {got[2]} of {count}")
    dtype = working_dtype(one.p) if one.plan.projected else one.p.dtype
    return cast(Tensor, tensor).detach().to(one.p.device, dtype, copy=True)


def _misfit(what: str) -> ValueError:
    return ValueError(f"the state dict does not fit: {what}; nothing was loaded")


def _bytes(one: _Sum) -> int:
    """Kept between micro-steps."""
    if not one.plan.projected:
        return one.p.numel() * one.p.element_size()
    return one.plan.count * one.shape[-2] * one.shape[-1] * working_dtype(one.p).itemsize
