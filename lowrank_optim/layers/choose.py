"""Which linear layers of a model are meant, where their weights are to be replaced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from ..chunk import is_packed
from ..groups import _any_match, _must_match, _rules


def linears(
    model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = (), *, to: str
) -> dict[str, list[nn.Linear]]:
    """The names of the weights, each with the layers that share it: not the head, nor what is tied to an embedding.

    Weights that are quantized already are left out.

    Args:
        model: any module.
        include, exclude: regular expressions, searched in names of parameters, that decide before anything else.
        to: what is to be done with them, a verb for the messages.

    Raises:
        ValueError: a pattern that matches nothing, a chosen weight that something other than linear layers uses, or
            nothing left.
    """
    users: dict[int, list[nn.Linear]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        if weight is not None and weight.numel() and not is_packed(weight):
            users.setdefault(id(weight), []).append(cast(nn.Linear, module))
    named: list[tuple[str, Tensor]] = list(model.named_parameters())
    candidates = [(name, p) for name, p in named if id(p) in users]
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no linear layers with float weights; nothing to {to}")
    _must_match(candidates, include=include)
    _must_match(named, exclude=exclude)
    rules = dict(_rules(model))
    chosen = {}
    for name, p in candidates:
        wanted = _any_match(include, name) or rules[id(p)] != "plain"
        if wanted and not _any_match(exclude, name):
            chosen[name] = users[id(p)]
    if not chosen:
        raise ValueError("every linear layer is excluded, the head, or tied to an embedding; name some in `include`")
    for name, layers in chosen.items():
        others = [type(m).__name__ for m in model.modules() for p in m._parameters.values() if p is layers[0].weight]
        if len(others) != len(layers):
            raise ValueError(
                f"{name} is shared by {', '.join(others)}; to {to} it, only linear layers may use it. "
                "Take it out of `include`, or untie it first"
            )
    return chosen
