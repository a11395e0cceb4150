"""A hook with which DistributedDataParallel averages coordinates: between refreshes, R is sent in place of G."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ..distributed.common import agree
from ..distributed.lockstep import Peers
from ..distributed.shards import Meter
from ..engine.autograd import full_precision
from ..engine.chunk import Chunk
from ..engine.gradients import gradient_norms
from ..engine.grouping import Recipes
from ..engine.member import Member
from ..engine.refresh import refresh_due
from ..engine.update import project
from ..optimizer import LowRankOptimizer
from . import ddp_checks
from .clipping import Clipping

_Flat = tuple[Tensor, list[Tensor]]  # a tensor that is sent, and the tensors it is a copy of; none for a whole bucket


def ddp_project(
    model: DistributedDataParallel,
    optimizer: LowRankOptimizer,
    *,
    clip_norm: float | None = None,
    clip: Literal["global", "tensor"] = "global",
) -> DDPProject:
    r"""Make DistributedDataParallel send r x n numbers of a matrix instead of its m x n gradient.

    For methods that read only `R = P^T G` of a gradient (GaLore, GaLoreAdafactor, QGaLore, GoLore), in each bucket:

        matrices that are not due:    R_k = P^T G_k;  R = mean of R_k over ranks       r n numbers
        matrices due for a refresh, and parameters that are not projected:  mean of G_k, as usual

    R is linear in G, so this is the same step to rounding, unlike compression with an error. R is sent together with
    the rest of the bucket, and goes to the optimizer; the training loop does not change. With staggered refreshes, only
    the few matrices that are due are sent whole.

    `p.grad` of a matrix whose R was sent is None after backward, because no rank has its averaged gradient. So code
    that reads `p.grad` does not see these matrices. `torch.nn.utils.clip_grad_norm_` would clip only the remaining
    parameters: pass `clip_norm` here instead. To drop gradients, call `optimizer.zero_grad()`, because
    `model.zero_grad()` only clears `p.grad`.

    Gradients accumulate as usual, within `no_sync()` or by several backward passes. R is kept and sent in float32
    (float64 for float64 weights), also where weights are bfloat16.

    Args:
        model: the result of DistributedDataParallel, with any bucket size, with or without `gradient_as_bucket_view`.
        optimizer: built from the parameters of this model or of the wrapped model.
        clip_norm: the largest norm; None: no clipping.
        clip: "global" clips all gradients by their global norm, "tensor" each gradient by its own. The norm of a matrix
            is that of R, and that of G at refreshes. With orthonormal P the norm of R is at most that of G, so a
            threshold that was chosen for whole gradients clips less here.

    Returns:
        A handle, with the gradient norm of the last step. DDP cannot remove a hook, so the handle has no `remove()`.

    Errors:
        TypeError: the model or the optimizer is of another kind.
        ValueError: the method needs whole gradients (Fira, APOLLO, Flora, error feedback, ...); the reason is given.
        NotImplementedError: find_unused_parameters, static_graph, another hook, or capturable is in use.
        RuntimeError: ranks do not have the same parameters, or a GradScaler calls the step.

    Example::

        model = DistributedDataParallel(model)
        optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), lr=1e-3, rank=128)
        lowrank_optim.ddp_project(model, optimizer, clip_norm=1.0)
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(optimizer.report())  # what each parameter has sent per step, and in steps with a refresh
    """
    return DDPProject(model, optimizer, clip_norm, clip)


class DDPProject:
    """The handle that `ddp_project` returns. Only this function makes it.

    Attributes:
        grad_norm: the norm of all finite gradients of the last step, before clipping; of R where R was sent. None
            before the first step.
        meters: the bytes that each parameter has handed to collectives.
    """

    def __init__(
        self, model: DistributedDataParallel, optimizer: LowRankOptimizer, clip_norm: float | None, clip: str
    ) -> None:
        ddp_checks.everything(model, optimizer, {"clip_norm": clip_norm, "clip": clip})
        self.model, self.optimizer, self.clip_norm, self.clip = model, optimizer, clip_norm, clip
        self.grad_norm: float | None = None
        self.group: Any = model.process_group
        self.meters: dict[Tensor, Meter] = {p: Meter() for p in model.parameters()}
        self._sums: dict[Tensor, Tensor] = {}  # R (..., r, n) since the last step, averaged over ranks
        plans = optimizer.table.plans
        agree(plans.values(), Peers(self.group, str(next(iter(plans)).device)))
        model.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))  # DDP does not read quoted annotations
        optimizer.mode = self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("ddp_project is bound to a model by a communication hook, which copy and pickle do not follow")

    # -- as a mode (`engine/mode.py`) ----------------------------------------------------------------------------------

    name = "ddp_project"
    amp_by_itself = True
    expects_overflow = False

    def attach(self, group: dict[str, Any]) -> None:
        """Serve a param group that was added: DDP's hook sees its parameters already."""

    def sent(self, p: Tensor) -> tuple[float | None, float | None] | None:
        """Return the bytes sent for a parameter per step, and per step with a refresh."""
        return self.meters[p].sent if p in self.meters else None

    def note(self) -> str:
        """Return the remark below the table of `report()`."""
        return "gradients are sent projected between refreshes"

    # -- during backward -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Average one bucket of complete gradients over ranks; this is DDP's communication hook."""
        ddp_checks.not_joined(self.model)
        grads = dict(zip(bucket.parameters(), bucket.gradients(), strict=True))
        thin, due = self._projected(grads)
        self._note(grads, thin, due)
        if thin:
            sent = _flattened([thin.get(p, g) for p, g in grads.items()])
            # The callback keeps the sent tensors alive until backward ends. Until then `_take` may use them on a stream
            # that the allocator does not wait for, and freed memory could be reused too early.
            _at_the_end_of_backward(functools.partial(_forget_gradients, list(thin), (sent, thin)))
        else:
            sent = [(bucket.buffer(), [])]
        work = [dist.all_reduce(flat.div_(self.group.size()), group=self.group, async_op=True) for flat, _ in sent]
        futures: list[Future[Any]] = [handle.get_future() for handle in work]
        *earlier, last = futures
        return last.then(functools.partial(self._take, bucket, sent, thin, earlier))

    def _projected(self, grads: dict[Tensor, Tensor]) -> tuple[dict[Tensor, Tensor], set[Tensor]]:
        """Return R of each matrix that is sent projected in this step, and the matrices whose refresh is due.

        Both are matrices of thin recipes; those that are due are sent whole.
        """
        thin, due, table = dict[Tensor, Tensor](), set[Tensor](), self.optimizer.table
        recipes = Recipes(table.recipe)
        with full_precision(grads):
            for p, group in table.members():
                if p in grads and table.states.get(p) and recipes.of(table.plans[p], group).thin:
                    chunk = next(self.optimizer.stepper.chunks([table.member(p, group, grads[p])], recipes))
                    if refresh_due(chunk):
                        due.add(p)
                    else:
                        thin[p] = _coordinates(chunk, grads[p])
        return thin, due

    def _note(self, grads: dict[Tensor, Tensor], thin: dict[Tensor, Tensor], due: set[Tensor]) -> None:
        """Add the bytes of a bucket to the meters."""
        for p, g in grads.items():
            meter = self.meters[p]
            if p in due:
                meter.refreshes, meter.refreshing = meter.refreshes + 1, meter.refreshing + g.nbytes
            else:
                meter.steps, meter.between = meter.steps + 1, meter.between + thin.get(p, g).nbytes

    @torch.no_grad()
    def _take(
        self,
        bucket: dist.GradBucket,
        sent: list[_Flat],
        thin: dict[Tensor, Tensor],
        earlier: list[Future[Any]],
        last: Future[Any],
    ) -> Tensor:
        """Copy averaged gradients back into the bucket, and add averaged coordinates to the sums.

        On GPUs a future is complete once its all-reduce is queued. This callback runs on a stream of its own. `wait`
        makes that stream wait for the all-reduce, without blocking the host or the rest of backward. The stream of a
        callback of `collect_all` would wait for nothing.
        """
        for future in (*earlier, last):
            future.wait()  # raises an error of the collective
        for flat, places in sent:
            sizes = [place.numel() for place in places]
            for place, x in zip(places, torch.split(flat, sizes) if places else (), strict=True):
                place.copy_(x.view_as(place))
        for p, r in thin.items():
            self._sums[p] = self._sums[p].add_(r) if p in self._sums else r
        return bucket.buffer()

    # -- optimizer.step() ----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Update all parameters with the averaged gradients and coordinates; `optimizer.step()` calls this."""
        optimizer = self.optimizer
        ddp_checks.no_grad_scaler(optimizer)
        ddp_checks.no_second_gradient([optimizer.table.plans[p].name for p in self._sums if p.grad is not None])
        optimizer.table.recheck()
        members = list(self._gathered())
        optimizer.stepper.prepare([member for member in members if not member.projected])
        if not optimizer.stepper.dry_run(members):
            clipping = self._clipping(members)
            optimizer.stepper.update(members, clipping.factor)
            self.grad_norm = clipping.norm
        self.forget()

    def _gathered(self) -> Iterator[Member]:
        """Yield the members of the step, with coordinates or with whole gradients."""
        table = self.optimizer.table
        for p, group in table.members():
            if p in self._sums:
                yield table.member(p, group, self._sums[p], projected=True)
            elif p.grad is not None:
                yield table.member(p, group, p.grad)

    def _clipping(self, members: Sequence[Member]) -> Clipping:
        """Return the clipping of the step, for which "global" needs the norms of all gradients beforehand."""
        if self.clip_norm is None or self.clip == "tensor":
            return Clipping(self.clip_norm)
        before = Clipping()
        for member, norm in zip(members, gradient_norms([member.grad for member in members]), strict=True):
            before.factor(member, norm)
        return Clipping(self.clip_norm, before.norm)

    def forget(self) -> None:
        """Drop the coordinates gathered since the last step."""
        self._sums = {}


def _coordinates(chunk: Chunk, grad: Tensor) -> Tensor:
    """Return R (..., r, n) of one parameter; NaN if its gradient is not finite, which a projection may hide."""
    pieces = [project(piece) for piece in chunk.pieces()]
    r = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return r.add_(torch.linalg.vector_norm(grad, dtype=r.dtype) * 0)


def _flattened(tensors: list[Tensor]) -> list[_Flat]:
    """Return one flat copy per dtype, each with the tensors that it holds, in order."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for x in tensors:
        kinds.setdefault(x.dtype, []).append(x)
    return [(torch.cat([x.reshape(-1) for x in same]), same) for same in kinds.values()]


def _at_the_end_of_backward(call: Any) -> None:
    """Call a function when backward ends, after DDP's own final callback.

    DDP may queue that callback later than this one, so the call is queued again when backward ends.
    """
    engine = torch.autograd.Variable._execution_engine
    engine.queue_callback(lambda: engine.queue_callback(call))


def _forget_gradients(params: list[Tensor], _: object) -> None:
    """Drop the gradients that DDP leaves in `p.grad`, which are this rank's own, not averaged.

    All streams have been waited for by now, so the second argument, which kept tensors alive, may go.
    """
    for p in params:
        p.grad = None
