"""Param groups of a model: which parameters are projected, judged by the type of their module and not by their name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from .plan import as_matrices, names_say

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def param_groups(
    model: nn.Module,
    *,
    rank: int | float | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    min_dim: int = 16,
    decay_vectors: bool = False,
    verbose: bool = True,
    **options: Any,
) -> list[dict[str, Any]]:
    """Named param groups for any optimizer here: matrices to project, other matrices, vectors.

    Linear layers (also of attention modules and of transformers' Conv1D), convolutions and stacks of experts are
    projected. Embeddings, the output head, norms, biases and matrices with a side below `min_dim` are not. A tied
    weight appears once; frozen parameters are left out.

    Args:
        model: any module, also on the meta device.
        rank: for all projected matrices; None leaves it to the optimizer's `rank`.
        include, exclude: regular expressions, searched in parameter names, that decide before anything else.
        min_dim: smallest side that is worth projecting.
        decay_vectors: False gives vectors and scalars `weight_decay=0`, as is customary.
        verbose: print one line that says what was decided.
        options: further keys for the groups that are projected, such as `scale=0.25`.

    Raises:
        ValueError: a pattern of `include` or `exclude` that matches no parameter, or a model without parameters.

    Example::

        opt = lowrank_optim.GaLoreAdamW(lowrank_optim.param_groups(model, rank=128), lr=1e-3)
    """
    named: list[tuple[str, Tensor]] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no parameters that require gradients; unfreeze some first")
    _must_match(named, include=include, exclude=exclude)
    rules = dict(_rules(model))
    members: dict[str, list[tuple[str, Tensor]]] = {"auto": [], "flatten": [], "batch": [], "plain": [], "vector": []}
    for name, p in named:
        kind = rules.get(id(p), "auto")
        if p.dim() < 2 or math.prod(p.shape) == max(p.shape):
            kind = "vector"
        elif _any_match(exclude, name):
            kind = "plain"
        elif _any_match(include, name):
            kind = "auto" if kind == "plain" else kind
        elif kind != "plain":
            table = kind == "auto" and bool(names_say(name))  # a bare parameter, such as an embedding of positions
            kind = "plain" if table or min(as_matrices(p.shape, kind)[1:]) < min_dim else kind
        members[kind].append((name, p))
    if verbose:
        print(_summary(members))
    projected = {"skip_embeddings": False, **options} | ({} if rank is None else {"rank": rank})
    keys: dict[str, dict[str, Any]] = {kind: {**projected, "as_matrix": kind} for kind in ("auto", "flatten", "batch")}
    keys["plain"] = {"rank": None}
    keys["vector"] = {"rank": None} if decay_vectors else {"rank": None, "weight_decay": 0.0}
    return [{"params": params, **keys[kind]} for kind, params in members.items() if params]


def _rules(model: nn.Module) -> Iterator[tuple[int, str]]:
    """(id of a parameter, its kind) where the type of its module decides; later ones win."""
    embeddings = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    tables = {tuple(module.weight.shape) for module in embeddings}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, _CONVOLUTIONS):
            yield id(weight), "flatten"
        elif isinstance(module, nn.Linear):
            # The head is known by its name, or as the last linear layer if it has the shape of an embedding.
            last = module is linears[-1] and tuple(module.weight.shape) in tables
            head = last or names_say(f"{name}.weight") == "head"
            yield id(weight), "plain" if head else "flatten"
    for module in embeddings:
        yield id(module.weight), "plain"  # wins over a tied head
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        yield id(output.weight), "plain"


def _any_match(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _must_match(named: list[tuple[str, Tensor]], **options: Iterable[str]) -> None:
    for option, patterns in options.items():
        if isinstance(patterns, str):
            raise ValueError(f"{option} must be a list of regular expressions, got the string {patterns!r}")
        for pattern in patterns:
            if not any(re.search(pattern, name) for name, _ in named):
                raise ValueError(f"{option} pattern {pattern!r} matches no parameter; the first is {named[0][0]!r}")


def _summary(members: dict[str, list[tuple[str, Tensor]]]) -> str:
    def count(*kinds: str) -> str:
        tensors = [p for kind in kinds for _, p in members[kind]]
        return f"{len(tensors)} ({sum(p.numel() for p in tensors) / 1e6:.2f}M)"

    matrices = count("auto", "flatten", "batch")
    return f"param_groups: {matrices} matrices to project, {count('plain')} other matrices, {count('vector')} vectors"
