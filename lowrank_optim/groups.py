"""Make param groups of a model: the type of a parameter's module decides whether it is projected, not its name."""

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
# Names that attention modules give to their projections and to the number of their heads. Query comes first. A module
# must have all three inputs of a set; its output may be in another module.
_INPUTS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
_OUTPUTS = ("o_proj", "out_proj", "o")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads")

Heads = tuple[int, str]  # the number of heads, and the side to project so that heads are blocks of the other side


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
    """Return named param groups for any optimizer of this package: matrices to project, other matrices, vectors.

    Linear layers (also of attention modules and of transformers' Conv1D), convolutions and stacks of experts are
    projected. Embeddings, the output head, norms, biases and matrices with a side below `min_dim` are not. A tied
    weight appears once. Frozen parameters are left out.

    Args:
        model: any module, also on the meta device.
        rank: of all projected matrices. None leaves it to the optimizer's `rank`.
        include, exclude: regular expressions, searched in parameter names, that decide before any other rule.
        min_dim: the smallest side that is worth projecting.
        decay_vectors: False gives vectors and scalars `weight_decay=0`, as is customary.
        heads: for `GaLorePlusAdamW`. True puts the matrices of attention modules into groups with the keys `heads` and
            `proj_type`: heads are blocks of rows in query, key and value ("right"), and blocks of columns in the output
            ("left"). Recognized are torch's MultiheadAttention, and modules with linear layers `q_proj`, `k_proj`,
            `v_proj` (or `query`, `key`, `value`; or `q`, `k`, `v`), an output `o_proj`, `out_proj` or `o`, and a
            `head_dim`, `num_heads`, `num_attention_heads` or `n_heads` of the module or of its `config`.
        verbose: print one line with the number of parameters of each kind.
        options: further keys for the projected groups, such as `scale=0.25`. A `proj_type` is for the matrices without
            heads.

    Raises:
        TypeError: `model` is no module; it may be the parameters of one.
        ValueError: a pattern of `include` or `exclude` matches no parameter, the model has no parameters that require
            gradients, or heads=True and no attention module with projected matrices is found.

    Example::

        opt = lowrank_optim.GaLoreAdamW(lowrank_optim.param_groups(model, rank=128), lr=1e-3)
    """
    checks.module(model)
    named: list[tuple[str, Tensor]] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no parameters that require gradients; unfreeze a part of it first")
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
            # "auto" means that no module type decides. A bare parameter, such as an embedding of positions, can only
            # be recognized by its name.
            table = kind == "auto" and bool(names_say(name))
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
    """Return the heads of the projected matrices, by the id of the parameter; {} if they are not wanted."""
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
            f"module with head_dim or {'/'.join(_COUNTS)}. Leave heads=True out, and set the keys 'heads' and "
            "'proj_type' of the groups yourself"
        )
    return headed


def _heads(model: nn.Module) -> Iterator[tuple[int, Heads]]:
    """Yield (id of a parameter, its heads) for the projections of attention modules."""
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
            # In grouped-query attention, key and value have fewer heads than query, and so fewer rows.
            yield from (
                (id(w), (shape_of(w)[0] // width, "right"))
                for w in inputs
                if w is not None and not shape_of(w)[0] % width
            )
            if output is not None and not shape_of(output)[1] % width:
                yield id(output), (shape_of(output)[1] // width, "left")


def _head_width(module: nn.Module, hidden: int) -> int:
    """Return the number of rows of a head, among the `hidden` rows of the query; 0 if the module does not tell."""
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
    """Yield (parameters, keys of their group): first the parameters without heads, then a pair per `Heads`."""
    parts: dict[Heads | None, list[tuple[str, Tensor]]] = {None: []}
    for name, p in named:
        parts.setdefault(headed.get(id(p)), []).append((name, p))
    for heads, part in parts.items():
        yield part, {} if heads is None else {"heads": heads[0], "proj_type": heads[1]}


def _rules(model: nn.Module) -> Iterator[tuple[int, str]]:
    """Yield (id of a parameter, its kind) where the type of its module decides. Later pairs replace earlier ones."""
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
    """Whether any of the regular expressions is found in a name."""
    return any(re.search(pattern, name) for pattern in patterns)


def _must_match(named: list[tuple[str, Tensor]], **options: Iterable[str]) -> None:
    """Raise a ValueError for a pattern that matches no name; `options` are lists of patterns by option."""
    for option, patterns in options.items():
        if isinstance(patterns, str):
            raise ValueError(f"{option} must be a list of regular expressions, got the string {patterns!r}")
        for pattern in patterns:
            if not any(re.search(pattern, name) for name, _ in named):
                raise ValueError(f"{option} pattern {pattern!r} matches no parameter; the first is {named[0][0]!r}")


def _summary(members: dict[str, list[tuple[str, Tensor]]], headed: dict[int, Heads]) -> str:
    """Return the line that `verbose` prints."""

    def count(*kinds: str) -> str:
        tensors = [p for kind in kinds for _, p in members[kind]]
        return f"{len(tensors)} ({sum(shape_of(p).numel() for p in tensors) / 1e6:.2f}M)"

    matrices = count("auto", "flatten", "batch") + " matrices to project"
    matrices += f" ({len(headed)} of them with heads)" if headed else ""
    return f"param_groups: {matrices}, {count('plain')} other matrices, {count('vector')} vectors"
