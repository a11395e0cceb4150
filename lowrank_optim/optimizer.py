"""`LowRankOptimizer`, the base class of all methods: what `torch.optim` asks of an optimizer, on top of the engine."""

from __future__ import annotations

import abc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checks, hyperparameters
from .distributed import checks as shard_checks
from .engine import loading
from .engine.captured import Captured
from .engine.mode import StepMode
from .engine.stepper import Stepper
from .engine.table import GROUP, ParameterTable
from .engine.watch import Watch
from .ops import native
from .parts import Drop, Identity, Never
from .recipe.plan import Plan
from .recipe.recipe import Recipe
from .reports.report import Report, report
from .reports.stats import stats
from .wrappers import adoption

_GROUP_ONLY = {"skip_embeddings": True, "as_matrix": "auto"}  # hyper-parameters that only groups set


class LowRankOptimizer(Optimizer, abc.ABC):
    """Base class of all methods: a subclass gives a plain signature and `recipe`, and nothing else.

    One optimizer serves the whole model. Matrices are projected; vectors, embeddings, heads and matrices too small for
    their rank get the same rule in full space. `report()` says which parameter gets which, and why.
    """

    rule = "AdamW"  # what the method is in full space
    default_rank: int | float = 0.25  # of rank="auto"
    ranked = True  # False: matrices are served whole, and `rank=None` in a group only leaves them out
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}  # options whose values are this method's own
    fixed: ClassVar[tuple[str, ...]] = ()  # numbers that cannot be edited later, because state was made with them
    irreplaceable = ""  # why no other tensor may be updated in place of a parameter
    unpartitionable = ""  # why, where another tensor may be, every process must have the parameters whole
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
        # The table asks the optimizer about its method. A weak reference, so that neither keeps the other alive.
        self._serve(ParameterTable(weakref.proxy(self)), Watch())
        super().__init__(params, defaults)
        self.refuse_nothing([(plan.name, plan.reason) for plan in self._table.plans.values()])

    def _serve(self, table: ParameterTable, watch: Watch) -> None:
        """Step the parameters of a table from now on. Drop everything that was derived from another table."""
        self._table = table
        self._stepper = self._make_stepper(table, watch)
        self._captured = Captured(self._stepper)

    def _make_stepper(self, table: ParameterTable, watch: Watch) -> Stepper:
        """Return the loop that runs the steps. A method whose step is more than its recipe returns its own stepper."""
        return Stepper(table, watch)

    # -- what a method answers (`recipe/method.py`) --------------------------------------------------------------------

    @abc.abstractmethod
    def recipe(self, group: dict[str, Any]) -> Recipe:
        """Return the method: its parts, with the numbers of this group.

        It must not depend on lr: the engine keeps a recipe until another option of the group is edited.
        """

    def plain(self, group: dict[str, Any]) -> Recipe:
        """Return the recipe of parameters that are not projected: by default the same rule in full space."""
        return self.recipe(group).plain(Identity(), Never(), Drop())

    def refuse(self, plan: Plan, group: dict[str, Any]) -> None:
        """Raise a ValueError for a projected matrix that the method cannot serve. Nothing has been stored by then."""

    def refuse_group(self, group: dict[str, Any]) -> None:
        """Raise an error for options of a group that are out of range or mean nothing together."""
        hyperparameters.check(group, self.choices)
        recipe = self.recipe(group)
        if group["capturable"]:
            checks.capturable(type(self).__name__, recipe.residual.feeds_back)

    def refuse_shard(self, plan: Plan, group: dict[str, Any]) -> None:
        """Raise a NotImplementedError for a sharded parameter that the method cannot serve."""

    def refuse_nothing(self, reasons: list[tuple[str, str]]) -> None:
        """Refuse a model in which nothing is projected.

        Args:
            reasons: the name of each parameter, and why it is not projected, or "".
        """
        if all(reason for _, reason in reasons):
            checks.something_projected(type(self).__name__, self.ranked, reasons)

    def ways(self, group: dict[str, Any]) -> dict[str, bool]:
        """Return the ways of running a step that need whole parameters, and whether each is in use."""
        stepper = self._stepper
        mode = {} if stepper.mode is None else {stepper.mode.name: True}
        return {"capturable=True": group["capturable"], **mode, "compile()": stepper.move is not None}

    def restart_workspace(self) -> int:
        """Return the bytes that work between steps takes for a moment; for `estimate_memory`."""
        return 0

    # -- what the package asks -----------------------------------------------------------------------------------------

    @property
    def table(self) -> ParameterTable:
        """Return the table of the parameters, with the plan, layout, state and recipe of each."""
        # torch and wrappers assign `param_groups` and `state`, so each access binds the table to the present ones.
        self._table.groups, self._table.states = self.param_groups, self.state
        return self._table

    @property
    def stepper(self) -> Stepper:
        """Return the loop of one step."""
        return self._stepper

    @property
    def mode(self) -> StepMode | None:
        """Return the other way to take a step that is in use (step in backward, `ddp_project`), or None."""
        return self._stepper.mode

    @mode.setter
    def mode(self, mode: StepMode | None) -> None:
        self._stepper.mode = mode

    # -- groups and state ----------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in torch.optim: check every option and create its state, or leave the optimizer as it was."""
        hyperparameters.known_keys(param_group, self.defaults)
        if param_group.get("rank") is not None:
            param_group.setdefault("skip_embeddings", False)  # a rank that is named for a group means all of the group
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.table.admit(group)
        except Exception:
            self.param_groups.pop()
            raise
        if self.mode is not None:
            self.mode.attach(group)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler calls `step` without a search for gradients, which backward may have used already."""
        return self.mode is not None and self.mode.amp_by_itself

    # -- the step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. One norm per gradient is read first, in one synchronization."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @torch._disable_dynamo  # a compiled step falls back to this one
    def _step(self) -> None:
        """Hand the step to the mode, to the captured halves or to the stepper."""
        if self.mode is not None:
            self.mode.finish()
            return
        # DeepSpeed exchanges the tensors of groups after construction, and in stage 3 in every step.
        if self.table.strangers():
            adoption.adopt(self._table)
        if any(group["capturable"] for group in self.param_groups):
            self._captured.step()
        else:
            self._stepper.step()

    def prepare(self) -> bool:
        """Run the host's part of a captured step. Call it before each replay, when gradients are complete.

        It searches for non-finite gradients, refits the bases that are due, and writes lr, step and all other numbers
        that change to where the graph reads them.

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
        self.table.recheck()
        return self._captured.prepare(self.table.with_gradients(), replay=True)

    def compile(self, **options: Any) -> None:
        """Compile the update in place, as `nn.Module.compile` does; refreshes stay as they are.

        There is one graph per recipe, shape and layout of a matrix. Neither steps nor refreshes nor a changing lr make
        another one.

        Args:
            options: of torch.compile; `fullgraph=True, dynamic=False` unless given.
        """
        from .engine.compiled import CompiledMove  # torch._dynamo takes a second to import

        table = self.table
        for p, layout in table.layouts.items():
            if layout.sharded:
                shard_checks.unsharded(table.plans[p].name, "compile()")
        self._stepper.move = CompiledMove(options)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients as in torch.optim. A mode (step in backward, `ddp_project`) drops what it has gathered."""
        super().zero_grad(set_to_none)
        if self.mode is not None:
            self.mode.forget()

    # -- what a user sees ----------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """Return a table to `print`, with one row per parameter.

        A row has shape, method, rank, side and state bytes, or the reason why the parameter is not projected.
        """
        return report(self.table, self.mode)

    def stats(self) -> dict[str, float]:
        """Return counters for any logger, as a flat dict of numbers. Asking costs one read per kind of counter.

        Returns:
            refreshes: refreshes of bases, over all matrices.
            refresh_seconds: wall time of the host that this process has spent on them. On accelerators it does not
                contain work that was only launched.
            skipped_gradients: parameters left out of a step because their gradient was not finite.
            moment_resets: matrices whose moments were reset, with `moments="reset"`.
            limiter_hits: residuals that were shortened because they grew too fast (Fira, APOLLO).
            captured_energy: `|P^T G|^2 / |G|^2` at the last refresh, mean of all matrices. Only for orthonormal P,
                and only after a refresh in this process.
            captured_energy/NAME: the same of one parameter.
        """
        return stats(self.table, self._stepper.watch)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return the state as in torch.optim. Tensors that a wrapper has put in place of parameters are included."""
        adoption.adopt(self.table)
        return super().state_dict()

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict as in torch.optim, except that state keeps its own dtypes and nothing is half-loaded.

        torch would cast all state to the parameter's dtype, which loses bits for bfloat16 parameters.
        """
        adoption.adopt(self.table)
        state_dict, hooks = state_dict.copy(), self._optimizer_load_state_dict_pre_hooks
        for hook in hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        loading.check(self.table, state_dict)
        groups, state, served = self.param_groups, dict(self.state), (self._table, self._stepper, self._captured)
        # torch must not run the hooks again: they have run, and may have replaced the state dict.
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._incoming = state_dict
        try:
            # torch checks and copies the groups, and calls __setstate__, which takes the state of `_incoming`.
            super().load_state_dict({**state_dict, "state": {}})
        except Exception:
            # Everything that loading replaces was kept, so a state dict that does not fit changes nothing.
            self.param_groups, (self._table, self._stepper, self._captured) = groups, served
            self.state.clear()
            self.state.update(state)
            raise
        finally:
            self._incoming = None
            self._optimizer_load_state_dict_pre_hooks = hooks
        if self.mode is not None:
            self.zero_grad()  # gradients gathered so far belong to the weights before loading

    def __getstate__(self) -> dict[str, Any]:
        shard_checks.can_be_copied(type(self).__name__, bool(self._table.pieces))
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore everything that is derived. Pickle and deepcopy call this, and torch's loader in mid-load."""
        incoming = self._incoming
        numbers = None if incoming is None else [group[GROUP] for group in self.param_groups]
        super().__setstate__(state if incoming is None else {**state, "state": self.state})
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # which torch adds to defaults here
                    group.setdefault(key, value)
        old = None if incoming is None else self._stepper
        if old is None:
            self._serve(ParameterTable(weakref.proxy(self)), Watch())
        self._serve(self._table.rebuilt(self.param_groups, self.state, numbers), self._stepper.watch)
        # A loaded optimizer steps as before; a copy steps in the normal way.
        if old is not None:
            self._stepper.mode, self._stepper.move = old.mode, old.move
        adoption.adopt(self.table)
        if incoming is not None:
            loading.take_state(self.table, incoming)
            if "full" in incoming:
                adoption.take_apart(self.table, incoming["full"])
