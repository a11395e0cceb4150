"""Convert linear layers of a model to another form and back, in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import checks, hyperparameters
from ..recipe.plan import resolve_rank
from . import checks as layer_checks
from .choose import linears
from .linear import LowRankLinear, ReparameterizedLinear

Build = Callable[..., ReparameterizedLinear]


@dataclass
class Conversion:
    """The record of a conversion.

    Attributes:
        layers: the new layers, by the name of the module. Layers that share their weight are one entry.
        left: why a chosen linear layer was not converted, by the name of its weight.
        places: (parent module, name of the child, the plain layer that was there). Clear it when the conversion is not
            to be undone any more, so that the plain weights can be freed.
    """

    layers: dict[str, ReparameterizedLinear]
    left: dict[str, str]
    places: list[tuple[nn.Module, str, nn.Module]]

    def undo(self) -> None:
        """Put the plain layers back."""
        for parent, name, plain in self.places:
            setattr(parent, name, plain)


def convert(
    model: nn.Module,
    layer: Build = LowRankLinear,
    *,
    rank: int | float = 0.25,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    min_dim: int = 16,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Replace linear layers by layers that store their weight in another form, in place.

    The layers are those that `param_groups` would project: not the output head, nothing that is tied to an embedding,
    nothing frozen, no matrix with a side below `min_dim` or with `rank >= min(m, n)`. Biases stay the same parameters.
    Layers that share a weight share its factors. Optimizers of weight-space methods call this function; call it
    yourself if the model is to be sharded before the optimizer is made.

    Args:
        model: a model that is not wrapped by DDP, FSDP or torch.compile: convert first, then wrap. It may be on the
            meta device. With fully_shard: convert (a quantized base with `by_rows=True`), shard, and make the optimizer
            last, with the same options.
        layer: the class of the new layers, such as `LowRankLinear`.
        rank: an int, or a fraction in (0, 1] of the shorter side of each weight.
        include, exclude: regular expressions, searched in names of parameters, that decide before any other rule.
        min_dim: the smallest side that a converted matrix may have.
        seed: of random factors; they are a function of the seed and the layer's name.
        options: further keyword arguments of `layer`.

    Returns:
        The same model.

    Raises:
        ValueError: the model is wrapped, is converted already or has quantized linear layers; a pattern matches
            nothing; a layer has hooks; or there is nothing to convert. The model is then unchanged.

    Example::

        model = lowrank_optim.convert(model, lowrank_optim.LowRankLinear, rank=64, alpha=64, base="nf4")
    """
    make_conversion(model, layer, rank=rank, include=include, exclude=exclude, min_dim=min_dim, seed=seed, **options)
    return model


def make_conversion(
    model: nn.Module,
    layer: Build,
    *,
    rank: int | float,
    include: Iterable[str],
    exclude: Iterable[str],
    min_dim: int = 16,
    **options: Any,
) -> Conversion:
    """Convert a model as `convert` does, and return the record of it."""
    layer_checks.convertible(model)
    layer_checks.given("rank", rank)
    hyperparameters.check({"rank": rank}, {})
    chosen, left = _eligible(model, include, exclude, rank, min_dim)
    layers, replaced = {}, {}
    for name, twins in chosen.items():
        # Layers that share a weight become copies of one layer, with the same factors.
        first = layer(twins[0], rank, name=name.removesuffix(".weight"), **options)
        layers[name.removesuffix(".weight")] = first
        for twin in twins:
            replaced[id(twin)] = first if twin is twins[0] else _sharing(first, twin)
    # All new layers exist before the first is put in place, so that an error leaves the model unchanged.
    places = [
        (parent, child_name, child)
        for parent in model.modules()
        for child_name, child in parent._modules.items()
        if id(child) in replaced and child is not None
    ]
    for parent, child_name, child in places:
        setattr(parent, child_name, replaced[id(child)])
    return Conversion(layers, left, places)


