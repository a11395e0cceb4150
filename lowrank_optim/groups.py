"""Param groups of a model: which parameters are projected, judged by the type of their module and not by their name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from . import checks
from .recipe.plan import as_matrices, names_say, shape_of

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
# What attention modules call their projections (queries first, which all must have; outputs may be elsewhere), and the
# number of their heads.
_INPUTS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
_OUTPUTS = ("o_proj", "out_proj", "o")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads")

Heads = tuple[int, str]  # their number, and the side that is projected where they are equal blocks of the other one


def param_groups(
    model: nn.Module,
    *,
    rank: int | float | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    min_dim: int = 16,
    decay_vectors: bool = False,
    heads: bool = False,
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
        heads: for `GaLorePlusAdamW`: True gives the matrices of attention modules groups with `heads` and `proj_type`:
            query, key and value their heads as blocks of rows ("right"), the output as blocks of columns ("left").
            Understood are torch's MultiheadAttention, and modules with linear layers `q_proj`, `k_proj`, `v_proj`
            (or `query`, `key`, `value`; or `q`, `k`, `v`), an output `o_proj`, `out_proj` or `o`, and a `head_dim`,
            `num_heads`, `num_attention_heads` or `n_heads` of their own or of their `config`.
        verbose: print one line that says what was decided.
        options: further keys for the groups that are projected, such as `scale=0.25`. A `proj_type` is for the matrices
            without heads.

    Raises:
        TypeError: no module, such as its parameters.
        ValueError: a pattern of `include` or `exclude` that matches no parameter, a model without parameters, or
            heads=True where no attention module is found among what is projected.

    Example::

        opt = lowrank_optim.GaLoreAdamW(lowrank_optim.param_groups(model, rank=128), lr=1e-3)
    """
    checks.module(model)
    named: list[tuple[str, Tensor]] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no parameters that require gradients; unfreeze some first")
    _must_match(named, include=include, exclude=exclude)
    rules = dict(_rules(model))
    members: dict[str, list[tuple[str, Tensor]]] = {"auto": [], "flatten": [], "batch": [], "plain": [], "vector": []}
    for name, p in named:
        kind = rules.get(id(p), "auto")
        shape = shape_of(p)
        if len(shape) < 2 or math.prod(shape) == max(shape):
            kind = "vector"
        elif _any_match(exclude, name):
            kind = "plain"
        elif _any_match(include, name):
            kind = "auto" if kind == "plain" else kind
        elif kind != "plain":
            table = kind == "auto" and bool(names_say(name))  # a bare parameter, such as an embedding of positions
            kind = "plain" if table or min(as_matrices(shape, kind)[1:]) < min_dim else kind
        members[kind].append((name, p))
    headed = _headed(model, members, heads)
    if verbose:
        print(_summary(members, headed))
    projected = {"skip_embeddings": False, **options} | ({} if rank is None else {"rank": rank})
    groups: list[dict[str, Any]] = []
    for kind in ("auto", "flatten", "batch"):
        for part, keys in _by_heads(members[kind], headed):
            groups.append({"params": part, **projected, "as_matrix": kind, **keys})
    groups.append({"params": members["plain"], "rank": None})
    groups.append({"params": members["vector"], "rank": None} | ({} if decay_vectors else {"weight_decay": 0.0}))
    return [group for group in groups if group["params"]]


def _headed(model: nn.Module, members: dict[str, list[tuple[str, Tensor]]], wanted: bool) -> dict[int, Heads]:
    """The heads of the matrices that are projected, by the id of the parameter; empty if they are not wanted."""
    if not isinstance(wanted, bool):
        raise ValueError(
            f"heads must be True (read them from the attention modules) or False, got {wanted!r}; give a number to the "
            "optimizer, or to a group as the key 'heads'"
        )
    if not wanted:
        return {}
    projected = {id(p) for kind in ("auto", "flatten", "batch") for _, p in members[kind]}
    headed = {key: found for key, found in _heads(model) if key in projected}
    if not headed:
        raise ValueError(
            f"heads=True finds no attention module in {type(model).__name__} whose matrices are projected. It looks "
            f"for nn.MultiheadAttention, and for linear layers {', '.join('/'.join(names) for names in _INPUTS)} in a "
            f"module with head_dim or {'/'.join(_COUNTS)}. Without heads=True, groups may have the keys 'heads' and "
            "'proj_type' of your own"
        )
    return headed


def _heads(model: nn.Module) -> Iterator[tuple[int, Heads]]:
    """(id of a parameter, its heads) for the projections of attention modules."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            width = module.head_dim
            inputs: list[Tensor | None] = [module.in_proj_weight]
            inputs += [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
            output: Tensor | None = module.out_proj.weight
        else:
            children = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
            names = next((names for names in _INPUTS if children.keys() >= set(names)), ())
            inputs = [children[name].weight for name in names]
            width = _head_width(module, shape_of(children[names[0]].weight)[0]) if names else 0
            output = next((children[name].weight for name in _OUTPUTS if name in children), None)
        if width:
            # Key and value have fewer heads than query where queries are grouped, and so fewer rows.
            yield from (
                (id(w), (shape_of(w)[0] // width, "right"))
                for w in inputs
                if w is not None and not shape_of(w)[0] % width
            )
            if output is not None and not shape_of(output)[1] % width:
                yield id(output), (shape_of(output)[1] // width, "left")


def _head_width(module: nn.Module, hidden: int) -> int:
    """Rows of one head among the `hidden` rows of the query, 0 if the module does not say."""
    width = getattr(module, "head_dim", None)
    if isinstance(width, int):
        return width
    for holder in (module, getattr(module, "config", None)):
        for name in _COUNTS:
            count = getattr(holder, name, None)
            if isinstance(count, int) and count > 0:
                return 0 if hidden % count else hidden // count
    return 0


def _by_heads(
    named: list[tuple[str, Tensor]], headed: dict[int, Heads]
) -> Iterator[tuple[list[tuple[str, Tensor]], dict[str, Any]]]:
    """The parameters without heads, then those with, one part per number and side; and their keys."""
    parts: dict[Heads | None, list[tuple[str, Tensor]]] = {None: []}
    for name, p in named:
        parts.setdefault(headed.get(id(p)), []).append((name, p))
    for heads, part in parts.items():
        yield part, {} if heads is None else {"heads": heads[0], "proj_type": heads[1]}


def _rules(model: nn.Module) -> Iterator[tuple[int, str]]:
    """(id of a parameter, its kind) where the type of its module decides; later ones win."""
    embeddings = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    tables = {tuple(shape_of(module.weight)) for module in embeddings}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, _CONVOLUTIONS):
            yield id(weight), "flatten"
        elif isinstance(module, nn.Linear):
            # The head is known by its name, or as the last linear layer if it has the shape of an embedding.
            last = module is linears[-1] and tuple(shape_of(module.weight)) in tables
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


def _summary(members: dict[str, list[tuple[str, Tensor]]], headed: dict[int, Heads]) -> str:
    def count(*kinds: str) -> str:
        tensors = [p for kind in kinds for _, p in members[kind]]
        return f"{len(tensors)} ({sum(shape_of(p).numel() for p in tensors) / 1e6:.2f}M)"

    matrices = count("auto", "flatten", "batch") + " matrices to project"
    matrices += f" ({len(headed)} of them with heads)" if headed else ""
    return f"param_groups: {matrices}, {count('plain')} other matrices, {count('vector')} vectors"
