"""Raise the errors about parameters that are sharded or in flat tensors, and about ranks that disagree.

Each function raises if its condition does not hold, and names the way out. A condition over all ranks is computed by
the caller, so that all ranks raise together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..recipe.plan import Plan


def layout(name: str, placements: Sequence[Any]) -> None:
    """Refuse DTensors with other placements than shards and replicas, such as partial sums."""
    kinds = {type(placement).__name__ for placement in placements}
    if not kinds <= {"Replicate", "Shard", "_StridedShard"}:
        raise NotImplementedError(
            f"{name} is a DTensor with the placements {tuple(placements)}; only Shard and Replicate are supported, as "
            "fully_shard and tensor parallelism make them. Use these, or DistributedDataParallel"
        )


def cut_stack(name: str, stack: bool, sides: int) -> None:
    """Refuse a stack of matrices if both sides of its matrices are cut. `sides`: the number of cut sides."""
    if stack and sides > 1:
        raise NotImplementedError(
            f"{name} is a stack of matrices whose rows and columns are both sharded, and random numbers cannot be "
            "indexed for that layout. Shard either rows or columns, or the first dimension"
        )


def batch(name: str, dimension: int) -> None:
    """Refuse a stack of matrices that is cut along a batch dimension other than the first."""
    if dimension:
        raise NotImplementedError(f"{name} is sharded along dimension {dimension}; shard dimension 0 instead")


def cut(method: str, plan: Plan, sides: Iterable[int], why: Mapping[int, str], blocks: Iterable[str]) -> None:
    """Refuse a sharded parameter whose update rule needs more than thin sums over ranks.

    Args:
        method: name of the optimizer.
        plan: of the parameter.
        sides: the dimensions of the turned matrix that are cut: -2, -1, and -3 for the batch.
        why: for each side that must not be cut, the reason.
        blocks: keys of state that is both cut and quantized in blocks.
    """
    sides = set(sides)
    for side in sides & why.keys():
        direction = "projected side" if side == -2 else "side that is not projected"
        # Projecting the other side exchanges -2 and -1. It is suggested only if the method can then be used.
        other = "left" if plan.side == "right" else "right"
        turned = {-3 - cut_side for cut_side in sides & {-2, -1}}
        turn = (
            f', or project the other side (proj_type="{other}")' if plan.projected and not turned & why.keys() else ""
        )
        raise NotImplementedError(
            f"{method} cannot update {plan.name} {plan.shape}, which is sharded along its {direction}: {why[side]}. "
            f"Give it to a group with rank=None{turn}, or use DistributedDataParallel"
        )
    # Blocks of a shard begin at its first element, so other numbers of ranks would give other bits.
    for key in blocks:
        raise NotImplementedError(
            f"{method} cannot update {plan.name} {plan.shape}: its {key} is sharded, and would be quantized in blocks "
            'that depend on the number of ranks. Use "bfloat16" or "float32" for it (state_dtype, basis_dtype, '
            "error_feedback), or DistributedDataParallel"
        )


def unsharded(name: str, what: str) -> None:
    """Raise the error for a feature `what` that a sharded parameter cannot have."""
    raise NotImplementedError(f"{what} does not work for {name}, which is sharded (DTensor). Use plain step() instead")


def can_be_replaced(method: str, ways: Mapping[str, bool], why_not: str) -> None:
    """Refuse what needs the parameters themselves, where a wrapper has put other tensors in their place.

    Args:
        method: name of the optimizer.
        ways: other ways to take a step, and whether each is in use.
        why_not: why the method as a whole needs its own parameters, or "".
    """
    if why_not:
        raise NotImplementedError(
            f"{method} does not work under DeepSpeed ZeRO, nor in its stage 0 in bfloat16: they train other tensors in "
            f"the place of its parameters, and {why_not}. Use DistributedDataParallel"
        )
    for way in (way for way, taken in ways.items() if taken):
        raise NotImplementedError(
            f"{way} of {method} does not work under a wrapper that trains other tensors in the place of the parameters "
            "(DeepSpeed ZeRO, or its stage 0 in bfloat16). Use plain step() instead, or DistributedDataParallel"
        )


def can_be_partitioned(method: str, why_not: str) -> None:
    """Refuse stage 3 of ZeRO for a method with a reason `why_not`; "" means that the method works there."""
    if why_not:
        raise NotImplementedError(
            f"{method} does not work under stage 3 of DeepSpeed ZeRO, which partitions all weights: {why_not}. Use "
            "another stage, or DistributedDataParallel"
        )


def can_be_copied(method: str, in_pieces: bool) -> None:
    """Refuse to copy or pickle an optimizer whose parameters are in flat tensors."""
    if in_pieces:
        raise NotImplementedError(
            f"{method} cannot be copied or pickled while a wrapper (DeepSpeed ZeRO) has its parameters in flat "
            "tensors: only this process knows what they hold. Save the engine's checkpoint instead"
        )


def flat(method: str, shape: Sequence[int], known: bool) -> None:
    """Refuse a tensor in the place of parameters unless it is a flat tensor of a `known` wrapper."""
    # FSDP1 gives a flattened tensor as well, but without the attributes that say what it holds.
    if not known or len(shape) != 1:
        what = "a flattened 1-D tensor" if len(shape) == 1 else f"a tensor {tuple(shape)}"
        raise NotImplementedError(
            f"{method} got {what} in the place of its parameters (FSDP1 or an unknown wrapper). Matrix shapes are "
            "lost. Use FSDP2 (fully_shard), DistributedDataParallel or DeepSpeed ZeRO 0-3, and build the optimizer "
            "from model.named_parameters() before deepspeed.initialize"
        )


def deepspeed(feature: str, used: bool, instead: str) -> None:
    """Refuse a feature of DeepSpeed that is used; `instead` is the way out."""
    if used:
        raise NotImplementedError(f"DeepSpeed with {feature} is not supported by low-rank optimizers: {instead}")


def master_weights(same: bool) -> None:
    """Raise unless the float32 weights in a flat tensor are the `same` as the parameters that it should hold."""
    if not same:
        raise RuntimeError(
            "DeepSpeed's parameter map does not match its master weights; nothing was updated. Set "
            "zero_optimization.round_robin_gradients to false, and change weights before deepspeed.initialize only"
        )


def same_fragments(same: bool) -> None:
    """Raise unless a state dict has the `same` fragments of parameters as this rank."""
    if not same:
        raise ValueError(
            "the state dict has other ranges of the parameters than this rank; nothing was loaded. DeepSpeed's own "
            "checkpoints can be loaded only with the ZeRO stage, number of ranks and groups that they were saved with"
        )


def of_everybody(name: str, ranks: int, world: int) -> None:
    """Refuse a parameter that only `ranks` of all `world` ranks share.

    Under DeepSpeed's tensor parallelism the other ranks have a different parameter of the same name.
    """
    if ranks != world:
        raise NotImplementedError(
            f"{name} is in flat tensors of {ranks} of {world} ranks, and the other ranks may have a different "
            "parameter of that name, so its state cannot be put together. Save and load the engine's checkpoint "
            "instead"
        )


def owes_nothing(name: str, owes: bool) -> None:
    """Refuse to put together the state of a parameter whose weights have a Kahan compensation."""
    if owes:
        raise NotImplementedError(
            f'{name} is stored in 16 bits in flat tensors, with bf16_update="kahan": the compensation of its weights '
            "cannot be put together. Save and load the engine's checkpoint instead, or let DeepSpeed keep float32 "
            "weights"
        )


def same_plans(same: bool, rank: int, plans: Sequence[Any]) -> None:
    """Raise unless all ranks have the `same` plans; show the first plans of this rank."""
    if not same:
        raise RuntimeError(
            f"ranks have different parameters, shapes, ranks or sides; nothing was updated. Rank {rank} has "
            f"{len(plans)} parameters, which begin with {', '.join(map(str, plans[:3]))}"
        )


def gradient_on_all(name: str, ranks: int, world: int) -> None:
    """Raise if a sharded parameter has a gradient on a part of its ranks only."""
    if 0 < ranks < world:
        raise RuntimeError(
            f"{name} is sharded and has a gradient on {ranks} of {world} ranks; nothing was updated. All ranks must "
            "run the same parts of the model"
        )


def same_layout(name: str, grad: Any, placements: Sequence[Any]) -> None:
    """Raise unless a gradient has the placements of its parameter."""
    got = tuple(getattr(grad, "placements", ()))
    if got != tuple(placements):
        raise RuntimeError(
            f"{name} has the placements {tuple(placements)}, and its gradient {got or 'none: a plain tensor'}; "
            "redistribute the gradient"
        )
