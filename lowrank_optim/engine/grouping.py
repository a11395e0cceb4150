"""Who is updated together: members with equal matrices are formed into chunks, in an order that caches like."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..recipe.recipe import Recipe
from ..recipe.store import Shape, Spec, Store
from ..recipe.weights import WEIGHT, working_dtype
from . import fused, limits
from .chunk import Chunk
from .member import Member, RecipeOf
from .watch import Watch


class Kind(NamedTuple):
    """What is the same for all equal parameters of a group.

    Attributes:
        spec, shapes: of their state, the latter also of the weight.
        dtypes: of the state, where all of it and the weight are worked on as they are stored; None: some is opened.
        listed: a kernel takes lists of them.
    """

    recipe: Recipe
    spec: dict[str, Spec]
    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype] | None
    listed: bool

    def lies(self, state: dict[str, Tensor]) -> bool:
        """It is as kernels want it: nothing to be opened, and no model that was cast since the state was made."""
        for key, dtype in (self.dtypes or {}).items():
            x = state[key]
            if x.dtype is not dtype or not x.is_contiguous():
                return False
        return self.dtypes is not None


@dataclass
class Asked:
    """What recipes have answered during one step: filled as it goes along.

    Attributes:
        recipes: by group, and whether the parameter is projected.
    """

    recipes: dict[tuple[int, bool], Recipe] = field(default_factory=dict)
    kinds: dict[tuple[Any, ...], Kind] = field(default_factory=dict)

    def kind(self, one: Member, recipe_of: RecipeOf) -> Kind:
        key = id(one.group), one.layout.key, one.plan.kind, one.p.dtype, one.p.device
        found = self.kinds.get(key)
        if found is None:
            found = self.kinds[key] = self._kind(one, recipe_of)
        return found

    def _kind(self, one: Member, recipe_of: RecipeOf) -> Kind:
        p, group, plan, layout = one.p, one.group, one.plan, one.layout
        recipe = self.recipes.get((id(group), plan.projected)) or recipe_of(plan, group)
        self.recipes[id(group), plan.projected] = recipe
        spec = layout.spec(recipe.spec(layout.matrix(plan), plan.rank or 0, plan.small))
        shapes = {name: one.shape for name, one in spec.items()} | {WEIGHT: layout.weight(plan)}
        whole = fused.whole(recipe) is not None and not (recipe.aged or group["maximize"])
        listed = (fused.listed(recipe) if plan.projected else whole) and fused.takes(p)
        return Kind(recipe, spec, shapes, _dtypes(spec, p), listed)


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
        recipe = asked.kind(member, recipe_of).recipe
        alone = None if stacked(member) and (plan.projected or recipe.elementwise) else id(p)
        equal = plan.matrix, plan.batch, plan.side, plan.rank, p.dtype, member.grad.dtype, p.device, member.projected
        buckets.setdefault((id(group), int(member.state["step"]) + 1, alone, member.layout.key, *equal), []).append(
            member
        )
    for (_, step, *_), bucket in buckets.items():
        p, group, _, projected, plan, layout, _ = bucket[0]
        recipe, spec, shapes, *_ = asked.kind(bucket[0], recipe_of)
        most = layout.most(plan)
        limit = max(1, limits.CHUNK_BYTES // (working_dtype(p).itemsize * max(1, most)))
        for start in range(0, len(bucket), limit):
            some = bucket[start : start + limit]
            homes = [one.p.detach() for one in some]
            yield Chunk(
                recipe=recipe,
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
    return not one.p.is_cpu if one.group["foreach"] is None else bool(one.group["foreach"])


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
