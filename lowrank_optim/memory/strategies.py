"""The bytes that one of several processes holds and sends, per strategy of `estimate_memory`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from .. import checks, hyperparameters
from ..modes import ddp_checks
from ..optimizer import LowRankOptimizer
from . import planned, planned_zero

Strategy = Literal["ddp", "ddp_project", "fsdp2", "zero1", "zero2", "zero3"]
STRATEGIES = get_args(Strategy)
ZERO = ("zero1", "zero2", "zero3")
_MASTER = 4  # bytes of an element in float32
Changes = dict[str, float | None]  # new values of fields of a MemoryEstimate


def check(strategy: str | None, world_size: int, whole_only: str, step_in_backward: bool) -> None:
    """Refuse strategies that do not exist or cannot be estimated.

    Args:
        whole_only: the name of a method whose parameters every process must have whole, or "".
    """
    hyperparameters.check({"world_size": world_size}, {})
    if strategy is None:
        if world_size > 1:
            raise ValueError(f"world_size={world_size} needs a strategy: one of {', '.join(STRATEGIES)}")
        return
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
    if whole_only and strategy != "ddp":
        raise NotImplementedError(f"{whole_only} with strategy={strategy!r} is not estimated; take 'ddp'")
    if step_in_backward:
        raise NotImplementedError("step_in_backward is for one process; leave strategy out")


def bare(groups: Sequence[dict[str, Any]], strategy: str | None) -> None:
    """Refuse a strategy for a model that is sharded already, because its DTensors say how it is shared."""
    names = [name for group in groups for name, p in group["params"] if hasattr(p, "device_mesh")]
    if strategy is not None and names:
        raise ValueError(
            f"{checks.few(names)} is a DTensor, which says how it is shared; strategy={strategy!r} is for bare models. "
            "Leave strategy out, which estimates the shards of this process"
        )


def averaged(params: Sequence[Tensor]) -> Changes:
    """Return the traffic under DistributedDataParallel, which sends every gradient in every step."""
    return {"sent_per_step": sum(p.nbytes for p in params if p.requires_grad)}


def projected(optimizer: LowRankOptimizer) -> Changes:
    """Return the traffic with `ddp_project`, after refusing methods that need whole gradients."""
    ddp_checks.something_thin(optimizer)
    return _sent(planned.projected_traffic(optimizer))


def sharded(optimizer: LowRankOptimizer, world_size: int) -> tuple[int, Changes]:
    """Lay out an optimizer as `fully_shard` would; return the bytes of its shards on rank 0, and its traffic."""
    planned.lay_out(optimizer, world_size)
    shards = sum(optimizer.table.layouts[p].here(p).nbytes for p, _ in optimizer.table.members())
    return shards, sent(optimizer)


def rank_by_rank(optimizer: LowRankOptimizer, strategy: str, world_size: int) -> Iterator[None]:
    """Lay out an optimizer as DeepSpeed would, for one rank after the other, raising what the run would raise."""
    return planned_zero.rank_by_rank(optimizer, _stage(strategy), world_size)


def sent(optimizer: LowRankOptimizer) -> Changes:
    """Return the traffic of the rank that the optimizer is laid out for."""
    return _sent(planned.traffic(optimizer))


def partitions(params: Sequence[Tensor], strategy: str, world_size: int) -> Changes:
    """Return the bytes of weights, gradients and masters on one rank under DeepSpeed."""
    size, stage = sum(p.nbytes for p in params), _stage(strategy)
    part, masters = -(-size // world_size), _MASTER * -(-sum(p.numel() for p in params) // world_size)
    weights, gradients = part if stage == 3 else size, size if stage == 1 else part
    return {"weights": weights, "gradients": gradients, "masters": masters}


def _stage(strategy: str) -> int:
    return int(strategy.removeprefix("zero"))


def _sent(sent: planned.Sent) -> Changes:
    return {"sent_per_step": sent.per_step, "sent_per_refresh": sent.per_refresh}
