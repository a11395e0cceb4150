"""Equal matrices on their way through one step: opened from memory, updated, and written back once.

A part sees one open tensor per name, in the dtype of the arithmetic: `(m, n)` for a single matrix, `(b, m, n)` for a
stack of b equal ones. In memory there is a weight, a gradient and a dict of stored tensors per parameter. A chunk
translates between the two: it turns, widens and stacks on the way in, and splits and rounds on the way out.

Stacking pays where a launch costs more than a small matrix. A CPU therefore has one parameter per chunk, and an
accelerator as many equal ones as `limits.CHUNK_BYTES` allows. A single parameter above the limit is cut into `pieces`.
"""

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
    """One parameter on a CPU; elsewhere as many equal ones as fit the limit, stacked. A piece of one is a chunk, too.

    All tensors are local. Only `layout` and `algebra` know that other ranks may hold other parts of the same matrices.

    Attributes:
        step: the number of this step: 1, 2, ...
        spec: the state tensors of one matrix, by name; `shapes` are the same before slicing, and of the weight.
        plans, params, grads, states: one entry per parameter.
        working: the dtype of all arithmetic.
        watch: the counters that refreshes write to.
        numbers: the changing numbers of this step on the device, if the step may be captured; else None.
        projected: whether the gradients are coordinates R already.
        start: the number of the first element within the parameter, if this is a slice of it.
        first: the number of the first matrix within the parameter, if this is a part of a stack of experts.
        partial: whether this is a flat slice, which has no matrix to be turned.
        layout, algebra: of the matrices.
        most: elements of one parameter, on the rank that has the most of it.
        packed: whether the weights store themselves in fewer bits and do their own rounding.
        due: False if it is known that no matrix is due for a refresh, so that no search is needed.
        homes: the tensors that `params` were taken from, which may be other memory.
    """

    recipe: Recipe
    group: dict[str, Any]
    step: int
    spec: dict[str, Spec]
    plans: list[Plan]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    working: torch.dtype
    watch: Watch
    numbers: Numbers | None = None
    projected: bool = False
    start: int = 0
    first: int = 0
    partial: bool = False
    layout: Layout = HERE
    algebra: Algebra = WHOLE
    most: int = 0
    packed: bool = False
    due: bool = True
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    homes: list[Tensor] = field(default_factory=list)

    # The next three are floats in a normal step, and tensors on the device in a step that may be captured.
    @property
    def lr(self) -> Clock:
        """Return the learning rate of this step."""
        return float(self.group["lr"]) if self.numbers is None else self.numbers.lr

    @property
    def now(self) -> Clock:
        """Return the number of this step."""
        return float(self.step) if self.numbers is None else self.numbers.step

    @property
    def time(self) -> int | Tensor:
        """Return the number of this step, for random streams."""
        return self.step if self.numbers is None else self.numbers.time

    def gradient(self, as_kept: bool = False) -> Tensor:
        """Return G as `(m, n)` or `(b, m, n)`, to be read only: it may be the memory of `p.grad`.

        `as_kept` leaves it in its own dtype.
        """
        return self._open(self.grads, self._oriented, as_kept)

    def coordinates(self) -> Tensor:
        """Return R as `(r, n)` or `(b, r, n)`, where the gradients are coordinates already."""
        return self._open(self.grads, lambda plan, x: x)

    def open(self, keys: Iterable[str] | None = None) -> Opened:
        """Return state tensors as parts see them: writable, `(*spec.shape)`, or `(b, *spec.shape)` for a stack.

        Args:
            keys: their names; None: all state of the recipe.
        """
        st = Opened(self.spec if keys is None else keys, self._opened, self._stored, self._split)
        # A single parameter whose store is not narrow needs no copy: its stored tensor is the open one.
        if len(self.plans) == 1:
            for key in st:
                if not cast(Store, self.spec[key].store).narrow:
                    st[key] = self._read(0, key)
        return st

    def close(self, st: Opened, refreshed: bool, purpose: str = "") -> None:
        """Write opened state back, unless the open tensor is the stored one.

        Args:
            refreshed: whether a basis was fitted. Bases only change then, so they are written only then.
            purpose: prefix of the random streams, so that several closings in one step round with different numbers.
        """
        for key, spec in self.spec.items():
            if not st.is_open(key) or (spec.steady and not refreshed):
                continue
            for i, x in enumerate(self._split(st[key])):
                # A tensor that was opened without a copy has been updated where it is stored.
                if x is self.states[i].get(key):
                    continue
                kept = self._kept(i, key)
                # So has a view of it. Empty tensors all have address 0, and writing them costs nothing.
                if kept[""].data_ptr() != x.data_ptr() or not x.numel():
                    # A moment may move by less than its last bit per step, so it is rounded stochastically. A basis
                    # changes only at refreshes, and is rounded to nearest.
                    noise = None if spec.steady else self._noise(i, key, purpose)
                    cast(Store, spec.store).write_(kept, x, noise)

    def _opened(self, key: str) -> Tensor:
        """Return the open tensor of a name, stacked over the parameters."""
        return self._stacked([self._read(i, key) for i in range(len(self.plans))])

    def _stored(self, key: str) -> list[Stored]:
        """Return the tensor of a name in stored form, parameter by parameter, for kernels that update it there."""
        store = cast(Store, self.spec[key].store)
        return [Stored(store, self._kept(i, key), self._noise(i, key)) for i in range(len(self.plans))]

    def _noise(self, i: int, key: str, purpose: str = "") -> Noise:
        """Return key, stream and number of the first element of the noise that rounds state `key` of parameter i."""
        stream, start = stream_of(purpose + key, self.time), self._number(key, math.prod(self.spec[key].shape))
        return self.plans[i].key, stream, start

    def _read(self, i: int, key: str) -> Tensor:
        """Return state `key` of parameter i in the working dtype."""
        spec = self.spec[key]
        return cast(Store, spec.store).read(self._kept(i, key), spec.shape, self.working)

    def _kept(self, i: int, key: str) -> dict[str, Tensor]:
        """Return the stored tensors of a name by suffix, `(count, ...)` each for a stack of experts."""
        state, suffixes = self.states[i], cast(Store, self.spec[key].store).suffixes
        if not self.plans[i].batch or self.partial:
            return {suffix: state[key + suffix] for suffix in suffixes}
        return {suffix: self._batched(self.plans[i], state[key + suffix]) for suffix in suffixes}

    @property
    def narrow(self) -> bool:
        """Whether W is stored in 16 bits and can be written block by block, so that no step holds all of it in 32."""
        numbers = self._number(WEIGHT, 1)
        # A block is rounded with noise whose numbers advance by one pitch from row to row. A flat slice of a shard, or
        # a stack whose matrices are cut by rows, has other gaps.
        if isinstance(numbers, Places) and (self.partial or numbers.run != self.params[0].shape[-1]):
            return False
        kept = [*self.params, *(state[COMPENSATION] for state in self.states if COMPENSATION in state)]
        return all(x.dtype != self.working and x.is_contiguous() and not self.packed for x in kept)

    def blank(self) -> Tensor:
        """Return a tensor with the shape of W and the dtype of the arithmetic, but with the memory of one element."""
        matrix, batched = self._oriented(self.plans[0], self.params[0]), self.plans[0].batch and not self.partial
        # Experts of several parameters form one stack (b, m, n), and so do several matrices (m, n).
        stacked = () if len(self.params) == 1 else (len(self.params) * self.plans[0].count,)
        shape = (*stacked, *matrix.shape[1:]) if batched and stacked else (*stacked, *matrix.shape)
        return matrix.new_empty((), dtype=self.working).expand(shape)

    def weights(self, as_kept: bool = False) -> Tensor:
        """Return W as `(m, n)` or `(b, m, n)`, in the working dtype, with the compensation of Kahan added.

        A single parameter in the working dtype is returned as a view, so that the update writes into the parameter.

        Args:
            as_kept: leave W in the dtype of the parameter and without compensation, to be read only.
        """
        if as_kept:
            return self._open(self.params, self._oriented, as_kept)
        params = [unpacked(p, self.working) for p in self.params] if self.packed else self.params
        w = self._open(params, self._oriented)
        if COMPENSATION in self.states[0]:
            w.add_(self._open([state[COMPENSATION] for state in self.states], self._oriented))
        return w

    def write_weights(self, w: Tensor) -> None:
        """Round W `(m, n)` or `(b, m, n)` to the dtype of the parameters, once, as `bf16_update` says."""
        for plan, p, state, x in zip(self.plans, self.params, self.states, self._split(w), strict=True):
            # The update has written into a view of the parameter already.
            if not self.packed and p.data_ptr() == x.data_ptr():
                continue
            natural = x if self.partial else plan.natural(x)
            if self.packed:
                cast(Any, p).pack_(natural, plan.key, stream_of(WEIGHT, self.time))
            elif COMPENSATION in state:
                p.copy_(natural)
                # The compensation is what rounding has just taken away. The next step adds it to W again.
                state[COMPENSATION].copy_(natural - p)
            elif p.dtype == torch.bfloat16 and self.group["bf16_update"] == "stochastic":
                start = self._number(WEIGHT, math.prod(plan.matrix))
                p.copy_(round_to_bfloat16(natural, plan.key, stream_of(WEIGHT, self.time), start))
            else:
                p.copy_(natural)

    def leave_(self) -> None:
        """Copy new weights to the tensors of `homes`, where a layout works on other memory."""
        if self.layout is not HERE:
            for p, w in zip(self.homes, self.params, strict=True):
                self.layout.leave_(p, w)

    def _number(self, key: str, size: int) -> int | Places:
        """Return the number of the first local element of state `key`, or of the weight, within the whole parameter.

        Rounding noise is addressed by these numbers, so that slices, experts and shards round as the whole does.

        Args:
            size: elements of one matrix.
        """
        element = self.start + self.first * size
        if self.layout is HERE:
            return element
        return self.layout.number(self.shapes.get(key, ()), element, bool(self.plans[0].batch))

    def clock(self, st: State) -> Clock:
        """Return the steps that the moments have seen, this one included; count them, where each entry has an age.

        The result is a number if all matrices agree, `(b, 1, 1)` if they restart apart, or ages that broadcast with R.
        """
        if AGE in st:
            return ages_(st, self.recipe.refresh, self.working)
        if self.numbers is not None:
            return self.numbers.t if self.numbers.t.numel() > 1 else self.numbers.t.view(())
        if not self.restarts:
            return float(self.step)
        ages = self.ages()
        if len(ages) == 1 or (not self.plans[0].projected and bool((ages == ages[0]).all())):
            return float(ages[0])
        # Matrices of a projected stack have a clock each. A plain parameter restarts as a whole (`restart.py`), so one
        # number also serves its flat slices, which have no matrices.
        on_device = ages.to(self.params[0].device, self.working, non_blocking=True)
        return on_device.view(-1, *[1] * len(self.plans[0].matrix))

    @property
    def restarts(self) -> bool:
        """Whether moments restart, so that they need a clock of their own."""
        return self.recipe.refresh.restarts

    def ages(self) -> Tensor:
        """Return the steps that the moments of each matrix have seen, with this one: `(b,)` or `(1,)`, on the CPU."""
        if not self.restarts:
            return torch.full((1,), self.step, device="cpu")
        # A matrix without a basis has -1 here. Its moments have seen all steps so far.
        births = torch.cat([state["refreshed_at"].view(-1) for state in self.states])
        return self.step - births.clamp(min=0)

    def tell_(self) -> None:
        """Write the numbers of this step to the device, for a graph that reads them there."""
        if self.numbers is not None:
            kept = [state["refreshes"].view(-1) for state in self.states if "refreshes" in state]
            counts = torch.cat(kept) if kept else torch.zeros_like(self.numbers.counts)
            self.numbers.tell_(self.group["lr"], self.step, self.ages(), counts)

    def pieces(self) -> Iterator[Chunk]:
        """Yield this chunk, or pieces of it if it is one large parameter: slices, or a few experts at a time."""
        p, g = self.params[0], self.grads[0]
        if not self.plans[0].count:
            return iter(())  # other ranks have all experts of this stack
        if len(self.params) == 1 and p.is_contiguous() and g.is_contiguous():
            # Slices bound the temporaries of a plain parameter. An accelerator updates a float32 parameter whole, since
            # each slice costs launches.
            copied = p.device.type == "cpu" or p.dtype != self.working
            sliced = self.recipe.elementwise and copied and not self.packed
            # Blocks of quantized state never cross a matrix. Unless they divide it, a flat slice cuts them.
            whole_blocks = not self.plans[0].batch or math.prod(self.plans[0].matrix) % self._block == 0
            if sliced and whole_blocks and not self.plans[0].projected and p.numel() > self._slice:
                return self._slices(p, g)
            if self.plans[0].batch and self.bytes > limits.CHUNK_BYTES and not self.packed:
                return self._experts(p, g)
        return iter([self])

    @property
    def silent(self) -> bool:
        """Whether the update of this chunk sends nothing to other ranks, however it is cut."""
        return self.algebra is WHOLE or (self.recipe.elementwise and not self.plans[0].projected)

    @property
    def bytes(self) -> int:
        """Return the bytes of the parameters in the working dtype, on the rank that has the most of them."""
        return len(self.params) * self.most * self.working.itemsize

    @property
    def _block(self) -> int:
        """Return the longest run of elements that a state tensor codes together, which no slice may cut."""
        return max([1, *(cast(Store, spec.store).block for spec in self.spec.values())])

    @property
    def _slice(self) -> int:
        """Return the elements of a slice. Launches cost time on accelerators: G, D and W of a slice fill a chunk."""
        return (
            limits.SLICE if self.params[0].device.type == "cpu" else limits.CHUNK_BYTES // (4 * self.working.itemsize)
        )

    def _slices(self, p: Tensor, g: Tensor) -> Iterator[Chunk]:
        """Yield slices of a plain parameter, in row-major order, that end between blocks coded together."""
        stores = {key: cast(Store, spec.store) for key, spec in self.spec.items()}
        offset = self.first * math.prod(self.plans[0].matrix)
        size, per_element = max(1, self._slice // self._block) * self._block, Kept((), p.dtype)
        # One entry of a stored tensor stands for `per` elements: 1 for float32, 256 for the peaks of int8 blocks.
        parts = {COMPENSATION: per_element} if COMPENSATION in self.states[0] else {}
        for key, store in stores.items():
            layout = store.layout(self.spec[key].shape, self.working)
            parts |= {key + suffix: kept for suffix, kept in zip(store.suffixes, layout, strict=True)}
        flat = {key: self.states[0][key].view(-1) for key in parts}
        for start in range(0, p.numel(), size):
            stop = min(start + size, p.numel())
            state = {key: flat[key][start // kept.per : -(-stop // kept.per)] for key, kept in parts.items()}
            # The clock of the moments is that of the whole parameter.
            state |= {key: self.states[0][key] for key in ("refreshed_at",) if key in self.states[0]}
            spec = {key: logical._replace(shape=(stop - start,)) for key, logical in self.spec.items()}
            params, grads = [p.view(-1)[start:stop]], [g.view(-1)[start:stop]]
            piece = replace(self, spec=spec, params=params, grads=grads, states=[state], first=0, partial=True)
            piece.start = offset + start
            yield piece

    def _experts(self, p: Tensor, g: Tensor) -> Iterator[Chunk]:
        """Yield parts of a stack of experts `(count, m, n)`, as many experts at a time as fit the limit."""
        plan, count = self.plans[0], self.plans[0].count
        size = max(1, limits.CHUNK_BYTES * count // self.bytes)
        # The other state (step, skipped) belongs to the stack as a whole. The loop of the step counts it.
        rows = {key: t.view(count, *t.shape[len(plan.batch) :]) for key, t in self.states[0].items() if t.dim()}
        matrices, gradients = p.view(count, *p.shape[-2:]), g.view(count, *g.shape[-2:])
        for first in range(0, count, size):
            experts = slice(first, first + size)
            w, state = matrices[experts], {key: tensor[experts] for key, tensor in rows.items()}
            part = replace(plan, batch=(len(w),), shape=tuple(w.shape))
            grads, most = [gradients[experts]], -(-self.most // count) * len(w)
            numbers = None if self.numbers is None else self.numbers.some(experts)
            piece = replace(self, plans=[part], params=[w], grads=grads, states=[state], numbers=numbers, most=most)
            piece.first = self.first + first
            yield piece

    def matrices(self) -> Iterator[tuple[Plan, dict[str, Tensor], int, int]]:
        """Yield (plan, state, number within its parameter, number within this chunk) of every matrix."""
        for index, (plan, state) in enumerate(zip(self.plans, self.states, strict=True)):
            for inner in range(plan.count):
                yield plan, state, inner, index * plan.count + inner

    def _open(self, tensors: list[Tensor], view: Callable[[Plan, Tensor], Tensor], as_kept: bool = False) -> Tensor:
        """Return the tensors turned, in the working dtype, and stacked; a single one as a view where possible."""
        views = [view(plan, x) for plan, x in zip(self.plans, tensors, strict=True)]
        return self._stacked([x if as_kept or x.dtype == self.working else x.to(self.working) for x in views])

    def _stacked(self, views: list[Tensor]) -> Tensor:
        """Return one tensor for all parameters: experts `(count, ...)` are joined, single matrices are stacked."""
        if len(views) == 1:
            return views[0]
        return torch.cat([x if self.plans[0].batch else x.unsqueeze(0) for x in views])

    def _split(self, x: Tensor) -> list[Tensor]:
        """Return the inverse of `_stacked`: one view per parameter."""
        if len(self.params) == 1:
            return [x]
        return list(torch.split(x, self.plans[0].count) if self.plans[0].batch else x.unbind(0))

    def _oriented(self, plan: Plan, x: Tensor) -> Tensor:
        """Return a tensor like the parameter, turned; a flat slice has no side to be turned."""
        return x if self.partial else plan.oriented(x)

    def _batched(self, plan: Plan, x: Tensor) -> Tensor:
        """Return a state tensor with all leading dimensions of a stack of experts made one."""
        return x.view(-1, *x.shape[len(plan.batch) :]) if plan.batch and not self.partial else x


def ages_(st: State, refresh: Refresh, working: torch.dtype) -> Tensor:
    """Return the steps that each coordinate, or each entry, has seen, this one included; and store them as seen."""
    # Ages are (r,), one per row of R, or like R, one per entry. As (r, 1) they broadcast with R (r, n).
    age = st[AGE].add_(1).to(working)
    return age if refresh.entrywise else age.unsqueeze(-1)