def adopt(
    model: nn.Module, method: str, layer: type[ReparameterizedLinear], rank: int | float, **options: Any
) -> Conversion:
    """Return the record of an earlier conversion, for a model that has been sharded since.

    Args:
        model: the converted model.
        method: name of the optimizer, for messages.
        layer: the class that its layers must have.
        rank, options: of the optimizer; layers that were made with other values are refused.
    """
    layers: dict[str, ReparameterizedLinear] = {}
    known: set[nn.Parameter] = set()
    for name, module in converted(model):
        own = {**options, "rank": resolve_rank(rank, module.out_features, module.in_features)}
        layer_checks.adopted(method, name, layer, module, own)
        module.refuse_shards()
        # Layers that share a weight have the same leader, and are one entry.
        if module.leader not in known:
            known.add(module.leader)
            layers[name] = module
    return Conversion(layers, {}, [])


def merge(model: nn.Module) -> nn.Module:
    """Replace every converted layer by a plain `nn.Linear` of the same function, in place; for inference or saving.

    The function changes by one rounding of each weight to the dtype of its factors. An optimizer that was made before
    can no longer be used: its parameters are not those of the model any more.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no module.
        ValueError: no layer is converted.
        NotImplementedError: the model is sharded.

    Example::

        lowrank_optim.merge(model)
        torch.save(model.state_dict(), "model.pt")  # loads into the architecture as it was
    """
    checks.module(model)
    plain: dict[int, nn.Linear] = {}
    weights: dict[int, nn.Parameter] = {}
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, ReparameterizedLinear)
    ]
    if not places:
        raise ValueError(f"{type(model).__name__} has no converted layers: nothing to merge")
    for _, _, layer in places:
        layer.check_complete()
        layer_checks.unsharded_layer(layer.leader)
    # Layers are popped and replaced one by one, so that the memory never holds both forms of all layers.
    while places:
        parent, name, layer = places.pop()
        if id(layer) not in plain:
            plain[id(layer)] = layer.to_linear()
            weight = cast(nn.Parameter, plain[id(layer)].weight)
            plain[id(layer)].weight = weights.setdefault(id(layer.leader), weight)
        setattr(parent, name, plain[id(layer)])
    return model


def converted(model: nn.Module) -> Iterator[tuple[str, ReparameterizedLinear]]:
    """Return an iterator over (name, layer) of all converted layers."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ReparameterizedLinear))


def leave_to_ranks(model: nn.Module, params: Iterable[nn.Parameter]) -> None:
    """Make DistributedDataParallel, which will wrap the model later, ignore some of its parameters.

    It then neither sends their values from rank 0 nor averages their gradients.
    """
    own = {id(p) for p in params}
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own}
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ())) | names
    cast(Any, DistributedDataParallel)._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))


def _eligible(
    model: nn.Module, include: Iterable[str], exclude: Iterable[str], rank: int | float, min_dim: int
) -> tuple[dict[str, list[nn.Linear]], dict[str, str]]:
    """Return the layers to convert by the name of their weight, and the reason for each chosen layer that is left."""
    chosen, left = {}, {}
    for name, twins in linears(model, include, exclude, to="convert").items():
        reason = _why_left(twins[0], rank, min_dim)
        if reason:
            left[name] = reason
        else:
            layer_checks.bare_linear(name, twins)
            chosen[name] = twins
    if not chosen:
        layer_checks.something_converted(type(model).__name__, left.items())
    return chosen, left


def _why_left(plain: nn.Linear, rank: int | float, min_dim: int) -> str:
    """Return why a layer is not converted, or "" if it is."""
    m, n = plain.weight.shape
    if not plain.weight.requires_grad:
        return "frozen"
    if min(m, n) < min_dim:
        return f"a side below {min_dim}"
    if resolve_rank(rank, m, n) >= min(m, n):
        return f"rank {resolve_rank(rank, m, n)} >= min{(m, n)}"
    return ""


def _sharing(first: ReparameterizedLinear, plain: nn.Linear) -> ReparameterizedLinear:
    """Return the layer for another user of the same weight: the parameters and buffers of `first`, the bias of `plain`.

    Parameters and buffers are the same objects in both layers.
    """
    twin = copy.copy(first)
    # The dictionaries of a module (of parameters, of hooks) are copied, their entries are shared. Else the bias that
    # is set below would be set in `first` as well.
    for key, value in vars(first).items():
        if isinstance(value, (dict, set)):
            setattr(twin, key, copy.copy(value))
    twin._parameters["bias"] = plain.bias
    return twin.train(plain.training)
