"""Raise the errors about models whose layers are to be converted, and about converted layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .. import checks


def thin(name: str, rank: int, shape: tuple[int, ...]) -> None:
    """Refuse a rank that is not below both sides of a layer's weight."""
    if rank >= min(shape):
        raise ValueError(
            f"{name or 'this layer'} {shape} at rank {rank} would not be thin; take a rank below {min(shape)}"
        )


def sparse(name: str, count: int, density: float, shape: tuple[int, ...]) -> None:
    """Refuse a density at which a layer has no sparse entries at all; `count` is their number."""
    if not count:
        raise ValueError(
            f"{name or 'this layer'} {shape} has no entries at density {density:g}; take a higher density, leave the "
            "layer out with `exclude`, or use LowRankAdamW, which has no sparse entries"
        )


def same_weights(name: str, same: bool) -> None:
    """Raise if the weight differs between ranks after a merge, in a layer with one head per rank.

    Merges add the same to the weight of every rank, so weights that differ would differ forever.
    """
    if not same:
        raise RuntimeError(
            f"{name}: the weight differs between ranks after a merge. Load equal weights on every rank before the "
            "optimizer is made, or wrap the model in DistributedDataParallel, which sends the weights of rank 0"
        )


def own_heads(same: bool) -> None:
    """Raise if all ranks have the same head before the first update, although each should have a head of its own."""
    if same:
        raise RuntimeError(
            'heads="ranks", and all ranks have the same head: a wrapper has sent the head of one rank to all ranks '
            "(DeepSpeed does, and averages gradients). Nothing was updated; use DistributedDataParallel, or a number "
            "of heads"
        )


