"""Find where DeepSpeed stores the elements of a parameter, from the attributes that it sets. It imports no DeepSpeed.

ZeRO gives a client optimizer one flat float32 tensor per group (stages 1, 2 and BF16_Optimizer) or per sub-group (stage
3). A flat tensor holds a contiguous range of each of several parameters. The attributes are those of DeepSpeed 0.16.9
to 0.19.8.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks as shard_checks


class Range(NamedTuple):
    """The elements `start` to `start + length` of a parameter, row-major, which begin at `offset` of a flat tensor."""

    param: Tensor
    start: int
    length: int
    offset: int
    group: Any  # the process group that shares the parameter


def ranges(method: str, flat: Tensor, params: Sequence[Tensor], group: Mapping[str, Any]) -> list[Range]:
    """Return the range that a flat tensor holds of each parameter of its group, in an order that all ranks share.

    A parameter of which the flat tensor holds nothing has a range of length 0.

    Args:
        method: name of the optimizer, for messages.
        flat: the tensor that DeepSpeed has put in the place of parameters.
        params: the parameters that the group was made of.
        group: the param group, with the keys that DeepSpeed adds to it.

    Raises:
        NotImplementedError: the tensor is not DeepSpeed's, or DeepSpeed runs with an unsupported feature.
        RuntimeError: the attributes differ from those of the supported versions, or contradict each other.
    """
    # Stage 3 sets the first attribute on its parameters, the other stages the second one.
    known = [cast(Any, p) for p in params if hasattr(p, "_z3_optimizer") or hasattr(p, "_hp_mapping")]
    shard_checks.flat(method, flat.shape, bool(known))
    with _known_attributes():
        _refuse(params, group)
        if hasattr(known[0], "_z3_optimizer"):
            return list(_of_stage_3(known[0]._z3_optimizer, flat))
        return list(_of_stage_1_and_2(known))


def later(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the flat tensors that a group of stage 3 will get; an empty list for other stages.

    Stage 3 gives them to the optimizer one at a time, during its step. The other stages give theirs at construction.
    """
    zero = next((cast(Any, p)._z3_optimizer for p in params if hasattr(p, "_z3_optimizer")), None)
    if zero is None:
        return []
    # A group may have several sub-groups, each with a flat tensor. The lists that say so are in equal order.
    own = {id(p) for p in params}
    with _known_attributes():
        groups = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        return [flat for flat, members in groups if any(id(p) in own for p in members)]


@contextmanager
def _known_attributes() -> Iterator[None]:
    """Turn an AttributeError inside the context into a RuntimeError that names the supported versions."""
    try:
        yield
    except AttributeError as error:
        version = getattr(sys.modules.get("deepspeed"), "__version__", "(of an unknown version)")
        raise RuntimeError(
            f"DeepSpeed {version} changed an attribute that says what its flat tensors hold ({error}). Supported are "
            "0.16.9 to 0.19.x: pin one of these versions, or use stage 0"
        ) from error


def verify(flat: Tensor, found: Sequence[Range]) -> None:
    """Compare a flat tensor with the parameters; raise a RuntimeError if it does not hold the given ranges of them."""
    for entry in found:
        # The flat tensor holds float32 copies of the weights. Stage 3 has partitioned the weight as well, and keeps
        # the local range in `ds_tensor`.
        shard = getattr(entry.param, "ds_tensor", None)
        whole, start = (entry.param, entry.start) if shard is None else (shard, 0)
        own = whole.detach().reshape(-1)[start : start + entry.length].to(flat.device)
        copy = flat.detach()[entry.offset : entry.offset + entry.length].to(own.dtype)
        shard_checks.master_weights(torch.equal(copy, own))


def partition(p: Tensor) -> tuple[int, int]:
    """Return (start, length) of the local range of a parameter under stage 3, which `ds_tensor` holds.

    A frozen parameter has one, too.
    """
    # All ranks have ranges of equal size, and the last ones are padded beyond the end of the parameter.
    param = cast(Any, p)
    size = param.partition_numel()
    start = min(dist.get_rank(_peers_of(param)) * size, param.ds_numel)
    return start, min(size, param.ds_numel - start)


def _peers_of(param: Any) -> Any:
    """Return the process group over which stage 3 partitions a parameter."""
    zero = getattr(param, "_z3_optimizer", None)
    return getattr(param, "ds_process_group", getattr(zero, "dp_process_group", None)) or dist.group.WORLD


def _of_stage_1_and_2(params: Sequence[Any]) -> Iterator[Range]:
    """Yield the ranges of parameters under stages 1, 2 and BF16_Optimizer."""
    for p in params:
        address, group = p._hp_mapping, p._dp_group or dist.group.WORLD
        if address is None:  # the flat tensor of this rank has nothing of the parameter
            yield Range(p, 0, 0, 0, group)
        else:
            inside, outside = address.lp_fragment_address, address.hp_fragment_address
            yield Range(p, inside.start, inside.numel, outside.start, group)


def _of_stage_3(zero: Any, flat: Tensor) -> Iterator[Range]:
    """Yield the ranges of the parameters of one sub-group of stage 3, which follow each other in its flat tensor."""
    number = next(i for i, candidate in enumerate(zero.fp32_partitioned_groups_flat) if candidate is flat)
    # The offset advances by the padded size, which may exceed the length of a range.
    offset = 0
    for p in zero.fp16_groups[number]:
        yield Range(p, *partition(p), offset, _peers_of(p))
        offset += p.partition_numel()


def _refuse(params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
    """Refuse features of DeepSpeed that change which elements the flat tensors hold, or when they hold them."""
    # Stage 3 keeps its optimizer in the first attribute, the other stages in the second.
    for p in params:
        for feature, used, instead in _features(
            p, getattr(p, "_z3_optimizer", getattr(p, "_zero_optimizer", None)), group
        ):
            shard_checks.deepspeed(feature, bool(used), instead)


def _features(p: Any, zero: Any, group: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield (name of an unsupported feature, whether it is used, what to do instead)."""
    # An attribute may be missing where a stage or version does not have the feature, so each one has a default. ZenFlow
    # and SuperOffload have optimizer classes of their own, and are known by these.
    kind = type(zero).__name__
    nvme = getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False)
    yield "round_robin_gradients", getattr(zero, "round_robin_gradients", False), "set it to false"
    yield "MiCS", kind.startswith("MiCS"), "use plain ZeRO-3"
    zenflow = getattr(zero, "zenflow", False) or "ZenFlow" in kind or hasattr(p, "selected_indices")
    yield "ZenFlow", zenflow, "drop the section zenflow"
    yield "SuperOffload", kind.startswith("SuperOffload"), "set super_offload to false"
    yield "offload to NVMe", nvme, 'use "device": "cpu"'
    yield "partial offload", getattr(zero, "partial_offload", 1.0) != 1.0, "set ratio to 1"
    yield "hpZ", getattr(zero, "zero_hpz_partition_size", 1) > 1, "set zero_hpz_partition_size to 1"
    experts = group.get("moe", False) or not getattr(p, "allreduce", True)
    yield "expert groups", experts, "use dense layers, or DistributedDataParallel"
    yield "the pipeline engine", hasattr(p, "ds_pipe_replicated"), "use ZeRO without pipeline stages"
