"""Linear layers of a model to another form and back, in place."""

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
    """What `convert` did.

    Attributes:
        layers: by the name of the module; layers that share their weight are one entry.
        left: why linear layers that were chosen stayed as they are, by the name of the weight.
        places: (parent, name of the child, what was there); clear it when there is nothing to undo any more.
    """

    layers: dict[str, ReparameterizedLinear]
    left: dict[str, str]
    places: list[tuple[nn.Module, str, nn.Module]]

    def undo(self) -> None:
        """Puts the plain layers back, as they were."""
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
    """Replaces linear layers by ones that keep their weight in another form, in place.

    Chosen are the layers that `param_groups` would project: not the output head, nothing that is tied to an embedding,
    nothing frozen, no matrix with a side below `min_dim` or with `rank >= min(m, n)`. Biases stay the same parameters;
    layers that share a weight share its factors. Optimizers of weight-space methods call this; so may you.

    Args:
        model: not wrapped by DDP, FSDP or torch.compile: convert first, wrap then. May be on the meta device. With
            fully_shard: convert (a quantized base with `by_rows=True`), shard, and make the optimizer last, with the
            same options.
        layer: a class such as `LowRankLinear`.
        rank: a number, or a fraction in (0, 1] of the shorter side of each weight.
        include, exclude: regular expressions, searched in names of parameters, that decide before anything else.
        options: further keyword arguments of `layer`.

    Returns:
        The same model.

    Raises:
        ValueError: a wrapped model, one that is converted already, one whose linear layers are quantized, a pattern
            that matches nothing, a layer with hooks, or nothing to convert. The model is then unchanged.

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
    """`convert`, and what it did."""
    layer_checks.convertible(model)
    layer_checks.given("rank", rank)
    hyperparameters.check({"rank": rank}, {})
    chosen, left = _eligible(model, include, exclude, rank, min_dim)
    layers, replaced = {}, {}
    for name, twins in chosen.items():
        first = layer(twins[0], rank, name=name.removesuffix(".weight"), **options)
        layers[name.removesuffix(".weight")] = first
        for twin in twins:
            replaced[id(twin)] = first if twin is twins[0] else _sharing(first, twin)
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
    """What `convert` did to a model that was sharded since."""
    layers: dict[str, ReparameterizedLinear] = {}
    known: set[nn.Parameter] = set()
    for name, one in converted(model):
        own = {**options, "rank": resolve_rank(rank, one.out_features, one.in_features)}
        layer_checks.adopted(method, name, layer, one, own)
        one.refuse_shards()
        if one.leader not in known:
            known.add(one.leader)
            layers[name] = one
    return Conversion(layers, {}, [])


def merge(model: nn.Module) -> nn.Module:
    """Every converted layer back to a plain `nn.Linear` of the same function, in place; for inference or saving.

    The function changes by one rounding of each weight to the dtype of its factors. Optimizers made before are done
    with: their parameters are no longer the model's.

    Returns:
        The same model.

    Raises:
        TypeError: no module.
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
    while places:  # let go one by one, so that at no time both forms of all layers are there
        parent, name, layer = places.pop()
        if id(layer) not in plain:
            plain[id(layer)] = layer.to_linear()
            weight = cast(nn.Parameter, plain[id(layer)].weight)
            plain[id(layer)].weight = weights.setdefault(id(layer.leader), weight)
        setattr(parent, name, plain[id(layer)])
    return model


def converted(model: nn.Module) -> Iterator[tuple[str, ReparameterizedLinear]]:
    """Name and layer of all that is converted."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ReparameterizedLinear))


def leave_to_ranks(model: nn.Module, params: Iterable[nn.Parameter]) -> None:
    """Tells DistributedDataParallel, which will wrap the model, to leave these parameters to themselves."""
    own = {id(p) for p in params}
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own}
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ())) | names
    cast(Any, DistributedDataParallel)._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))


def _eligible(
    model: nn.Module, include: Iterable[str], exclude: Iterable[str], rank: int | float, min_dim: int
) -> tuple[dict[str, list[nn.Linear]], dict[str, str]]:
    """The linear layers to convert by the name of their weight, and why others are left."""
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
    m, n = plain.weight.shape
    if not plain.weight.requires_grad:
        return "frozen"
    if min(m, n) < min_dim:
        return f"a side below {min_dim}"
    if resolve_rank(rank, m, n) >= min(m, n):
        return f"rank {resolve_rank(rank, m, n)} >= min{(m, n)}"
    return ""


def _sharing(first: ReparameterizedLinear, plain: nn.Linear) -> ReparameterizedLinear:
    """Another layer of the same weight, with its own bias: parameters and buffers are the same objects."""
    twin = copy.copy(first)
    for key, own in vars(first).items():
        if isinstance(own, (dict, set)):  # names of parameters, hooks: what they hold is shared, they are not
            setattr(twin, key, copy.copy(own))
    twin._parameters["bias"] = plain.bias
    return twin.train(plain.training)