def whole_model(model: Any) -> torch.nn.Module:
    """Return the model if it is a module; else raise a TypeError."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"this method changes how weights are kept, so it takes the model, got {type(model).__name__}. Pass the "
            "nn.Module itself, not its parameters"
        )
    return model


def given(name: str, value: Any) -> None:
    """Refuse None for an option that has no default here."""
    if value is None:
        raise ValueError(f"{name} must be given here, got None")


def convertible(model: Any) -> None:
    """Refuse a model that cannot be converted in place, before any layer is replaced."""
    whole_model(model)
    if hasattr(model, "_orig_mod") or isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"the model is wrapped ({type(model).__name__}); convert the bare model first, and wrap it then"
        )
    # Converted layers are recognized by their attributes: this file is imported by the one that defines their class.
    for name, module in model.named_modules():
        if hasattr(module, "leader") and hasattr(module, "factors"):
            raise ValueError(
                f"{name or 'the model'} is converted already ({type(module).__name__}); convert it back to plain "
                "layers first, with lowrank_optim.merge(model)"
            )
        weight = module._parameters.get("weight") if isinstance(module, torch.nn.Linear) else None
        if weight is not None and (hasattr(weight, "pack_") or not weight.is_floating_point()):
            raise ValueError(
                f"{name}.weight is quantized ({type(weight).__name__}); convert the model with its float weights, and "
                'let the method quantize them (base="int8" or "nf4", where it has this option)'
            )
        if weight is not None and hasattr(weight, "ds_shape"):
            raise NotImplementedError(
                f"{name}.weight is partitioned by DeepSpeed; make the model and convert it outside of zero.Init, and "
                "before deepspeed.initialize, which will partition it"
            )
        if weight is not None and hasattr(weight, "device_mesh"):
            raise NotImplementedError(
                f"{name}.weight is a DTensor; convert the bare model first (lowrank_optim.convert), then shard it, and "
                "make the optimizer last"
            )
    if isinstance(model, torch.nn.Linear):
        raise ValueError("the model is one nn.Linear, which cannot be replaced in place; put it into a nn.Sequential")


def for_quantized(base: str, quantized: bool, wanted: Mapping[str, bool]) -> None:
    """Refuse options of quantized bases that are wanted where the base is not quantized."""
    for option in (option for option, on in wanted.items() if on and not quantized):
        raise ValueError(f"{option}=True is for quantized bases, and base={base!r} is not quantized; leave it out")


def shards_of_rows(layer: str, codes: str, exact: bool, cut: Sequence[Any]) -> None:
    """Refuse a sharded layer unless its factor B and its base are cut along the same rows.

    Args:
        layer: name of the layer's class.
        codes: the kind of a quantized base whose blocks do not end with rows; "" for any other base.
        exact: whether the layer has an exact copy of its base.
        cut: the parameters that have the rows of W.
    """
    if codes:
        raise NotImplementedError(
            f"{layer} with base={codes!r} is sharded, and a shard would divide the blocks of its codes. Convert the "
            f"bare model with base={codes!r} and by_rows=True, and then shard it"
        )
    if exact:
        raise NotImplementedError(
            f"{layer} with exact_base=True is sharded, and its exact copy is not: every process would keep the whole "
            "copy. Leave exact_base out"
        )
    placements = {tuple(x.placements) for x in cut if hasattr(x, "device_mesh")}
    if len(placements) > 1 or any(getattr(placement, "dim", 0) for layout in placements for placement in layout):
        raise NotImplementedError(
            f"{layer} is sharded as {sorted(map(str, placements))}; shard dimension 0 of all its parameters, as "
            "fully_shard does by default"
        )


def gradients_of_codes(layer: str, base: str) -> None:
    """Refuse a sharded layer that needs the gradient of a quantized base."""
    if base != "dense":
        raise NotImplementedError(
            f"{layer} with base={base!r} is sharded: its basis is fitted to gradients of the whole weight, which "
            "fully_shard adds up for floating-point parameters only, and the codes of a quantized base are integers. "
            'Every process would keep the whole gradient instead. Use base="dense", ReLoRA, or DistributedDataParallel'
        )


def heads_of_ranks(layer: str, ranks: bool) -> None:
    """Refuse a sharded layer with one head per rank."""
    if ranks:
        raise NotImplementedError(
            f"{layer} with ranks=True is sharded: fully_shard would shard the factors and average their gradients, but "
            "every process has the factors of a different head. Give a number of heads, which all processes train "
            "together, or use DistributedDataParallel"
        )


def one_dtype(layer: str, vectors: torch.dtype, values: torch.dtype) -> None:
    """Refuse a sharded layer whose trained parameters have two dtypes.

    `fully_shard` would refuse it as well, but only in the first forward pass, and without naming the way out.
    """
    if vectors != values:
        raise NotImplementedError(
            f"{layer} keeps its vectors in {vectors} and its singular values in {values}, and fully_shard takes "
            "trained parameters of one dtype only. Keep the weights in float32, and compute in 16 bits with "
            "MixedPrecisionPolicy(param_dtype=torch.bfloat16), or use DistributedDataParallel"
        )


def adopted(method: str, name: str, wanted: type[Any], layer: Any, options: Mapping[str, Any]) -> None:
    """Refuse a layer that was converted for another method, or with other options than the optimizer has.

    Args:
        method: name of the optimizer.
        name: of the layer.
        wanted: the class that the layer must have.
        layer: the converted layer.
        options: of the optimizer. None accepts any value.
    """
    how = f"convert the bare model with lowrank_optim.convert(model, lowrank_optim.{wanted.__name__}, ...) for it"
    if not isinstance(layer, wanted):  # fully_shard makes a subclass of it
        raise ValueError(f"{name} is converted to {type(layer).__name__}, which {method} does not know; {how}")
    for key, value in layer.made_with().items():
        if options.get(key) not in (None, value):
            raise ValueError(f"{name} is converted with {key}={value!r}, and {method} got {options[key]!r}; {how}")


def chosen_by_convert(patterns: Sequence[str]) -> None:
    """Refuse patterns that would choose layers of a model whose layers `convert` has chosen already."""
    if patterns:
        raise ValueError(f"the model is converted already, and {patterns} would choose layers; give it to convert()")


def unsharded_layer(p: Any) -> None:
    """Refuse to merge a layer whose leader `p` is partitioned or sharded."""
    if hasattr(p, "ds_shape") and p.shape != p.ds_shape:
        raise NotImplementedError(
            "merge needs whole layers, and DeepSpeed has partitioned these. Gather them on every rank for the merge: "
            "with deepspeed.zero.GatheredParameters(list(model.parameters())): lowrank_optim.merge(model)"
        )
    if hasattr(p, "device_mesh"):
        raise NotImplementedError(
            "merge needs whole layers, and these are sharded. Save the full state dict (StateDictOptions("
            "full_state_dict=True)), load it into a converted model in one process, and merge that"
        )


def whole_restart(method: str, reset: str) -> None:
    """Raise the error for a reset of moments that needs whole factors, where they are sharded."""
    raise NotImplementedError(
        f'{method} with reset={reset!r} needs all entries of a factor at once, which is sharded. Use reset="drop"'
    )


def bare_linear(name: str, twins: Iterable[torch.nn.Linear]) -> None:
    """Refuse layers whose hooks would be lost, or whose weight is not finite. `twins` share the weight `name`."""
    for plain in twins:
        hooks = (plain._forward_hooks, plain._forward_pre_hooks, plain._backward_hooks, plain._backward_pre_hooks)
        if any(hooks):
            raise ValueError(
                f"{name.removesuffix('.weight')} has hooks, which a new layer would lose; add them after the conversion"
            )
        if not plain.weight.is_meta and not bool(plain.weight.isfinite().all()):
            raise ValueError(f"{name} has entries that are not finite; nothing was converted")


def something_converted(model: str, left: Iterable[tuple[str, str]]) -> None:
    """Raise the error for a model without a layer to convert, with the reason for each layer that is left."""
    raise ValueError(
        f"{model} has no linear layer to convert:{checks.table(left)}\nLower `rank`, or name layers in `include`"
    )
