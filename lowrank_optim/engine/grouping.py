"""Which members are updated together, and on which path.

A member is updated in place if its tensors need no opening, stacking, cutting or refitting: a kernel for lists then
serves many members, or `move_` runs on one. Any other member goes into a chunk, together with members that are equal in
everything that a stack needs. The decision takes longer than a small update, so it is kept as a list of works. It
depends on nothing but the `signature` of the members, and holds until that changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..distributed.layout import HERE
from ..recipe.plan import Plan
from ..recipe.recipe import Recipe
from ..recipe.store import Shape, Spec, Store
from ..recipe.weights import WEIGHT, is_packed, working_dtype
from . import fused, in_place, limits
from .chunk import Chunk
from .member import Member, RecipeOf
from .watch import Watch

InPlace = Callable[[Recipe, list[Member]], None]


class Recipes:
    """The recipes of all groups until a group is edited: one for projected parameters, one for plain ones.

    A recipe depends on the options of its group and not on lr, which a scheduler may change at each step.

    Args:
        recipe_of: a function of a plan and its group, such as `ParameterTable.recipe`.
        version: of the table when the groups were asked.
        before: recipes of the version before. A recipe that is still equal is replaced by the old object, so that
            signatures can be compared by identity.
    """

    def __init__(self, recipe_of: RecipeOf, version: int = 0, before: Recipes | None = None) -> None:
        self._ask, self.version = recipe_of, version
        self._before = {} if before is None else before.found
        self.found: dict[tuple[int, bool], Recipe] = {}

    def of(self, plan: Plan, group: dict[str, Any]) -> Recipe:
        """Return the recipe of a parameter."""
        key = id(group), plan.rank is not None
        recipe = self.found.get(key)
        # The comparison is paid once per edit. Signatures then compare recipes by identity, which is fast.
        if recipe is None:
            recipe, old = self._ask(plan, group), self._before.get(key)
            recipe = self.found[key] = old if old == recipe and old is not None else recipe
        return recipe


class Bucket(NamedTuple):
    """The facts about a chunk that stay the same from step to step.

    Attributes:
        spec: the state tensors of one matrix, by name.
        shapes: the shapes of these and of the weight, local ones in case of a shard.
        working: the dtype of the arithmetic.
        most: elements of one parameter, on the rank that has the most of it.
        packed: whether the weights store themselves in fewer bits and do their own rounding.
    """

    spec: dict[str, Spec]
    shapes: dict[str, Shape]
    working: torch.dtype
    most: int
    packed: bool


class Work(NamedTuple):
    """Members that are updated together on one path.

    Attributes:
        places: positions of the members within their batch.
        in_place: the function that updates them where they are stored; None if they form a chunk.
        bucket: the facts about their chunk.
        due: False if no matrix of the chunk is due for a refresh.
    """

    recipe: Recipe
    places: list[int]
    in_place: InPlace | None
    bucket: Bucket | None = None
    due: bool = True

    def chunk(self, members: list[Member], watch: Watch) -> Chunk:
        """Return the chunk of the members at `places`, with the gradients of this step."""
        first, (spec, shapes, working, most, packed) = members[0], cast(Bucket, self.bucket)
        layout, homes = first.layout, [member.p.detach() for member in members]
        chunk = Chunk(
            recipe=self.recipe,
            group=first.group,
            step=int(first.state["step"]) + 1,
            spec=spec,
            plans=[member.plan for member in members],
            params=homes,
            grads=[member.grad.detach() for member in members],
            states=[member.state for member in members],
            working=working,
            watch=watch,
            projected=first.projected,
            most=most,
            packed=packed,
            shapes=shapes,
            homes=homes,
            due=self.due,
        )
        # A shard: the plan, the weight and the gradient become those of the local part, and the algebra that of shards.
        if layout is HERE:
            return chunk
        return replace(
            chunk,
            plans=[layout.plan(plan) for plan in chunk.plans],
            params=[member.layout.enter(home) for member, home in zip(members, homes, strict=True)],
            grads=[member.layout.enter_gradient(grad) for member, grad in zip(members, chunk.grads, strict=True)],
            states=[layout.here_all(state) for state in chunk.states],
            first=layout.first(first.plan),
            layout=layout,
            algebra=layout.algebra([member.layout for member in members]),
        )


def signature(members: list[Member], recipes: Recipes, may_stay: bool) -> list[Any]:
    """Return everything that the works of these members depend on, to be compared with that of the last step.

    Args:
        may_stay: whether members may be updated in place. Compiled updates may not: they run on chunks.
    """
    # The limits are part of it because tests change them.
    found: list[Any] = [may_stay, limits.CHUNK_BYTES, limits.SLICE]
    # Steps count relative to the first member. All counts grow by one per step, and the signature stays the same.
    base = int(members[0].state["step"])
    for p, group, grad, projected, plan, layout, state in members:
        recipe = recipes.of(plan, group)
        step = int(state["step"])
        refreshed, due = 0, False
        # A stack has a clock per matrix. Comparing all of them would be slow, so its chunks always look for matrices
        # that are due.
        if not plan.batch and "refreshed_at" in state:
            refreshed = int(state["refreshed_at"])
            due = plan.projected and is_due(recipe, plan, state, step, refreshed)
        # Plans and layouts are frozen, and the table keeps them alive, so their identities are enough.
        found += (
            id(plan), id(layout), recipe,
            step - base, refreshed if recipe.refresh.restarts else 0, due, projected,
            p.dtype, p.device, p.is_contiguous(), grad.dtype, grad.is_contiguous(), group["foreach"], group["maximize"],
        )  # fmt: skip
        # A model may have been cast or loaded, and its state with it.
        for x in state.values():
            found += (x.dtype, x.is_contiguous())
    return found


def is_due(recipe: Recipe, plan: Plan, state: dict[str, Tensor], step: int, refreshed: int) -> bool:
    """Whether the basis of one matrix, not of a stack, is refitted before step `step` (0, 1, ...)."""
    counters = {key: state[key] for key in recipe.refresh.counters()}
    return recipe.refresh.due(step, refreshed, plan.place, counters)


def works(members: list[Member], recipes: Recipes, may_stay: bool) -> Iterator[Work]:
    """Yield the works of these members, those in place first. `may_stay`: see `signature`."""
    lists: dict[tuple[Any, ...], tuple[Recipe, list[int]]] = {}
    chunked = []
    for i, member in enumerate(members):
        recipe = recipes.of(member.plan, member.group)
        path = _path(member, recipe) if may_stay else None
        if path is None:
            chunked.append(i)
        else:
            # A list kernel takes one clock, one recipe and one dtype for all of its tensors.
            key = path, in_place.clock(member, recipe), id(recipe), member.p.dtype, member.p.device
            lists.setdefault(key, (recipe, []))[1].append(i)
    for (path, *_), (recipe, places) in lists.items():
        yield Work(recipe, places, path)
    for work in buckets([members[i] for i in chunked], recipes):
        # A bucket knows positions among its own members; a work has those within the whole batch.
        places = [chunked[i] for i in work.places]
        yield work._replace(places=places, due=any(_may_be_due(members[i], work.recipe) for i in places))


def _may_be_due(member: Member, recipe: Recipe) -> bool:
    """Whether a refresh is due, or may be: a stack has a clock per matrix, which signatures do not hold."""
    plan, state = member.plan, member.state
    if not plan.projected or member.projected:
        return False
    return (
        bool(plan.batch)
        or member.layout is not HERE
        or is_due(recipe, plan, state, int(state["step"]), int(state["refreshed_at"]))
    )


def _path(member: Member, recipe: Recipe) -> InPlace | None:
    """Return the function that updates a member where it is stored; None if the member needs a chunk."""
    p, group, grad, coordinates, plan, layout, state = member
    # A shard, R in place of G, a stack of experts and a packed weight all have to be translated first.
    if layout is not HERE or coordinates or plan.batch or is_packed(p):
        return None
    # Mixed dtypes must be widened, and kernels walk contiguous tensors.
    if grad.dtype is not p.dtype or not p.is_contiguous() or not _is_plain_state(member, recipe):
        return None
    # A plain parameter: one kernel from G to W where there is one for the whole rule, else the parts in turn.
    if not plan.projected:
        whole = fused.whole(recipe) is not None and not (recipe.aged or group["maximize"])
        if whole and fused.takes(p) and grad.is_contiguous():
            return in_place.whole_
        large = recipe.elementwise and p.numel() > limits.SLICE  # a chunk cuts it into slices that stay in cache
        return None if stacked(member) or large else in_place.alone_
    # A projected matrix between refreshes: products one by one, and the directions of many with one kernel.
    if stacked(member) or is_due(recipe, plan, state, int(state["step"]), int(state["refreshed_at"])):
        return None
    return in_place.together_ if fused.listed(recipe) and fused.takes(p) else in_place.alone_


def _is_plain_state(member: Member, recipe: Recipe) -> bool:
    """Whether all state is contiguous and in the working dtype, as kernels demand; a model may have been cast."""
    p, plan = member.p, member.plan
    if working_dtype(p) != p.dtype:
        return False
    for key, spec in recipe.spec(plan.matrix, plan.rank or 0, plan.small).items():
        store = cast(Store, spec.store)
        # Narrow state is opened, which a chunk does.
        if store.narrow:
            return False
        x = member.state[key]
        if x.dtype is not store.layout(spec.shape, p.dtype)[0].dtype or not x.is_contiguous():
            return False
    return True


def stacked(member: Member) -> bool:
    """Whether equal matrices are stacked; by default on accelerators, where launches cost more than copies."""
    foreach = member.group["foreach"]
    return not member.p.is_cpu if foreach is None else bool(foreach)


def buckets(members: list[Member], recipes: Recipes) -> Iterator[Work]:
    """Yield a work for each chunk: members that are equal in everything that a stack needs, cut to the byte limit."""
    equal: dict[tuple[Any, ...], list[int]] = {}
    for i, member in enumerate(members):
        p, group, grad, projected, plan, layout, state = member
        # A parameter that is not stacked gets a chunk of its own. So does a plain one whose rule is not elementwise: in
        # a stack its vectors (n,) would look like a matrix (b, n).
        recipe = recipes.of(plan, group)
        alone = None if stacked(member) and (plan.projected or recipe.elementwise) else id(p)
        matrix = plan.matrix, plan.batch, plan.side, plan.rank, p.dtype, grad.dtype, p.device, projected
        equal.setdefault((id(group), int(state["step"]) + 1, alone, layout.key, *matrix), []).append(i)
    for places in equal.values():
        p, group, _, _, plan, layout, _ = members[places[0]]
        recipe = recipes.of(plan, group)
        # Parts see the sides of the whole matrix, in which a cut side is marked; `layout.spec` then makes them local.
        spec = layout.spec(recipe.spec(layout.matrix(plan), plan.rank or 0, plan.small))
        shapes = {key: kept.shape for key, kept in spec.items()} | {WEIGHT: layout.weight(plan)}
        bucket = Bucket(spec, shapes, working_dtype(p), layout.most(plan), is_packed(p))
        # `most`, not the local size: all ranks must form the same chunks, or their sums would not match.
        limit = max(1, limits.CHUNK_BYTES // (bucket.working.itemsize * max(1, bucket.most)))
        for start in range(0, len(places), limit):
            yield Work(recipe, places[start : start + limit], None, bucket)


def waves(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Yield chunks whose sums over ranks are sent together. A chunk that sends nothing is yielded alone, at once.

    The chunks of a wave are together at most as large as one chunk may be, since a step holds all of them until their
    sums have arrived.
    """
    # A sum over ranks takes longer to begin than to send, so few large messages are faster than many small ones.
    wave: list[Chunk] = []
    for chunk in chunks:
        if chunk.silent:
            yield [chunk]
            continue
        if wave and sum(part.bytes for part in [*wave, chunk]) > limits.CHUNK_BYTES:
            yield wave
            wave = []
        wave.append(chunk)
    if wave:
        yield wave
