"""What is refused of parameters that are cut, or kept elsewhere by a wrapper, and what all ranks must agree on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..recipe.plan import Plan


def layout(name: str, placements: Sequence[Any]) -> None:
    """Refuses DTensors but those that are cut along their dimensions, into pieces that follow each other."""
    kinds = {type(one).__name__ for one in placements}
    if not kinds <= {"Replicate", "Shard", "_StridedShard"}:
        raise NotImplementedError(
            f"{name} is a DTensor with the placements {tuple(placements)}; Shard and Replicate are understood, as "
            "fully_shard and tensor parallelism make them. Use these, or DistributedDataParallel"
        )


def cut_stack(name: str, stack: bool, sides: int) -> None:
    """Refuses stacks of matrices of which both sides are cut."""
    if stack and sides > 1:
        raise NotImplementedError(
            f"{name} is a stack of matrices whose rows and columns are both sharded, which random numbers of single "
            "elements do not follow. Shard one of them, or the first dimension"
        )


def batch(name: str, dimension: int) -> None:
    """Refuses stacks of matrices that are cut where this version does not follow."""
    if dimension:
        raise NotImplementedError(f"{name} is sharded along dimension {dimension}; shard dimension 0 instead")


def cut(method: str, plan: Plan, sides: Iterable[int], why: Mapping[int, str], blocks: Iterable[str]) -> None:
    """Refuses a sharded parameter whose rule needs more than thin sums over ranks. `blocks`: state that is quantized
    in blocks, and cut."""
    sides = set(sides)
    for side in sides & why.keys():
        direction = "projected side" if side == -2 else "side that is not projected"
        other = "left" if plan.side == "right" else "right"
        turned = {-3 - one for one in sides & {-2, -1}}
        turn = (
            f', or project the other side (proj_type="{other}")' if plan.projected and not turned & why.keys() else ""
        )
        raise NotImplementedError(
            f"{method} cannot update {plan.name} {plan.shape}, which is sharded along its {direction}: {why[side]}. "
            f"Give it to a group with rank=None{turn}, or use DistributedDataParallel"
        )
    for key in blocks:
        raise NotImplementedError(
            f"{method} cannot update {plan.name} {plan.shape}: its {key} is sharded, and would be quantized in blocks "
            'that depend on the number of ranks. Use "bfloat16" or "float32" for it (state_dtype, basis_dtype, '
            "error_feedback), or DistributedDataParallel"
        )


def unsharded(name: str, what: str) -> None:
    raise NotImplementedError(f"{what} does not work for {name}, which is sharded (DTensor). Use step() as it is")


def can_be_replaced(method: str, ways: Mapping[str, bool], why_not: str) -> None:
    """For what works on the parameters themselves, where a wrapper has put other tensors in their place."""
    if why_not:
        raise NotImplementedError(
            f"{method} does not work under DeepSpeed ZeRO, nor in its stage 0 in bfloat16: they train other tensors in "
            f"the place of its parameters, and {why_not}. Use DistributedDataParallel"
        )
    for way in (way for way, taken in ways.items() if taken):
        raise NotImplementedError(
            f"{way} of {method} does not work under a wrapper that keeps the weights elsewhere (DeepSpeed ZeRO, or its "
            "stage 0 in bfloat16). Use step() as it is, or DistributedDataParallel"
        )


def can_be_partitioned(method: str, why_not: str) -> None:
    if why_not:
        raise NotImplementedError(
            f"{method} does not work under stage 3 of DeepSpeed ZeRO, which partitions all weights: {why_not}. Use "
            "another stage, or DistributedDataParallel"
        )


def can_be_copied(method: str, in_pieces: bool) -> None:
    if in_pieces:
        raise NotImplementedError(
            f"{method} cannot be copied or pickled while a wrapper (DeepSpeed ZeRO) has its parameters in flat "
            "tensors: what these hold is known to this process alone. Save the engine's checkpoint instead"
        )


def flat(method: str, shape: Sequence[int], known: bool) -> None:
    """Refuses tensors that have taken the place of parameters and are nobody's."""
    if not known or len(shape) != 1:
        what = "a flattened 1-D tensor" if len(shape) == 1 else f"a tensor {tuple(shape)}"
        raise NotImplementedError(
            f"{method} got {what} in the place of its parameters (FSDP1 or an unknown wrapper). Matrix shapes are "
            "lost. Use FSDP2 (fully_shard), DistributedDataParallel or DeepSpeed ZeRO 0-3, and build the optimizer "
            "from model.named_parameters() before deepspeed.initialize"
        )


def deepspeed(feature: str, used: bool, instead: str) -> None:
    if used:
        raise NotImplementedError(f"DeepSpeed with {feature} is not supported by low-rank optimizers: {instead}")


def master_weights(same: bool) -> None:
    if not same:
        raise RuntimeError(
            "DeepSpeed's parameter map does not match its master weights; nothing was updated. Set "
            "zero_optimization.round_robin_gradients to false, and change weights before deepspeed.initialize only"
        )


def same_fragments(same: bool) -> None:
    if not same:
        raise ValueError(
            "the state dict is of other pieces of the parameters than are here; nothing was loaded. DeepSpeed's own "
            "checkpoints go on with the ZeRO stage, number of ranks and groups that they were saved with"
        )


def of_everybody(name: str, ranks: int, world: int) -> None:
    """Refuses a parameter that other processes have as well, under the same name (tensor parallelism of DeepSpeed)."""
    if ranks != world:
        raise NotImplementedError(
            f"{name} is in flat tensors of {ranks} of {world} ranks, and others may have another one of that name, so "
            "there is no state of all of them. Save and load the engine's checkpoint instead"
        )


def owes_nothing(name: str, owes: bool) -> None:
    if owes:
        raise NotImplementedError(
            f'{name} is kept in 16 bits in flat tensors, with bf16_update="kahan": what its weights owe is not put '
            "together. Save and load the engine's checkpoint instead, or let DeepSpeed keep float32 weights"
        )


def same_plans(same: bool, rank: int, plans: Sequence[Any]) -> None:
    if not same:
        raise RuntimeError(
            f"ranks have different parameters, shapes, ranks or sides; nothing was updated. Rank {rank} has "
            f"{len(plans)} of them, which begin with {', '.join(map(str, plans[:3]))}"
        )


def gradient_on_all(name: str, ranks: int, world: int) -> None:
    if 0 < ranks < world:
        raise RuntimeError(
            f"{name} is sharded and has a gradient on {ranks} of {world} ranks; nothing was updated. All ranks must "
            "run the same parts of the model"
        )


def same_layout(name: str, grad: Any, placements: Sequence[Any]) -> None:
    got = tuple(getattr(grad, "placements", ()))
    if got != tuple(placements):
        raise RuntimeError(
            f"{name} has the placements {tuple(placements)}, and its gradient {got or 'none: a plain tensor'}; "
            "redistribute the gradient"
        )
