"""LoQT: quantized weights, trained in subspaces. Loeschcke et al., NeurIPS 2024, https://arxiv.org/abs/2405.16528"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count as counting
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from ..distributed.lockstep import ranks
from ..distributed.placement import algebra_of_rows
from ..engine.member import Member
from ..engine.stepper import Rescale, Stepper
from ..engine.table import ParameterTable
from ..engine.watch import Watch
from ..layers.convert import Conversion, leave_to_ranks
from ..layers.linear import ReparameterizedLinear
from ..layers.quantized_linear import QuantizedLinear
from ..parts import NoMomentum, NoScaling
from ..parts.recipes import BASES, adamw
from ..parts.refresh import ahead
from ..recipe.algebra import Algebra
from ..recipe.recipe import Recipe, Time
from ..recipe.weights import is_packed, working_dtype
from ..weight_space import WeightSpaceOptimizer
from .options import WEIGHT_OPTIONS, given


class LoQT(WeightSpaceOptimizer):
    __doc__ = (
        r"""AdamW on one factor of an update to quantized weights; the other factor follows the gradient, as in GaLore.

        W = Q + s B P                           Q (m, n) and P (r, n) quantized, B (m, r) trained; P belongs to the
                                                shorter side, so W = Q + s P B where n > m
        before updates 0, tau, 2 tau + [psi], 3 tau + [psi] + [psi^2], ...:
            G = gradient of W,  P <- quantize(leading singular vectors of G),  moments of B reset
            (Q, B) <- such that Q + s B P is close to W (error compensation),  gradient of B = s G P^T

    Memory per weight, m >= n: `m n` and `n r` at 0.56 bytes per element, `4 m r` for B, its gradient and two moments.
    A weight that is due for a new subspace also has a gradient `m n`. Before the first update all weights have this
    gradient; later they have it one after another (`stagger`), and with `step_in_backward` never two at once.
    torch.compile makes a graph for each set of weights that need gradients: compile layers one by one, or the model
    with stagger=False. Under `fully_shard` with base="dense" all these tensors are sharded, and a new subspace is
    fitted by sums of r columns.

    Args:
        rank: of B and P, or a fraction of min(m, n).
        update_proj_gap: tau, the initial number of updates between subspaces.
        gap_growth: psi. Gaps grow by `[psi^k]`; 1 keeps them at tau.
        scale: s itself, not divided by the rank. Published: 0.4 at 60M, 0.5 at 130M and 350M, 0.25 from 1B on.
        base: how Q and P are kept: "nf4", "int8", or "dense" (the paper's LoQT-nq).
        basis: "rsvd" (subspace iteration) or "svd".
        compensation: number of iterations of error compensation; 0: no compensation, and B starts at zero.
        moments: what a new subspace does to the moments of B: "reset", with a clock that restarts too, or "keep", as
            published.
        stagger: spread the new subspaces of different layers over the updates; False: all layers together.

    Example::

        opt = lowrank_optim.LoQT(model, lr=1e-2, rank=128, scale=0.4)

    Differences from the paper and from its authors' code: no batch is spent on a new subspace (the code takes the
    gradient of a batch with the factors switched off, and trains nothing with it); B's moments are reset, because they
    belong to the old subspace (the code keeps them); compensation minimizes the distance to W, as in the code (the
    printed formula does not, and oscillates); for wide layers P holds columns (the code's eigh option takes rows);
    growing gaps and compensation are on by default; updates are counted, not forward passes.
    """
        + WEIGHT_OPTIONS
    )
    layer = QuantizedLinear
    irreplaceable = "its subspaces follow gradients of quantized weights, which DeepSpeed takes for trained ones"
    layer_options = ("scale", "base")
    fixed = ("update_proj_gap",)
    choices = {"base": ("nf4", "int8", "dense"), "basis": ("rsvd", "svd"), "moments": ("reset", "keep")}

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        rank: int | float = 0.25,
        update_proj_gap: int = 100,
        gap_growth: float = 1.2,
        scale: float = 0.5,
        base: str = "nf4",
        basis: str = "rsvd",
        compensation: int = 5,
        moments: str = "reset",
        stagger: bool = True,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        rest_lr: float | None = None,
        state_dtype: str = "float32",
        bf16_update: str = "stochastic",
        nonfinite: str = "skip",
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(model, {**given(locals()), "whole": False}, strict=strict)
        leave_to_ranks(model, [cast(QuantizedLinear, layer).base for layer in self.conversion.layers.values()])
        self._aim()

    # -- when ----------------------------------------------------------------------------------------------------------

    def restart(self, name: str, layer: ReparameterizedLinear, count: int, group: dict[str, Any]) -> bool:
        """Return whether the layer took a new subspace; that happened within the update, where the gradient was."""
        return layer.leader in self._due

    def restarts(self, count: int, group: dict[str, Any]) -> int:
        return sum(time < count for time in _times(count, 0, group))

    def _restarts(self, name: str, layer: ReparameterizedLinear) -> int:
        place = list(self.conversion.layers).index(name)
        return sum(time < self._count(layer) for time in self._times(place, layer))

    def _times(self, place: int, layer: ReparameterizedLinear) -> Iterator[int]:
        """Yield the counts at which a layer takes new subspaces, up to its current count."""
        group = self.param_groups[0]
        return _times(self._count(layer), place if group["stagger"] else 0, group)

    def _is_due(self, place: int, layer: ReparameterizedLinear) -> bool:
        """Whether a layer takes a new subspace before its next update. `place`: its index among the layers."""
        group, count = self.param_groups[0], self._count(layer)
        if group["gap_growth"] > 1:
            return count in self._times(place, layer)  # gaps grow, so there are few counts to search
        gap = group["update_proj_gap"]
        return count == 0 or (count + ahead(place if group["stagger"] else 0, gap)) % gap == 0

    def _aim(self) -> None:
        """Request gradients, in the next step, of exactly the weights that are due for a new subspace."""
        # The factors of these layers are the only record: requires_grad is none, as users may unfreeze a whole model.
        self._due: set[Tensor] = set()
        for place, layer in enumerate(cast(Any, self.conversion.layers).values()):
            due = self._is_due(place, layer)
            if due:
                self._due.add(layer.B)
            else:
                layer.base.grad = None  # zero_grad(set_to_none=False) would keep the whole gradient allocated
            layer.base.requires_grad_(due and layer.B.requires_grad)

    def _continue(self) -> None:
        super()._continue()
        self._aim()

    # -- the step ------------------------------------------------------------------------------------------------------

    def plain(self, group: dict[str, Any]) -> Recipe:
        """Return the recipe of a group; quantized weights keep no moments, as no step updates them."""
        if not group["whole"]:
            return super().plain(group)
        return replace(adamw(group), momentum=NoMomentum(), scaling=NoScaling())

    def extra_groups(self, conversion: Conversion) -> list[dict[str, Any]]:
        """Return a group of the quantized weights. They have no moments, but GradScaler and `zero_grad` need them."""
        bases = [
            (f"{name}.base", cast(QuantizedLinear, layer).base.requires_grad_(True))
            for name, layer in conversion.layers.items()
        ]
        return [{"params": bases, "whole": True, "bf16_update": "none"}]

    @torch._disable_dynamo
    def _step(self) -> None:
        super()._step()
        self._aim()

    def _make_stepper(self, table: ParameterTable, watch: Watch) -> Stepper:
        return _StepperOfBases(table, watch)

    def bases(self) -> dict[Tensor, QuantizedLinear]:
        """Return the layer of each quantized weight."""
        layers = (cast(QuantizedLinear, layer) for layer in self.conversion.layers.values())
        return {layer.base: layer for layer in layers}

    def due(self, layer: QuantizedLinear) -> bool:
        """Whether a layer takes a new subspace in this step."""
        return layer.B in self._due

    def agree(self, layer: QuantizedLinear, grad: Tensor) -> None:
        """Average the gradient of a weight over data-parallel ranks; before the first update, send rank 0's weight too.

        Wrappers do both only for parameters that have a gradient in every step.
        """
        dist.all_reduce(grad.div_(dist.get_world_size()))
        if self._count(layer) == 0:
            for x in cast(Any, layer.base).parts() if is_packed(layer.base) else [layer.base.detach()]:
                dist.broadcast(x, 0)

    def new_subspace(self, layer: QuantizedLinear, g: Tensor, algebra: Algebra) -> Tensor:
        """Fit the subspace of a layer to the gradient of its weight, and return the gradient of its factor.

        Args:
            g: the local part of the gradient (m, n).
            algebra: the operations on `g`, which is sharded under `fully_shard`.
        """
        group, count = self.param_groups[0], self._count(layer)

        def draw(shape: tuple[int, ...], purpose: str = "sketch", some: slice | None = None) -> Tensor:
            stream = ops.stream_of(purpose, count)
            here, start = algebra.own(shape)
            return ops.normal(here, layer.key, stream, g.device, start, some).to(working_dtype(layer.B))

        def fit(g: Tensor) -> Tensor:
            at = Time(count, float(count))
            return BASES[group["basis"]].fit(algebra, g, None, layer.rank, draw, at)["basis"]

        gradient = layer.refit_(fit, g, group["compensation"], algebra)
        self.settle(layer, layer.factors)
        if group["moments"] == "reset":
            self.reset(layer)
        return gradient


class _StepperOfBases(Stepper):
    """A stepper that updates a layer with a new subspace from the gradient of its quantized weight.

    The gradient of the layer's factor belongs to the old subspace and is dropped.
    """

    def update(self, members: list[Member], rescale: Rescale | None = None) -> None:
        loqt, table = cast(LoQT, self.table.method), self.table
        bases = loqt.bases()
        # Factors of layers that are due are left out: the old subspace of their gradients is about to be replaced.
        factors = {layer.B for layer in bases.values() if loqt.due(layer)}
        due = [member for member in members if member.p in bases and loqt.due(bases[member.p])]
        remaining = [member for member in members if member.p not in bases and member.p not in factors]
        if ranks()[1] > 1:
            for member in due:
                if not table.layouts[member.p].sharded:
                    loqt.agree(bases[member.p], member.grad)
        # With nonfinite="raise" the step stops before the first subspace is taken.
        strict = [member for member in due + remaining if member.group["nonfinite"] == "raise"]
        if strict:
            self.finite(strict, None)
        for member in due:
            self._update_due(loqt, bases[member.p], member, rescale)
        super().update(remaining, rescale)

    def _update_due(self, loqt: LoQT, layer: QuantizedLinear, member: Member, rescale: Rescale | None) -> None:
        """Take a new subspace and update the layer's factor in it; a bad or zero gradient leaves the layer due."""
        finite, layout = self.finite([member], rescale), self.table.layouts[member.p]
        g = layout.here(member.grad)
        nonzero = bool(finite) and bool(g.any())
        if not finite or not self.table.anywhere(nonzero):
            return
        gradient = loqt.new_subspace(layer, g, algebra_of_rows(layout, turned=layer.right_singular))
        group = self.table.groups[0]
        super().update([self.table.member(layer.B, group, gradient)])


def _times(until: int, place: int, group: dict[str, Any]) -> Iterator[int]:
    """Yield the counts of updates before which a layer takes a new subspace, up to `until`.

    All layers take the first one at count 0, because there is no step without a subspace. Later ones are staggered by
    `place`, the index of the layer.
    """
    gap, growth = group["update_proj_gap"], group["gap_growth"]
    yield 0
    time = gap - ahead(place, gap)
    for k in counting(1):
        if time > until:
            return
        yield time
        time += gap + (int(growth**k) if growth > 1 else 0)
