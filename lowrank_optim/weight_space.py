"""The base of weight-space methods: converted layers, AdamW on their factors, and a restart rule.

The engine is the same as for all other methods. It sees factors as parameters in full space, so state in 8 bits,
stochastic rounding, skipped gradients, step in backward and checkpoints work as everywhere else. This module adds the
layers, and their restarts after an update.
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
    """The base class. A subclass names its layer, the options that belong to the layer, and what a restart does.

    Args:
        model: its linear layers are converted in place.
        options: all arguments of the subclass: options of groups, of the conversion, and `rest_lr`.
        strict: whether layers that cannot be converted are an error.

    Attributes:
        layer: the class that replaces linear layers.
        layer_options: constructor arguments that go to the layer instead of the groups.
        conversion: the converted layers by name, and the reasons why other layers were left.
    """

    layer: ClassVar[type[ReparameterizedLinear]]
    irreplaceable = "its restarts read and write these"
    unpartitionable = "its restarts read and write frozen weights"
    layer_options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module, options: dict[str, Any], *, strict: bool = False) -> None:
        options, model = dict(options), layer_checks.whole_model(model)
        how = {key: options.pop(key) for key in (*_HOW_TO_CONVERT, *self.layer_options)}
        rest_lr, seed = options.pop("rest_lr"), options["seed"]
        defaults = {**options, "rank": None, "factors": False}
        hyperparameters.check({**defaults, **how, "rest_lr": rest_lr}, self.choices)
        self.check(defaults)
        # A sharded model was converted before `fully_shard`, so that its factors are shards; its layers are taken over.
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
            conversion.undo()  # the model must be as before
            raise
        conversion.places.clear()  # frees the plain layers, which hold the dense weights

    # -- what a subclass defines ---------------------------------------------------------------------------------------

    def check(self, group: dict[str, Any]) -> None:
        """Raise a ValueError for options that exclude each other."""

    def extra_groups(self, conversion: Conversion) -> list[dict[str, Any]]:
        """Return groups in addition to those of the factors and of the parameters that are not converted."""
        return []

    def refuse_shard(self, plan: Plan, group: dict[str, Any]) -> None:
        """Refuse partial resets of sharded factors, which would need all of their moments."""
        if group["factors"] and group.get("reset") in PARTIAL:
            layer_checks.whole_restart(type(self).__name__, group["reset"])

    def updated(self, layers: Sequence[ReparameterizedLinear]) -> None:
        """Observe an update, before any layer restarts. `layers` are the layers that took part in it."""

    @abc.abstractmethod
    def restart(self, name: str, layer: ReparameterizedLinear, count: int, group: dict[str, Any]) -> bool:
        """Restart a layer if a restart is due after its update number `count`; return whether it was."""

    @abc.abstractmethod
    def restarts(self, count: int, group: dict[str, Any]) -> int:
        """Return how many restarts a layer has had after `count` updates."""

    def recipe(self, group: dict[str, Any]) -> Recipe:
        return adamw(group)

    def plain(self, group: dict[str, Any]) -> Recipe:
        """Return AdamW's recipe; factors get clocks that restarts reset from outside of the recipe."""
        recipe = self.recipe(group)
        return replace(recipe, refresh=Outside(single=group.get("reset") in PARTIAL)) if group["factors"] else recipe

    # -- the step ------------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def _step(self) -> None:
        super()._step()
        group, layers, restarted = self.param_groups[0], self.conversion.layers, 0
        if not (group["factors"] and group["params"]):
            return  # DeepSpeed steps one group at a time and hides the others; restarts follow the factors' own step
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
        """Return the updates that a layer was offered, including those skipped for a non-finite gradient."""
        return self._offered(layer.leader)

    def _counts(self) -> list[int]:
        """Return the counts of all layers. Under ZeRO all ranks must call it: a rank may have no part of a factor."""
        layers = self.conversion.layers.values()
        if not self.table.spread:
            return [self._count(layer) for layer in layers]
        # The factors of a layer may be in different flat tensors, which DeepSpeed steps one after the other. The layer
        # is complete with the last of them, so the minimum over its factors counts.
        sizes = [len(layer.factors) for layer in layers]
        offered = [self._offered(getattr(layer, key)) for layer in layers for key in layer.factors]
        everywhere = largest(self.table.spread, torch.tensor(offered))
        return [int(counts.min()) for counts in torch.split(everywhere, sizes)]

    def _offered(self, factor: Tensor) -> int:
        """Return the number of updates that the local parts of a factor were offered; 0 without a local part."""
        states = [self.table.state(p) for p in self.table.of_parameter(factor)]
        return max((int(state["step"]) + int(state["skipped"]) for state in states if state), default=0)

    def _restarts(self, name: str, layer: ReparameterizedLinear) -> int:
        """Return how many restarts a layer has had so far."""
        return self.restarts(self._counted[name], self.param_groups[0])

    def trained(self, layer: ReparameterizedLinear, *keys: str) -> AbstractContextManager[None]:
        """Replace factors of a layer by the tensors that are trained, within the returned context.

        They differ where a wrapper such as DeepSpeed trains master weights.
        """
        return masters(self.table, layer, keys)

    def reset(
        self, layer: ReparameterizedLinear, how: str = "drop", ratio: float = 1.0, only: Collection[str] | None = None
    ) -> float:
        """Reset the moments of a layer's factors, and return the fraction of their entries that were reset.

        Args:
            how: the kind of reset, as the option `reset` names it.
            ratio: the fraction of entries that a partial reset drops.
            only: names of the factors to reset; None: all.
        """
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
        """Clear the compensation (`bf16_update="kahan"`) of overwritten factors, as it belongs to old values."""
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
        """Accept all groups: a model in which nothing could be converted was refused before."""

    def restart_workspace(self) -> int:
        """Return the most bytes that the restart of one layer holds for a moment; `estimate_memory` counts them."""
        layers = self.conversion.layers.values()
        return max(layer.restart_workspace() * working_dtype(layer.leader).itemsize for layer in layers)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "conversion": self.conversion, "_last_reset": self._last_reset}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._continue()

    def _continue(self) -> None:
        """Restore the counts that follow from the state, after it was loaded."""
        self._counted = dict(zip(self.conversion.layers, self._counts(), strict=True))

    # -- reports -------------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """Return one row per converted layer, with the state of all its factors, then one per other parameter."""
        table = super().report()
        table[:] = self._rows()
        table.verb = "converted"
        return table

    def _rows(self) -> Iterator[Row]:
        """Yield the rows of the report."""
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
        """Return counters for any logger, as a flat dict of numbers.

        Returns:
            restarts: restarts so far, summed over all layers.
            state_reset: the fraction of a layer's state that the last restart reset.
            skipped_gradients: how often a parameter was skipped because its gradient was not finite.
        """
        layers = self.conversion.layers.items()
        return {
            "restarts": float(sum(self._restarts(name, layer) for name, layer in layers)),
            "state_reset": self._last_reset,
            "skipped_gradients": super().stats()["skipped_gradients"],
        }


def _groups(model: nn.Module, conversion: Conversion, rest_lr: float | None) -> list[dict[str, Any]]:
    """Return the groups of a converted model: factors, other matrices, and vectors without weight decay."""
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
    """Return why a parameter is not part of a converted layer."""
    frozen = "frozen: no state yet"
    if row.reason == frozen:
        return frozen
    return "a vector or scalar" if len(row.shape) < 2 else "not a linear layer, or the head, or excluded"
