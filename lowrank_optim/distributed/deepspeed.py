"""Where DeepSpeed keeps the numbers of a parameter: read off the attributes that it sets. Imports nothing of it.

ZeRO gives a client optimizer one flat float32 tensor per group (stages 1, 2 and BF16_Optimizer) or per sub-group (stage
3), which holds a contiguous range of each of some parameters. Known to be so in DeepSpeed 0.16.9 to 0.19.8.
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
    """The elements `start` to `start + length` of a parameter, in row-major order, at `offset` of a flat tensor."""

    param: Tensor
    start: int
    length: int
    offset: int
    group: Any  # the processes that have the rest of it


def ranges(method: str, flat: Tensor, params: Sequence[Tensor], group: Mapping[str, Any]) -> list[Range]:
    """What a flat tensor holds of the parameters that its group was made of, in an order that all ranks share.

    Of a parameter that lies elsewhere the length is 0.

    Raises:
        NotImplementedError: the tensor is not DeepSpeed's, or DeepSpeed runs in a way that nobody here understands.
        RuntimeError: DeepSpeed's map is not as it was in the versions that are known, or is wrong.
    """
    known = [cast(Any, p) for p in params if hasattr(p, "_z3_optimizer") or hasattr(p, "_hp_mapping")]
    shard_checks.flat(method, flat.shape, bool(known))
    with _known_attributes():
        _refuse(params, group)
        if hasattr(known[0], "_z3_optimizer"):
            return list(_of_stage_3(known[0]._z3_optimizer, flat))
        return list(_of_stage_1_and_2(known))


def later(params: Sequence[Tensor]) -> list[Tensor]:
    """The flat tensors of a group of stage 3, which gets them one at a time, in its step; none of other stages."""
    zero = next((cast(Any, p)._z3_optimizer for p in params if hasattr(p, "_z3_optimizer")), None)
    if zero is None:
        return []
    own = {id(p) for p in params}
    with _known_attributes():
        groups = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        return [flat for flat, members in groups if any(id(p) in own for p in members)]


@contextmanager
def _known_attributes() -> Iterator[None]:
    try:
        yield
    except AttributeError as error:
        version = getattr(sys.modules.get("deepspeed"), "__version__", "(of an unknown version)")
        raise RuntimeError(
            f"DeepSpeed {version} changed an attribute that says what its flat tensors hold ({error}). Supported are "
            "0.16.9 to 0.19.x: pin one of them, or use stage 0"
        ) from error


def verify(flat: Tensor, found: Sequence[Range]) -> None:
    """Raises a RuntimeError if a flat tensor does not hold what it is said to hold."""
    for one in found:
        shard = getattr(one.param, "ds_tensor", None)  # stage 3 keeps the parameter cut as well
        whole, start = (one.param, one.start) if shard is None else (shard, 0)
        own = whole.detach().reshape(-1)[start : start + one.length].to(flat.device)
        copy = flat.detach()[one.offset : one.offset + one.length].to(own.dtype)
        shard_checks.master_weights(torch.equal(copy, own))


def partition(p: Tensor) -> tuple[int, int]:
    """(first element, how many) of what stage 3 has here of a parameter, also of a frozen one: of its `ds_tensor`."""
    param = cast(Any, p)
    size = param.partition_numel()
    start = min(dist.get_rank(_peers_of(param)) * size, param.ds_numel)
    return start, min(size, param.ds_numel - start)


def _peers_of(param: Any) -> Any:
    zero = getattr(param, "_z3_optimizer", None)
    return getattr(param, "ds_process_group", getattr(zero, "dp_process_group", None)) or dist.group.WORLD


def _of_stage_1_and_2(params: Sequence[Any]) -> Iterator[Range]:
    for p in params:
        address, group = p._hp_mapping, p._dp_group or dist.group.WORLD
        if address is None:
            yield Range(p, 0, 0, 0, group)
        else:
            inside, outside = address.lp_fragment_address, address.hp_fragment_address
            yield Range(p, inside.start, inside.numel, outside.start, group)


def _of_stage_3(zero: Any, flat: Tensor) -> Iterator[Range]:
    number = next(i for i, one in enumerate(zero.fp32_partitioned_groups_flat) if one is flat)
    offset = 0
    for p in zero.fp16_groups[number]:
        yield Range(p, *partition(p), offset, _peers_of(p))
        offset += p.partition_numel()


def _refuse(params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
    """Raises for what changes which numbers the flat tensors hold, or when they hold them."""
    for p in params:
        for feature, used, instead in _features(
            p, getattr(p, "_z3_optimizer", getattr(p, "_zero_optimizer", None)), group
        ):
            shard_checks.deepspeed(feature, bool(used), instead)


def _features(p: Any, zero: Any, group: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """(name, whether it is used, what to do instead)."""
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
