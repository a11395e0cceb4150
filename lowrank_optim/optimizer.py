"""The engine: one loop that every gradient-projection method runs. It never asks which part it holds."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checks, hyperparameters
from .distributed import checks as shard_checks
from .distributed.common import Common
from .distributed.fragments import complete_edges
from .distributed.layout import HERE, Cut, Layout, layout_of
from .distributed.lockstep import together
from .engine import captured, loading
from .engine.autograd import full_precision
from .engine.chunk import Chunk
from .engine.gradients import gradient_norms, in_cache, one_by_one
from .engine.grouping import Asked, form_chunks, waves
from .engine.in_place import update_listed_
from .engine.member import Member
from .engine.refresh import refresh_due
from .engine.state import follow, fresh
from .engine.update import Move, update_
from .engine.watch import Watch
from .ops import native
from .parts import Drop, Identity, Never
from .recipe.plan import Plan, decide, shape_of
from .recipe.recipe import Recipe
from .reports.report import Report, report
from .reports.stats import stats
from .wrappers.adoption import GROUP, StandIns

if TYPE_CHECKING:
    from .modes.backward import StepInBackward
    from .modes.ddp_project import DDPProject

Rescale = Callable[[Member, float], float]
_GROUP_ONLY = {"skip_embeddings": True, "as_matrix": "auto"}  # hyper-parameters that only groups set


class LowRankOptimizer(Optimizer, abc.ABC):
    """Base of all methods: subclasses give a plain signature and `recipe`, nothing else.

    One optimizer serves the whole model: matrices are projected; vectors, embeddings, heads and matrices too small for
    their rank get the same rule in full space. `report()` says which, and why.
    """

    rule = "AdamW"  # what the method is in full space
    default_rank: int | float = 0.25  # of rank="auto"
    ranked = True  # False: matrices are served whole, and `rank=None` in a group only leaves them out
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}  # options with values of this method's own
    fixed: ClassVar[tuple[str, ...]] = ()  # numbers that cannot be edited later, because state was made with them
    irreplaceable = ""  # why nothing may be updated in the place of its parameters
    unpartitionable = ""  # why, where that may be, every process must have the parameters whole
    # How a step is run; copies and pickles of an optimizer do not inherit it.
    _in_backward: StepInBackward | None = None
    _projecting: DDPProject | None = None
    _move: Move | None = None
    _incoming: dict[str, Any] | None = None  # the state dict that is being loaded

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], *, strict: bool = False) -> None:
        params = params if isinstance(params, Tensor) else list(params)  # torch's own error for a bare tensor
        if defaults.setdefault("rank", "auto") == "auto":
            # Groups written for the original package name a rank where they want projection and nowhere else.
            named = any(isinstance(group, dict) and group.get("rank") is not None for group in params)
            defaults["rank"] = None if named else self.default_rank
        defaults = {**_GROUP_ONLY, "proj_type": "std", "capturable": False, **defaults, "strict": strict}
        hyperparameters.check(defaults, self.choices)
        native.load()
        self._plans: dict[Tensor, Plan] = {}
        self._layouts: dict[Tensor, Layout] = {}
        self._commons: dict[tuple[Tensor, ...], Common] = {}  # made anew when parameters came
        self._seen: dict[int, dict[str, Any]] = {}  # what each group said when it was last checked
        self._stand_ins = StandIns(self)
        self._watch, self._captured = Watch(), captured.Captured(self)
        super().__init__(params, defaults)
        self._check_served([(plan.name, plan.reason) for plan in self._plans.values()])

    def _check_served(self, reasons: list[tuple[str, str]]) -> None:
        """Refuses a model of which nothing is projected. `reasons`: name, and why not, or ""."""
        if all(reason for _, reason in reasons):
            checks.something_projected(type(self).__name__, self.ranked, reasons)

    @abc.abstractmethod
    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The method: its parts, with the numbers of this group. Called once per group and step."""

    def plain(self, group: dict[str, Any]) -> Recipe:
        """What parameters get that are not projected: the same rule in full space, unless the method says otherwise."""
        return self.recipe(group).plain(Identity(), Never(), Drop())

    def refuse(self, plan: Plan, group: dict[str, Any]) -> None:
        """Raises a ValueError for a projected matrix that the method cannot serve; called before anything is kept."""

    def restart_workspace(self) -> int:
        """Bytes that work between steps takes for a moment; for `estimate_memory`."""
        return 0

    # -- groups and state ----------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; checks every option and creates the group's state, or leaves the optimizer as it was."""
        hyperparameters.known_keys(param_group, self.defaults)
        if param_group.get("rank") is not None:
            param_group.setdefault("skip_embeddings", False)  # who names a rank for a group means all of it
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        number = group[GROUP] = max(self._seen, default=-1) + 1
        self._stand_ins.note(group)
        try:
            self._admit(group)
            plans = self._decide(group)
            layouts = self._lay_out(plans, group)
            if group["strict"]:
                lost = ((plan.name, plan.reason) for plan in plans.values() if plan.fallback)
                checks.nothing_lost(type(self).__name__, lost)
            # Parameters without memory (meta, ZeRO-3) or without gradients (frozen) get theirs with the first gradient.
            now = {
                p: plan for p, plan in plans.items() if p.requires_grad and not (p.is_meta or hasattr(p, "ds_shape"))
            }
            states = {p: fresh(p, plan, self._recipe_of(plan, group), group, layouts[p]) for p, plan in now.items()}
        except Exception:
            self.param_groups.pop()
            del self._stand_ins.given[number]
            raise
        self._plans.update(plans)
        self._layouts.update(layouts)
        self._commons = {}
        self._seen[number] = hyperparameters.snapshot(group)
        self.state.update(states)
        if self._in_backward is not None:
            self._in_backward._attach(group)

    def _admit(self, group: dict[str, Any]) -> None:
        hyperparameters.check(group, self.choices)
        recipe = self.recipe(group)
        if group["capturable"]:
            checks.capturable(type(self).__name__, recipe.residual.feeds_back)

    def _decide(self, group: dict[str, Any]) -> dict[Tensor, Plan]:
        plans: dict[Tensor, Plan] = {}
        before = [self._plans[p] for given in self._stand_ins.given.values() for _, p in given if p in self._plans]
        taken = sum(plan.count for plan in before if plan.projected)
        for name, p in self._stand_ins.given[group[GROUP]]:
            plan = decide(name, len(before) + len(plans), taken, shape_of(p), group, self.ranked)
            checks.parameter(plan.name, p)
            if plan.projected:
                self.refuse(plan, group)
            plans[p] = plan
            taken += plan.count if plan.projected else 0
        return plans

    def _lay_out(self, plans: dict[Tensor, Plan], group: dict[str, Any]) -> dict[Tensor, Layout]:
        layouts = {p: layout_of(p, plan) for p, plan in plans.items()}
        for p, layout in layouts.items():
            if layout.sharded:
                self._admit_shard(plans[p], cast(Cut, layout), group)
        return layouts

    def _admit_shard(self, plan: Plan, layout: Cut, group: dict[str, Any]) -> None:
        """Refuses what this method, or the way in which its step is run, cannot do on a shard."""
        ways = {
            "capturable=True": group["capturable"],
            "compile()": self._move is not None,
            "step_in_backward": self._in_backward is not None,
        }
        for what in (way for way, taken in ways.items() if taken):
            shard_checks.unsharded(plan.name, what)
        recipe = self._recipe_of(plan, group)
        spec = recipe.spec(layout.matrix(plan), plan.rank or 0, plan.small)
        shard_checks.cut(type(self).__name__, plan, layout.pieces, recipe.uncut(), layout.cut_blocks(spec))

    def _fresh_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        plan = self._plans[p]
        return fresh(p, plan, self._recipe_of(plan, group), group, self._layouts[p])

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        """Of a parameter, or of a fragment of one; empty if there is none yet."""
        return self._stand_ins.state(p)

    def _states(self) -> Iterator[dict[str, Tensor]]:
        return (state for p, _ in self._members() if (state := self._state(p)))

    def _recipe_of(self, plan: Plan, group: dict[str, Any]) -> Recipe:
        return self.recipe(group) if plan.projected else self.plain(group)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """A GradScaler then calls `step` at once, without looking for gradients that backward has used already."""
        return self._in_backward is not None or self._projecting is not None

    def _members(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return self._stand_ins.all()

    def _with_gradients(self) -> list[Member]:
        return [self._member(p, group, grad) for p, group, grad in self._stand_ins.with_gradients()]

    def _member(self, p: Tensor, group: dict[str, Any], grad: Tensor, projected: bool = False) -> Member:
        """With its state, which is made here where the parameter was frozen, or without memory, until now."""
        state = self._state(p)
        if not state:
            state = self._fresh_state(p, group)
            self._stand_ins.keep(p, state)
        return Member(p, group, grad, projected, self._plans[p], self._layouts[p], state)

    # -- the step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient. Reads one norm per gradient first, in one synchronisation."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @torch._disable_dynamo  # a compiled step falls back to this one
    def _step(self) -> None:
        if self._in_backward is not None:
            self._in_backward._finish()
            return
        if self._projecting is not None:
            self._projecting._finish()
            return
        self._stand_ins.adopt()
        if not captured.capturing():
            self._recheck()
        members = self._with_gradients()
        if any(group["capturable"] for group in self.param_groups):
            if captured.capturing() or self._captured.prepare(members):
                self._captured.update(members)
            return
        self._prepare(members)
        if not self._dry_run(members):
            self._update(members)

    def prepare(self) -> bool:
        """The host's part of a captured step, to be called before each replay, when gradients are complete.

        Looks for non-finite gradients, refits the bases that are due, and writes lr, step and all else that changes to
        where the graph reads it.

        Returns:
            False if a gradient is not finite: then do not replay. Nothing was changed but the counts of `report()`.

        Example::

            optimizer = lowrank_optim.GaLoreAdamW(groups, lr=torch.tensor(1e-3, device="cuda"), capturable=True)
            ...  # some normal steps, as warm-up, with zero_grad(set_to_none=False)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            ...
            loss.backward()
            if optimizer.prepare():
                graph.replay()
        """
        self._recheck()
        return self._captured.prepare(self._with_gradients(), replay=True)

    def compile(self, **options: Any) -> None:
        """Compiles the update in place, as `nn.Module.compile` does; refreshes stay as they are.

        One graph per recipe, shape and layout of a matrix; neither steps nor refreshes nor a changing lr make another.

        Args:
            options: of torch.compile; `fullgraph=True, dynamic=False` unless given.
        """
        from .engine.compiled import CompiledMove  # torch._dynamo takes a second to import

        for p, layout in self._layouts.items():
            if layout.sharded:
                shard_checks.unsharded(self._plans[p].name, "compile()")
        self._move = CompiledMove(options)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim; step_in_backward and ddp_project also forget what they gathered since the last step."""
        super().zero_grad(set_to_none)
        for way in (self._in_backward, self._projecting):
            if way is not None:
                way._forget()

    def _recheck(self) -> None:
        """Edits of a group are checked like what it was made with, once."""
        for group in self.param_groups:
            now, before = hyperparameters.snapshot(group), self._seen[group[GROUP]]
            if self._stand_ins.pieces:
                now["params"] = before["params"]  # which come and go
            if now == before:
                continue
            hyperparameters.known_keys(group, self.defaults)
            hyperparameters.unchanged(now, before, self.fixed)
            self._admit(group)
            for p in self._stand_ins.of(group):
                if self._plans[p].projected:
                    self.refuse(self._plans[p], group)
                if self._layouts[p].sharded:
                    self._admit_shard(self._plans[p], cast(Cut, self._layouts[p]), group)
            self._seen[group[GROUP]] = now

    def _prepare(self, members: list[Member]) -> None:
        """Refuses gradients that no rule can use, and sees to it that state is where the parameter is."""
        self._stand_ins.verify()
        for p, group, grad, _, plan, layout, state in members:
            checks.gradient(plan.name, grad)
            if layout is not HERE and hasattr(p, "device_mesh"):
                shard_checks.same_layout(plan.name, grad, cast(Any, p).placements)
            follow(state, p, group)

    def _dry_run(self, members: list[Member]) -> bool:
        """A first step on zero gradients, as checkpoint helpers and DeepSpeed make: the state exists, no more.

        Nobody makes one with flat tensors, of which a step sees some at a time and could not tell.
        """
        if self._stand_ins.pieces or any(state["step"] or state["skipped"] for state in self._states()):
            return False
        return not self._together().anywhere(any(bool(one.layout.here(one.grad).any()) for one in members))

    def _together(self) -> Common:
        """What all ranks decide together, of all parameters or of those in the flat tensors of this step."""
        pieces = self._stand_ins.pieces
        flats = tuple(p for group in self.param_groups for p in group["params"] if p in pieces) if pieces else ()
        if flats not in self._commons:
            some = [piece for flat in flats for piece in pieces[flat]] if flats else self._layouts
            self._commons[flats] = Common(self._plans, {p: self._layouts[p] for p in some})
            self._commons[flats].agree()
        return self._commons[flats]

    @torch._disable_dynamo
    def _update(self, members: list[Member], rescale: Rescale | None = None) -> None:
        """One step for some parameters: all of a step's work, so it can also be done for one parameter at a time.

        `rescale` is told each member and the norm of its gradient, which is multiplied by the answer, in place.
        """
        asked = Asked()
        with full_precision(one.p for one in members):
            alone = one_by_one(members) and not self._together().groups
            for batch in in_cache(members) if alone else [members]:
                finite = self._finite(batch, rescale)
                complete_edges((one.layout, one.grad) for one in finite)
                finite = update_listed_(finite, self._recipe_of, asked) if self._move is None else finite
                told = self._counted_elsewhere(finite, asked)
                for some in waves(self._pieces(finite, asked)):
                    together([partial(update_, piece, piece.algebra, self._move) for piece in some])
                together([partial(one.layout.tell_all_, one.state) for one in told])

    def _pieces(self, members: list[Member], asked: Asked) -> Iterator[Chunk]:
        """What is updated at once. A parameter counts its step once it is updated."""
        for chunk in self._chunks(members, asked):
            yield from chunk.pieces()
            for state in chunk.states:
                state["step"] += 1

    def _chunks(self, members: list[Member], asked: Asked) -> Iterator[Chunk]:
        return form_chunks(members, self._recipe_of, asked, self._watch)

    def _counted_elsewhere(self, members: list[Member], asked: Asked) -> list[Member]:
        """Stacks of which this step may refit some matrices, and others have some."""
        apart = [one for one in members if one.layout.counts_apart]
        chunks = (chunk for one in apart for chunk in self._chunks([one], asked))
        wholes = (
            replace(chunk, plans=[one.plan], states=[one.state], first=0)
            for one, chunk in zip(apart, chunks, strict=True)
        )
        return [one for one, whole in zip(apart, wholes, strict=True) if refresh_due(whole)]

    def _finite(self, members: list[Member], rescale: Rescale | None) -> list[Member]:
        """The members whose gradients are finite; the others are counted, or refused before anything is updated."""
        norms = gradient_norms([one.layout.here(one.grad) for one in members])
        if self._together().groups:
            whole = self._together().norms((one.p, norm) for one, norm in zip(members, norms, strict=True))
            norms = [whole.get(one.p, norm) for one, norm in zip(members, norms, strict=True)]
        if rescale is not None:
            for one, factor in zip(members, map(rescale, members, norms), strict=True):
                if factor != 1:
                    one.grad.mul_(factor)
        if all(map(math.isfinite, norms)):
            return members
        self._skip([one for one, norm in zip(members, norms, strict=True) if not math.isfinite(norm)])
        return [one for one, norm in zip(members, norms, strict=True) if math.isfinite(norm)]

    def _skip(self, members: list[Member]) -> None:
        """Parameters with a non-finite gradient: counted, and warned about the first time, or an error."""
        names = [one.plan.name for one in members]
        if any(one.group["nonfinite"] == "raise" for one in members):
            checks.nonfinite(names)
        expected = self._in_backward is not None and self._in_backward.scaler is not None  # it searches for its scale
        if not expected and not any(int(state["skipped"]) for state in self._states()):
            checks.warn(
                f"non-finite gradient in {checks.few(names)}: left out of this step, as will be any later one without "
                "a further warning. report() counts them"
            )
        for one in members:
            one.state["skipped"] += 1

    # -- what a user sees ----------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """One row per parameter: shape, method, rank, side, state bytes, or why it is not projected. `print` it."""
        return report(self)

    def stats(self) -> dict[str, float]:
        """Counters for any logger, as a flat dict of numbers; asking costs one read per kind of counter.

        Returns:
            refreshes: of bases, over all matrices.
            refresh_seconds: spent on them by this process, wall time of the host. On accelerators work that was only
                launched is not in it.
            skipped_gradients: parameters left out of a step because their gradient was not finite.
            moment_resets: matrices whose moments began anew, with `moments="reset"`.
            limiter_hits: residuals that were shortened because they grew too fast (Fira, APOLLO).
            captured_energy: `|P^T G|^2 / |G|^2` at the last refresh, mean of all matrices. Only for orthonormal P,
                and only after a refresh in this process.
            captured_energy/NAME: the same of one parameter.
        """
        return stats(self)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        self._stand_ins.adopt()
        return super().state_dict()

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, except that state keeps its own dtypes and nothing is half-loaded.

        torch would cast all state to the parameter's dtype, which loses bits for bfloat16 parameters.
        """
        loading.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        shard_checks.can_be_copied(type(self).__name__, bool(self._stand_ins.pieces))
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what is derived; called by pickle, by deepcopy, and by torch's loader in the middle of its work."""
        loading.restore(self, state)
