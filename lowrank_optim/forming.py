"""Who is updated together: members with equal matrices are formed into chunks, in an order that caches like."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import chunk as limits
from .chunk import WEIGHT, Chunk, working_dtype
from .distributed.layout import Layout
from .kept import Shape, Spec, Store
from .plan import Plan
from .recipe import Recipe
from .stats import Watch

CACHE = 1 << 18  # bytes of gradients looked at together on CPU: what stays in cache until they are used


RecipeOf = Callable[[Plan, dict[str, Any]], Recipe]


class Member(NamedTuple):
    """A parameter in one step, with all that is known of it.

    Attributes:
        grad: whole and shaped like the parameter, or where it is `projected` only the coordinates R of it.
    """

    p: Tensor
    group: dict[str, Any]
    grad: Tensor
    projected: bool
    plan: Plan
    layout: Layout
    state: dict[str, Tensor]


class Tensors(NamedTuple):
    """The state of a kind of matrix.

    Attributes:
        shapes: of it and of the weight.
        dtypes: of what is worked on as it is stored, all of it; None: some has to be opened.
    """

    spec: dict[str, Spec]
    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype] | None

    def as_worked_on(self, state: dict[str, Tensor]) -> bool:
        """Nothing has to be opened, nor was the model cast since the state was made."""
        return self.dtypes is not None and all(state[key].dtype is dtype for key, dtype in self.dtypes.items())


@dataclass
class Asked:
    """What recipes have answered during one step: filled as it goes along.

    Attributes:
        recipes: by group, and whether the parameter is projected.
        specs: the state of each kind of matrix.
    """

    recipes: dict[tuple[int, bool], Recipe] = field(default_factory=dict)
    specs: dict[tuple[Any, ...], Tensors] = field(default_factory=dict)

    def recipe(self, one: Member, recipe_of: RecipeOf) -> Recipe:
        kind = id(one.group), one.plan.projected
        if kind not in self.recipes:
            self.recipes[kind] = recipe_of(one.plan, one.group)
        return self.recipes[kind]

    def tensors(self, one: Member) -> Tensors:
        """Of a member whose recipe has been asked for."""
        plan, layout, kind = one.plan, one.layout, (id(one.group), one.plan.projected)
        key = kind, layout.key, plan.matrix, plan.rank, plan.side, plan.small, one.p.dtype
        if key not in self.specs:
            spec = layout.spec(self.recipes[kind].spec(layout.matrix(plan), plan.rank or 0, plan.small))
            shapes = {name: one.shape for name, one in spec.items()} | {WEIGHT: layout.weight(plan)}
            self.specs[key] = Tensors(spec, shapes, _dtypes(spec, one.p))
        return self.specs[key]


def _dtypes(spec: dict[str, Spec], p: Tensor) -> dict[str, torch.dtype] | None:
    stores = {key: cast(Store, one.store) for key, one in spec.items()}
    if working_dtype(p) != p.dtype or any(store.narrow for store in stores.values()):
        return None
    return {key: store.layout(spec[key].shape, p.dtype)[0].dtype for key, store in stores.items()}


def form_chunks(members: list[Member], recipe_of: RecipeOf, asked: Asked, watch: Watch) -> Iterator[Chunk]:
    """Buckets by everything that must be equal, cut to the byte limit."""
    buckets: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        p, group, plan = member.p, member.group, member.plan
        kind, recipe = (id(group), plan.projected), asked.recipe(member, recipe_of)
        alone = None if stacked(member) and (plan.projected or recipe.elementwise) else id(p)
        equal = plan.matrix, plan.batch, plan.side, plan.rank, p.dtype, member.grad.dtype, p.device, member.projected
        buckets.setdefault((kind, int(member.state["step"]) + 1, alone, member.layout.key, *equal), []).append(member)
    for (kind, step, *_), bucket in buckets.items():
        p, group, _, projected, plan, layout, _ = bucket[0]
        spec, shapes, _ = asked.tensors(bucket[0])
        most = layout.most(plan)
        limit = max(1, limits.CHUNK_BYTES // (working_dtype(p).itemsize * max(1, most)))
        for start in range(0, len(bucket), limit):
            some = bucket[start : start + limit]
            homes = [one.p.detach() for one in some]
            yield Chunk(
                recipe=asked.recipes[kind],
                group=group,
                step=step,
                spec=spec,
                plans=[layout.plan(one.plan) for one in some],
                params=[one.layout.enter(home) for one, home in zip(some, homes, strict=True)],
                grads=[one.layout.enter_gradient(one.grad.detach()) for one in some],
                states=[layout.here_all(one.state) for one in some],
                working=working_dtype(p),
                watch=watch,
                projected=projected,
                first=layout.first(plan),
                layout=layout,
                algebra=layout.algebra([one.layout for one in some]),
                most=most,
                shapes=shapes,
                homes=homes,
            )


def stacked(one: Member) -> bool:
    """On CPU a loop beats stacking."""
    return one.p.device.type != "cpu" if one.group["foreach"] is None else bool(one.group["foreach"])


def waves(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks whose sums over ranks are sent together; those that send nothing alone, at once.

    Together they are as large as one may be, and all that a step holds of them at a time."""
    some: list[Chunk] = []
    for chunk in chunks:
        if chunk.silent:
            yield [chunk]
            continue
        if some and sum(one.bytes for one in [*some, chunk]) > limits.CHUNK_BYTES:
            yield some
            some = []
        some.append(chunk)
    if some:
        yield some


def one_by_one(members: list[Member]) -> bool:
    """On CPU a gradient is still in cache from its norm when it is projected at once. Where gradients are stacked, on
    accelerators (one synchronisation), and where a bad one must stop all, the norms of all come first."""
    return all(
        one.p.device.type == "cpu" and not one.group["foreach"] and one.group["nonfinite"] == "skip" for one in members
    )


def in_cache(members: list[Member]) -> Iterator[list[Member]]:
    """Members whose gradients stay in cache together: large ones alone, and many small ones."""
    some: list[Member] = []
    size = 0
    for one in members:
        if one.grad.nbytes > CACHE:
            yield [one]
            continue
        if size + one.grad.nbytes > CACHE:
            yield some
            some, size = [], 0
        some.append(one)
        size += one.grad.nbytes
    if some:
        yield some


def gradient_norms(grads: list[Tensor]) -> list[float]:
    """One synchronisation per device; infinite also where only their squares would be."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, grad in enumerate(grads):
        kinds.setdefault((grad.device, grad.dtype), []).append(i)
    norms = [0.0] * len(grads)
    for same in kinds.values():
        working = working_dtype(grads[same[0]])
        limit = torch.finfo(working).max ** 0.5
        parts = [_norm_parts(grads[i]) for i in same]
        values = iter(torch.stack(torch._foreach_norm(list(chain(*parts)), 2, dtype=working)).tolist())
        for i, own in zip(same, parts, strict=True):
            norm = math.hypot(*islice(values, len(own)))
            norms[i] = norm if norm < limit else math.inf
    return norms


def _norm_parts(grad: Tensor) -> Sequence[Tensor]:
    """On CPU a norm widens all that it is given, so what is kept in 16 bits is given in slices."""
    large = grad.numel() > limits.SLICE and grad.is_contiguous()
    copied = large and grad.device.type == "cpu" and grad.dtype.itemsize < torch.float32.itemsize
    return torch.split(grad.view(-1), limits.SLICE) if copied else (grad,)
