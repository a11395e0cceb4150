"""Choose the linear layers of a model whose weights are to be replaced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from ..groups import _any_match, _must_match, _rules
from ..recipe.weights import is_packed


def linears(
    model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = (), *, to: str
) -> dict[str, list[nn.Linear]]:
    """Return the chosen weights by name, each with the linear layers that share it.

    Left out are the output head, weights that are tied to an embedding, and weights that are quantized already.

    Args:
        model: any module.
        include, exclude: regular expressions, searched in names of parameters, that decide before any other rule. For
            a shared weight, they are searched in all its names.
        to: a verb for the messages, such as "convert".

    Raises:
        ValueError: a pattern matches nothing, a chosen weight is also used by a module that is no linear layer, or
            nothing is left to choose.
    """
    # By identity, because several layers may hold the same weight.
    users: dict[int, list[nn.Linear]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        if weight is not None and weight.numel() and not is_packed(weight):
            users.setdefault(id(weight), []).append(cast(nn.Linear, module))
    named: list[tuple[str, Tensor]] = list(model.named_parameters(remove_duplicate=False))
    candidates = [(name, p) for name, p in named if id(p) in users]
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no linear layers with float weights; nothing to {to}")
    _must_match(candidates, include=include)
    _must_match(named, exclude=exclude)
    rules = dict(_rules(model))
    chosen = {}
    names: dict[int, list[str]] = {}
    for name, p in candidates:
        names.setdefault(id(p), []).append(name)
    for key, all_names in names.items():
        wanted = any(_any_match(include, name) for name in all_names) or rules[key] != "plain"
        if wanted and not any(_any_match(exclude, name) for name in all_names):
            chosen[all_names[0]] = users[key]
    if not chosen:
        raise ValueError(
            "every nn.Linear is excluded, the head, or tied to an embedding; name layers in `include`. Layers of other "
            "classes, such as the Conv1D of GPT-2, stay as they are"
        )
    # A module of another class, such as an embedding, would keep the old weight.
    for name, layers in chosen.items():
        holders = [type(m).__name__ for m in model.modules() for p in m._parameters.values() if p is layers[0].weight]
        if len(holders) != len(layers):
            raise ValueError(
                f"{name} is shared by {', '.join(holders)}; to {to} it, only linear layers may use it. "
                "Take it out of `include`, or untie it first"
            )
    return chosen
