"""The base of methods that change how weights are kept: converted layers, AdamW on their factors, a restart rule.

The engine is the one of all other methods. It sees factors as parameters in full space, so state in 8 bits, stochastic
rounding, skipped gradients, step in backward and checkpoints are what they are everywhere. What is added here: the
layers, and what happens to them after an update.
"""

from __future__ import annotations

import abc
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import checks, hyperparameters
from .distributed.dtensors import local
from .engine.restart import PARTIAL, reset_
from .layers import checks as layer_checks
from .layers.convert import Conversion, adopt, converted, make_conversion
from .layers.linear import ReparameterizedLinear
from .optimizer import LowRankOptimizer
from .parts import Outside
from .parts.recipes import adamw
from .recipe.plan import Plan
from .recipe.recipe import Recipe
from .recipe.weights import COMPENSATION, working_dtype
from .reports.report import Report, Row, parameter_row
from .wrappers.masters import largest, masters

_LOG = logging.getLogger("lowrank_optim")
_HOW_TO_CONVERT = ("rank", "include", "exclude")


class WeightSpaceOptimizer(LowRankOptimizer):
    """A subclass says which layer, which of its options are the layer's, and what a restart does."""

    layer: ClassVar[type[ReparameterizedLinear]]
    irreplaceable = "its restarts read and write these"
    unpartitionable = "its restarts read and write frozen weights"
    layer_options: ClassVar[tuple[str, ...]] = ()  # constructor arguments that are the layer's and not the groups'

    def __init__(self, model: nn.Module, options: dict[str, Any], *, strict: bool = False) -> None:
        options, model = dict(options), layer_checks.whole_model(model)
        how = {key: options.pop(key) for key in (*_HOW_TO_CONVERT, *self.layer_options)}
        rest_lr, seed = options.pop("rest_lr"), options["seed"]
        defaults = {**options, "rank": None, "factors": False}
        hyperparameters.check({**defaults, **how, "rest_lr": rest_lr}, self.choices)
        self.check(defaults)
        if any(hasattr(layer.leader, "device_mesh") for _, layer in converted(model)):
            layer_checks.chosen_by_convert([*how.pop("include"), *how.pop("exclude")])
            conversion = adopt(model, type(self).__name__, self.layer, **how)
        else:
            conversion = make_conversion(model, self.layer, seed=seed, **how)
        try:
            if strict:
                checks.nothing_lost(type(self).__name__, conversion.left.items())
            self.conversion, self._counted = conversion, dict.fromkeys(conversion.layers, 0)
            self._last_reset = 0.0
            groups = _groups(model, conversion, rest_lr) + self.extra_groups(conversion)
            super().__init__(groups, defaults, strict=strict)
        except Exception:
            conversion.undo()
            raise
        conversion.places.clear()  # the plain layers hold the dense weights

    # -- what a method says --------------------------------------------------------------------------------------------

    def check(self, group: dict[str, Any]) -> None:
        """Raises a ValueError for options that mean nothing together."""

    def extra_groups(self, conversion: Conversion) -> list[dict[str, Any]]:
        """Groups beside those of the factors and of what is not converted."""
        return []

    def refuse_shard(self, plan: Plan, group: dict[str, Any]) -> None:
        if group["factors"] and group.get("reset") in PARTIAL:
            layer_checks.whole_restart(type(self).__name__, group["reset"])

    def updated(self, layers: Sequence[ReparameterizedLinear]) -> None:
        """Called after each update with the layers that have seen it, before any of them restarts."""

    @abc.abstractmethod
    def restart(self, name: str, layer: ReparameterizedLinear, count: int, group: dict[str, Any]) -> bool:
        """Called after update number `count` of a layer; does what is due then, and says whether anything was."""

    @abc.abstractmethod
    def restarts(self, count: int, group: dict[str, Any]) -> int:
        """How many restarts a layer has seen after `count` updates."""

    def recipe(self, group: dict[str, Any]) -> Recipe:
        return adamw(group)

    def plain(self, group: dict[str, Any]) -> Recipe:
        recipe = self.recipe(group)
        return replace(recipe, refresh=Outside(single=group.get("reset") in PARTIAL)) if group["factors"] else recipe

    # -- the step ------------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def _step(self) -> None:
        super()._step()
        group, layers, restarted = self.param_groups[0], self.conversion.layers, 0
        if not (group["factors"] and group["params"]):
            return  # under ZeRO groups are stepped one after the other, and the others are away
        changed = {name: n for name, n in zip(layers, self._counts(), strict=True) if n != self._counted[name]}
        self.updated([layers[name] for name in changed])
        self._counted.update(changed)
        for name, count in changed.items():
            restarted += self.restart(name, layers[name], count, group)
        if restarted:
            _LOG.info(
                "%s: %d layers restarted, %.1f %% of the state of each was reset",
                type(self).__name__, restarted, 100 * self._last_reset,
            )  # fmt: skip

    def _count(self, layer: ReparameterizedLinear) -> int:
        """Updates that a layer was offered, those with a gradient that was not finite among them."""
        return self._offered(layer.leader)

    def _counts(self) -> list[int]:
        """The same of each layer. Under ZeRO all ranks call it: not all of them have something of each factor."""
        layers = self.conversion.layers.values()
        if not self.table.spread:
            return [self._count(layer) for layer in layers]
        # Factors may be in different flat tensors, which are stepped one after the other: the last completes a layer.
        sizes = [len(layer.factors) for layer in layers]
        offered = [self._offered(getattr(layer, key)) for layer in layers for key in layer.factors]
        everywhere = largest(self.table.spread, torch.tensor(offered))
        return [int(some.min()) for some in torch.split(everywhere, sizes)]

    def _offered(self, factor: Tensor) -> int:
        states = [self.table.state(p) for p in self.table.of_parameter(factor)]
        return max((int(state["step"]) + int(state["skipped"]) for state in states if state), default=0)

    def _restarts(self, name: str, layer: ReparameterizedLinear) -> int:
        return self.restarts(self._counted[name], self.param_groups[0])

    def trained(self, layer: ReparameterizedLinear, *keys: str) -> AbstractContextManager[None]:
        """Within, these factors of a layer are what is trained, where a wrapper (DeepSpeed) trains other tensors."""
        return masters(self.table, layer, keys)

    def reset(
        self, layer: ReparameterizedLinear, how: str = "drop", ratio: float = 1.0, only: Collection[str] | None = None
    ) -> float:
        """Empties the moments of a layer's factors, or of some of them; the share of entries that were reset."""
        group, lost, total = self.param_groups[0], 0, 0
        for key in layer.factors:
            for p in self.table.of_parameter(getattr(layer, key)):
                state, plan = self.table.state(p), self.table.plans[p]
                if state:
                    total += math.prod(plan.shape)
                    if only is None or key in only:
                        lost += reset_(state, plan, self.table.recipe(plan, group), working_dtype(p), how, ratio)
        self._last_reset = lost / max(1, total)
        return self._last_reset

    def settle(self, layer: ReparameterizedLinear, only: Collection[str]) -> None:
        """Factors that were overwritten owe nothing to what they were (`bf16_update="kahan"`)."""
        for key in only:
            for p in self.table.of_parameter(getattr(layer, key)):
                if COMPENSATION in (state := self.table.state(p)):
                    state[COMPENSATION].zero_()

    def refuse_group(self, group: dict[str, Any]) -> None:
        super().refuse_group(group)
        checks.not_captured(type(self).__name__, group)
        checks.no_rank(type(self).__name__, group)
        self.check(group)

    def refuse_nothing(self, reasons: list[tuple[str, str]]) -> None:
        """Accepts any: a model in which nothing could be converted was refused before."""

    def restart_workspace(self) -> int:
        """Bytes that the restart of one layer takes for a moment, at most; for `estimate_memory`."""
        layers = self.conversion.layers.values()
        return max(layer.restart_workspace() * working_dtype(layer.leader).itemsize for layer in layers)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "conversion": self.conversion, "_last_reset": self._last_reset}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._continue()

    def _continue(self) -> None:
        """What follows from the state, after it was loaded."""
        self._counted = dict(zip(self.conversion.layers, self._counts(), strict=True))

    # -- what a user sees ----------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """One row per converted layer, with all state of its factors, then one per other parameter. `print` it."""
        table = super().report()
        table[:] = self._rows()
        table.verb = "converted"
        return table

    def _rows(self) -> Iterator[Row]:
        inside: set[Tensor] = set()
        for name, layer in self.conversion.layers.items():
            params = [p for key, p in layer.named_parameters() if key != "bias"]
            parts = [part for p in params for part in self.table.of_parameter(p)]
            inside.update(parts)
            states = [self.table.state(p) for p in parts]
            count = self._restarts(name, layer)
            yield Row(
                name=name,
                shape=(layer.out_features, layer.in_features),
                method=type(self).__name__,
                rank=layer.rank,
                side="-",
                state_bytes=sum(local(tensor).nbytes for state in states for tensor in state.values()),
                full_bytes=2 * 4 * layer.out_features * layer.in_features,
                skipped=max((int(state["skipped"]) for state in states if state), default=0),
                reason=", ".join(filter(None, [layer.describe(), f"{count} restarts" if count else ""])),
            )
        for p, _ in self.table.members():
            if p not in inside:
                row = parameter_row(self.table, self.mode, p)
                left = self.conversion.left.get(row.name)
                yield replace(row, reason=f"not converted: {left}" if left else _why_not(row))

    def stats(self) -> dict[str, float]:
        """Counters for any logger, as a flat dict of numbers.

        Returns:
            restarts: of layers, over all of them.
            state_reset: the share of a layer's state that the last restart reset.
            skipped_gradients: parameters left out of a step because their gradient was not finite.
        """
        layers = self.conversion.layers.items()
        return {
            "restarts": float(sum(self._restarts(name, layer) for name, layer in layers)),
            "state_reset": self._last_reset,
            "skipped_gradients": super().stats()["skipped_gradients"],
        }


def _groups(model: nn.Module, conversion: Conversion, rest_lr: float | None) -> list[dict[str, Any]]:
    """Factors; other matrices; vectors, without decay."""
    own = {id(getattr(layer, key)) for layer in conversion.layers.values() for key in layer.factors}
    factors: list[tuple[str, Tensor]] = []
    matrices: list[tuple[str, Tensor]] = []
    vectors: list[tuple[str, Tensor]] = []
    for name, p in model.named_parameters():
        if id(p) in own:
            factors.append((name, p))
        elif p.requires_grad:
            (matrices if p.dim() > 1 else vectors).append((name, p))
    rest = {} if rest_lr is None else {"lr": rest_lr}
    groups = [{"params": factors, "factors": True}, {"params": matrices, **rest}]
    groups.append({"params": vectors, "weight_decay": 0.0, **rest})
    return [group for group in groups if group["params"]]


def _why_not(row: Row) -> str:
    frozen = "frozen: no state yet"
    if row.reason == frozen:
        return frozen
    return "a vector or scalar" if len(row.shape) < 2 else "not a linear layer, or the head, or excluded"
