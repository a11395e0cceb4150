"""Equal matrices on their way through one step: opened from memory, worked on in float32, written back once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..distributed.layout import HERE, Layout
from ..ops import round_to_bfloat16, stream_of
from ..ops.philox import Places
from ..recipe.algebra import WHOLE, Algebra
from ..recipe.plan import Plan
from ..recipe.recipe import AGE, Clock, Recipe, Refresh, State
from ..recipe.store import Kept, Noise, Shape, Spec, Store
from ..recipe.weights import COMPENSATION, WEIGHT, unpacked
from . import limits
from .device_numbers import Numbers
from .open_state import Opened, Stored
from .watch import Watch


@dataclass
class Chunk:
    """One matrix on CPU; elsewhere as many equal ones as fit the limit, stacked.

    Attributes:
        plans, params, grads, states: one entry per parameter, or one piece of a parameter.
        watch: takes note of what happens.
        numbers: of this step, on the device, where it is to be captured.
        projected: the gradients are coordinates already, accumulated during backward.
        start: number of the first element, where this is a slice of a plain parameter.
        first: number of the first matrix, where this is a part of a stack of experts.
        layout, algebra: of the matrices; all else here is what this process has of them.
        most: elements of one parameter, in the process that has the most of it.
        homes: what the params were taken from, which may be other memory.
        packed: the weights store themselves in fewer bits and do their own rounding.
        due: False: it is known that no matrix is due for a refresh.
    """

    recipe: Recipe
    group: dict[str, Any]
    step: int  # the number of this step: 1, 2, ...
    spec: dict[str, Spec]
    plans: list[Plan]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    working: torch.dtype  # of all arithmetic
    watch: Watch
    numbers: Numbers | None = None
    projected: bool = False
    start: int = 0
    first: int = 0
    partial: bool = False  # a flat slice: there is no matrix to be turned
    layout: Layout = HERE
    algebra: Algebra = WHOLE
    most: int = 0
    packed: bool = False
    due: bool = True
    shapes: Mapping[str, Shape] = field(default_factory=dict)  # as before slicing: of each state, and of the weight
    homes: list[Tensor] = field(default_factory=list)

    @property
    def lr(self) -> Clock:
        return float(self.group["lr"]) if self.numbers is None else self.numbers.lr

    @property
    def now(self) -> Clock:
        """The number of this step."""
        return float(self.step) if self.numbers is None else self.numbers.step

    @property
    def time(self) -> int | Tensor:
        """The same for random streams."""
        return self.step if self.numbers is None else self.numbers.time

    def gradient(self, as_kept: bool = False) -> Tensor:
        """G as `(m, n)` or `(b, m, n)`, to be read only: it may be the memory of `p.grad`. `as_kept`: in its dtype."""
        return self._open(self.grads, self._oriented, as_kept)

    def coordinates(self) -> Tensor:
        """R as `(r, n)` or `(b, r, n)`, where the gradients are that."""
        return self._open(self.grads, lambda plan, x: x)

    def open(self, keys: Iterable[str] | None = None) -> Opened:
        """The state tensors of the recipe's parts, writable, `(b, *spec.shape)` for a batch; or those of some names."""
        st = Opened(self.spec if keys is None else keys, self._opened, self._stored, self._split)
        if len(self.plans) == 1:  # what takes no copy to open is open
            for key in st:
                if not cast(Store, self.spec[key].store).narrow:
                    st[key] = self._read(0, key)
        return st

    def close(self, st: Opened, refreshed: bool, purpose: str = "") -> None:
        """Writes the opened state back, where the open tensor is not the stored one. Bases only change at refreshes.

        `purpose` tells the random numbers apart of several closings in one step.
        """
        for key, spec in self.spec.items():
            if not st.is_open(key) or (spec.steady and not refreshed):
                continue
            for i, x in enumerate(self._split(st[key])):
                if x is self.states[i].get(key):
                    continue  # opened without a copy
                kept = self._kept(i, key)
                if kept[""].data_ptr() != x.data_ptr() or not x.numel():
                    noise = None if spec.steady else self._noise(i, key, purpose)
                    cast(Store, spec.store).write_(kept, x, noise)

    def _opened(self, key: str) -> Tensor:
        return self._stacked([self._read(i, key) for i in range(len(self.plans))])

    def _stored(self, key: str) -> list[Stored]:
        store = cast(Store, self.spec[key].store)
        return [Stored(store, self._kept(i, key), self._noise(i, key)) for i in range(len(self.plans))]

    def _noise(self, i: int, key: str, purpose: str = "") -> Noise:
        stream, start = stream_of(purpose + key, self.time), self._number(key, math.prod(self.spec[key].shape))
        return self.plans[i].key, stream, start

    def _read(self, i: int, key: str) -> Tensor:
        spec = self.spec[key]
        return cast(Store, spec.store).read(self._kept(i, key), spec.shape, self.working)

    def _kept(self, i: int, key: str) -> dict[str, Tensor]:
        """The stored tensors of one name, by suffix."""
        state, suffixes = self.states[i], cast(Store, self.spec[key].store).suffixes
        if not self.plans[i].batch or self.partial:
            return {suffix: state[key + suffix] for suffix in suffixes}
        return {suffix: self._batched(self.plans[i], state[key + suffix]) for suffix in suffixes}

    @property
    def narrow(self) -> bool:
        """W is kept in 16 bits where a block of it can be written, so no step needs all of it in 32."""
        numbers = self._number(WEIGHT, 1)
        if isinstance(numbers, Places) and (self.partial or numbers.run != self.params[0].shape[-1]):
            return False  # whose random numbers do not go on evenly from row to row
        kept = [*self.params, *(state[COMPENSATION] for state in self.states if COMPENSATION in state)]
        return all(x.dtype != self.working and x.is_contiguous() and not self.packed for x in kept)

    def blank(self) -> Tensor:
        """Something with the shape of W, the dtype of arithmetic, and next to no memory."""
        one, batched = self._oriented(self.plans[0], self.params[0]), self.plans[0].batch and not self.partial
        stacked = () if len(self.params) == 1 else (len(self.params) * self.plans[0].count,)
        shape = (*stacked, *one.shape[1:]) if batched and stacked else (*stacked, *one.shape)
        return one.new_empty((), dtype=self.working).expand(shape)

    def weights(self, as_kept: bool = False) -> Tensor:
        """W as `(m, n)` or `(b, m, n)`, in the working dtype, with what Kahan's compensation still owes.

        `as_kept`: in its dtype, without that, to be read only.
        """
        if as_kept:
            return self._open(self.params, self._oriented, as_kept)
        params = [unpacked(p, self.working) for p in self.params] if self.packed else self.params
        w = self._open(params, self._oriented)
        if COMPENSATION in self.states[0]:
            w.add_(self._open([state[COMPENSATION] for state in self.states], self._oriented))
        return w

    def write_weights(self, w: Tensor) -> None:
        """Rounds W to the parameters' dtype, once, as `bf16_update` says."""
        for plan, p, state, x in zip(self.plans, self.params, self.states, self._split(w), strict=True):
            if not self.packed and p.data_ptr() == x.data_ptr():
                continue
            natural = x if self.partial else plan.natural(x)
            if self.packed:
                cast(Any, p).pack_(natural, plan.key, stream_of(WEIGHT, self.time))
            elif COMPENSATION in state:
                p.copy_(natural)
                state[COMPENSATION].copy_(natural - p)
            elif p.dtype == torch.bfloat16 and self.group["bf16_update"] == "stochastic":
                start = self._number(WEIGHT, math.prod(plan.matrix))
                p.copy_(round_to_bfloat16(natural, plan.key, stream_of(WEIGHT, self.time), start))
            else:
                p.copy_(natural)

    def leave_(self) -> None:
        """Brings new weights to where they belong."""
        if self.layout is not HERE:
            for p, w in zip(self.homes, self.params, strict=True):
                self.layout.leave_(p, w)

    def _number(self, key: str, size: int) -> int | Places:
        """Of the first element of a state, or of the weight, within the whole parameter; `size` of one matrix."""
        element = self.start + self.first * size
        if self.layout is HERE:
            return element
        return self.layout.number(self.shapes.get(key, ()), element, bool(self.plans[0].batch))

    def clock(self, st: State) -> Clock:
        """Steps that the moments have seen, this one included."""
        if AGE in st:
            return ages_(st, self.recipe.refresh, self.working)
        if self.numbers is not None:
            return self.numbers.t if self.numbers.t.numel() > 1 else self.numbers.t.view(())
        if not self.restarts:
            return float(self.step)
        ages = self.ages()
        if len(ages) == 1 or (not self.plans[0].projected and bool((ages == ages[0]).all())):
            return float(ages[0])
        there = ages.to(self.params[0].device, self.working, non_blocking=True)
        return there.view(-1, *[1] * len(self.plans[0].matrix))

    @property
    def restarts(self) -> bool:
        return self.recipe.refresh.restarts

    def ages(self) -> Tensor:
        """Steps that the moments of each matrix have seen, this one included, on the CPU."""
        if not self.restarts:
            return torch.full((1,), self.step, device="cpu")
        births = torch.cat([state["refreshed_at"].view(-1) for state in self.states])
        return self.step - births.clamp(min=0)

    def tell_(self) -> None:
        """Writes the numbers of this step."""
        if self.numbers is not None:
            kept = [state["refreshes"].view(-1) for state in self.states if "refreshes" in state]
            counts = torch.cat(kept) if kept else torch.zeros_like(self.numbers.counts)
            self.numbers.tell_(self.group["lr"], self.step, self.ages(), counts)

    def pieces(self) -> Iterator[Chunk]:
        """This chunk, cut if it is one large parameter: a plain one on CPU into slices, a stack into some experts."""
        p, g = self.params[0], self.grads[0]
        if not self.plans[0].count:
            return iter(())  # other processes have all of the experts
        if len(self.params) == 1 and p.is_contiguous() and g.is_contiguous():
            copied = p.device.type == "cpu" or p.dtype != self.working
            sliced = self.recipe.elementwise and copied and not self.packed
            whole_blocks = not self.plans[0].batch or math.prod(self.plans[0].matrix) % self._block == 0
            if sliced and whole_blocks and not self.plans[0].projected and p.numel() > self._slice:
                return self._slices(p, g)
            if self.plans[0].batch and self.bytes > limits.CHUNK_BYTES and not self.packed:
                return self._experts(p, g)
        return iter([self])

    @property
    def silent(self) -> bool:
        """Nothing of it is sent, however it is cut."""
        return self.algebra is WHOLE or (self.recipe.elementwise and not self.plans[0].projected)

    @property
    def bytes(self) -> int:
        """Of the parameters in the working dtype, or of the largest share of them that a process has."""
        return len(self.params) * self.most * self.working.itemsize

    @property
    def _block(self) -> int:
        """Elements that nothing may cut between, of all state tensors."""
        return max([1, *(cast(Store, spec.store).block for spec in self.spec.values())])

    @property
    def _slice(self) -> int:
        """Elements of a plain parameter updated at once: G, D and W of them are a chunk where launches cost time."""
        return (
            limits.SLICE if self.params[0].device.type == "cpu" else limits.CHUNK_BYTES // (4 * self.working.itemsize)
        )

    def _slices(self, p: Tensor, g: Tensor) -> Iterator[Chunk]:
        """Along the row-major order, nowhere within a block of elements that are coded together."""
        stores = {key: cast(Store, spec.store) for key, spec in self.spec.items()}
        before = self.first * math.prod(self.plans[0].matrix)
        size, whole = max(1, self._slice // self._block) * self._block, Kept((), p.dtype)
        parts = {COMPENSATION: whole} if COMPENSATION in self.states[0] else {}
        for key, store in stores.items():
            layout = store.layout(self.spec[key].shape, self.working)
            parts |= {key + suffix: kept for suffix, kept in zip(store.suffixes, layout, strict=True)}
        flat = {key: self.states[0][key].view(-1) for key in parts}
        for start in range(0, p.numel(), size):
            stop = min(start + size, p.numel())
            state = {key: flat[key][start // kept.per : -(-stop // kept.per)] for key, kept in parts.items()}
            state |= {key: self.states[0][key] for key in ("refreshed_at",) if key in self.states[0]}
            spec = {key: one._replace(shape=(stop - start,)) for key, one in self.spec.items()}
            params, grads = [p.view(-1)[start:stop]], [g.view(-1)[start:stop]]
            own = replace(self, spec=spec, params=params, grads=grads, states=[state], first=0, partial=True)
            own.start = before + start
            yield own

    def _experts(self, p: Tensor, g: Tensor) -> Iterator[Chunk]:
        plan, count = self.plans[0], self.plans[0].count
        size = max(1, limits.CHUNK_BYTES * count // self.bytes)
        rows = {key: t.view(count, *t.shape[len(plan.batch) :]) for key, t in self.states[0].items() if t.dim()}
        matrices, gradients = p.view(count, *p.shape[-2:]), g.view(count, *g.shape[-2:])
        for first in range(0, count, size):
            piece = slice(first, first + size)
            w, state = matrices[piece], {key: tensor[piece] for key, tensor in rows.items()}
            part = replace(plan, batch=(len(w),), shape=tuple(w.shape))
            grads, most = [gradients[piece]], -(-self.most // count) * len(w)
            numbers = None if self.numbers is None else self.numbers.some(piece)
            own = replace(self, plans=[part], params=[w], grads=grads, states=[state], numbers=numbers, most=most)
            own.first = self.first + first
            yield own

    def matrices(self) -> Iterator[tuple[Plan, dict[str, Tensor], int, int]]:
        """(plan, state, number within its parameter, number within this chunk) of every matrix."""
        for index, (plan, state) in enumerate(zip(self.plans, self.states, strict=True)):
            for inner in range(plan.count):
                yield plan, state, inner, index * plan.count + inner

    def _open(self, tensors: list[Tensor], view: Callable[[Plan, Tensor], Tensor], as_kept: bool = False) -> Tensor:
        views = [view(plan, x) for plan, x in zip(self.plans, tensors, strict=True)]
        return self._stacked([x if as_kept or x.dtype == self.working else x.to(self.working) for x in views])

    def _stacked(self, views: list[Tensor]) -> Tensor:
        if len(views) == 1:
            return views[0]
        return torch.cat([x if self.plans[0].batch else x.unsqueeze(0) for x in views])

    def _split(self, x: Tensor) -> list[Tensor]:
        if len(self.params) == 1:
            return [x]
        return list(torch.split(x, self.plans[0].count) if self.plans[0].batch else x.unbind(0))

    def _oriented(self, plan: Plan, x: Tensor) -> Tensor:
        return x if self.partial else plan.oriented(x)

    def _batched(self, plan: Plan, x: Tensor) -> Tensor:
        return x.view(-1, *x.shape[len(plan.batch) :]) if plan.batch and not self.partial else x


def ages_(st: State, refresh: Refresh, working: torch.dtype) -> Tensor:
    """Steps that coordinates or entries have seen, this one included; it is counted here."""
    age = st[AGE].add_(1).to(working)
    return age if refresh.entrywise else age.unsqueeze(-1)
