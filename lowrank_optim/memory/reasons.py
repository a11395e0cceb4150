"""Reasons why the memory of a training is not lower.

Each function checks one reason, and yields a sentence with its numbers and the way out where the reason applies.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import few
from ..engine import limits
from ..modes.backward import in_backward
from ..optimizer import LowRankOptimizer
from ..recipe.plan import Plan, names_say, resolve_rank
from ..recipe.weights import working_dtype
from ..reports.report import human
from ..weight_space import WeightSpaceOptimizer
from .needs import BASES, expected_state
from .peak import StepPeak

_WORTH = 0.05  # fraction of the kept bytes; a smaller saving is not worth a sentence
_MUCH = 0.25  # fraction of the state; a smaller share does not explain its size
_OTHER_SIDE = {"left": "right", "right": "left", "std": "reverse_std", "reverse_std": "std"}


@dataclass(frozen=True)
class Figure:
    """The bytes of one row of a memory report; None where they are unknown.

    Attributes:
        measured: bytes of real storages.
        predicted: bytes according to `estimate_memory`.
        adamw: bytes that torch's AdamW takes for the same model.
    """

    measured: int | None
    predicted: int | None
    adamw: int | None


@dataclass(frozen=True)
class Facts:
    """The facts from which the reasons are derived: the training and the figures of its report.

    Attributes:
        peak: peaks of a measured step; None if no step was measured.
    """

    model: nn.Module
    optimizer: Optimizer
    figures: dict[str, Figure]
    peak: StepPeak | None

    def measured(self, name: str) -> int:
        """Return the measured bytes of a row, 0 if there are none."""
        return (self.figures[name].measured or 0) if name in self.figures else 0

    def matters(self, saved: float) -> bool:
        """Whether saving so many bytes is worth a sentence."""
        return saved >= _WORTH * self.measured("kept") > 0

    @property
    def trained(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]


@dataclass(frozen=True)
class Entry:
    """One trained parameter of an optimizer of this package.

    Attributes:
        kept: bytes of its state by kind.
    """

    p: Tensor
    group: dict[str, Any]
    plan: Plan
    kept: Counter[str]

    @property
    def bytes(self) -> int:
        return self.kept.total()

    @property
    def plain(self) -> bool:
        """Whether the parameter is neither projected nor kept in place of a converted weight."""
        return not (self.plan.projected or self.group.get("factors") or self.group.get("whole"))


def reasons(facts: Facts) -> Iterator[str]:
    """Yield the reasons that apply, those of the optimizer first."""
    if isinstance(facts.optimizer, LowRankOptimizer):
        entries = list(_entries(facts.optimizer))
        for low_rank in LOW_RANK:
            yield from low_rank(facts, facts.optimizer, entries)
    for general in GENERAL:
        yield from general(facts)


def _entries(optimizer: LowRankOptimizer) -> Iterator[Entry]:
    for p, group in optimizer.table.members():
        if p.requires_grad:
            yield Entry(p, group, optimizer.table.plans[p], expected_state(optimizer, p, group))


def _largest(entries: list[Entry]) -> str:
    """Return the names of the largest entries, and the bytes of state of all entries."""
    ranked = sorted(entries, key=lambda entry: entry.bytes, reverse=True)
    return f"{few([entry.plan.name for entry in ranked])} ({human(sum(entry.bytes for entry in entries))} of state)"


def _converts(entries: list[Entry]) -> bool:
    """Whether the entries belong to a weight-space method."""
    return "factors" in entries[0].group


def _done(entries: list[Entry]) -> str:
    return "converted" if _converts(entries) else "projected"


# -- of the optimizer --------------------------------------------------------------------------------------------------


def rank_not_below(facts: Facts, optimizer: LowRankOptimizer, entries: list[Entry]) -> Iterator[str]:
    found = [entry for entry in entries if entry.plan.reason.startswith("rank ")]
    if facts.matters(sum(entry.bytes for entry in found)):
        yield (
            f"Not projected, because their rank is not below their shorter side: {_largest(found)}. Take a lower rank, "
            "or a fraction of the shorter side such as rank=0.25"
        )


def rank_too_large(facts: Facts, optimizer: LowRankOptimizer, entries: list[Entry]) -> Iterator[str]:
    """Find matrices whose projected state is more than half of the state in full space, error feedback aside."""
    found, kept, whole, lower = [], 0, 0, 0
    for entry in entries if optimizer.ranked else []:
        extra = sum(entry.kept[key] for key in _whole_keys(optimizer, entry))
        full = expected_state(optimizer, entry.p, entry.group, replace(entry.plan, rank=None)).total()
        if entry.plan.projected and entry.bytes - extra > full / 2:
            quarter = replace(entry.plan, rank=resolve_rank(0.25, *entry.plan.matrix))
            found.append(entry)
            kept, whole = kept + entry.bytes - extra, whole + full
            lower += expected_state(optimizer, entry.p, entry.group, quarter).total() - extra
    if facts.matters(kept - lower):
        yield (
            f"The rank is too large to save much: {_largest(found)} keep {human(kept)} of the {human(whole)} that the "
            f"same rule keeps of them unprojected. rank=0.25 keeps {human(lower)}"
        )


def wrong_side(facts: Facts, optimizer: LowRankOptimizer, entries: list[Entry]) -> Iterator[str]:
    """Find matrices whose state would be smaller if the other side were projected at the same rank."""
    found, saved, outweigh = [], 0, 0
    for entry in entries:
        side = _OTHER_SIDE.get(entry.plan.side)
        if side is not None and optimizer.ranked:
            turned = replace(entry.plan, matrix=entry.plan.matrix[::-1], side=side)
            less = entry.bytes - expected_state(optimizer, entry.p, entry.group, turned).total()
            if less > 0:
                found.append(entry)
                saved += less
                outweigh += entry.kept[BASES] > entry.bytes - entry.kept[BASES]
    if facts.matters(saved):
        now = found[0].group["proj_type"]
        why = ", whose bases outweigh their moments" if outweigh > len(found) / 2 else ""
        yield (
            f"Projecting the other side keeps {human(saved)} less at this rank: {_largest(found)}{why}. Try proj_type="
            f"{_OTHER_SIDE[now]!r} instead of {now!r}; this changes the updates, so compare the loss"
        )


def thick_factors(facts: Facts, optimizer: LowRankOptimizer, entries: list[Entry]) -> Iterator[str]:
    """Find factors with more than half as many elements as the weights that they replace."""
    if not isinstance(optimizer, WeightSpaceOptimizer):
        return
    trained = weights = 0
    for layer in optimizer.conversion.layers.values():
        trained += sum(getattr(layer, key).numel() for key in layer.factors)
        weights += layer.out_features * layer.in_features
    if trained > weights / 2:
        yield (
            f"The factors are too large to save much: {trained / 1e6:.2f}M numbers are trained in place of "
            f"{weights / 1e6:.2f}M. Take a lower rank"
        )


def embeddings(facts: Facts, optimizer: LowRankOptimizer, entries: list[Entry]) -> Iterator[str]:
    """Find plain embeddings and heads with much of the state; their names tell them from other plain parameters."""
    found = [entry for entry in entries if entry.plain and names_say(entry.plan.name)]
    state, kept = facts.measured("optimizer"), sum(entry.bytes for entry in found)
    if found and kept > _MUCH * state and facts.matters(kept):
        yield (
            f"Embeddings and heads are not {_done(found)}: {_largest(found)} keep {kept / state:.0%} of all state. Tie "
            "them, "
            + (
                "or keep state in fewer bits"
                if _converts(found)
                else "or project them: skip_embeddings=False in their group, or param_groups(model, include=[...])"
            )
        )


def other_plain(facts: Facts, optimizer: LowRankOptimizer, entries: list[Entry]) -> Iterator[str]:
    """Find other plain parameters with much of the state, apart from those that `rank_not_below` names."""
    plain = [entry for entry in entries if entry.plain and not names_say(entry.plan.name)]
    found = [entry for entry in plain if not entry.plan.reason.startswith("rank ")]
    state, kept = facts.measured("optimizer"), sum(entry.bytes for entry in found)
    if found and kept > _MUCH * state and facts.matters(kept):
        largest = max(found, key=lambda entry: entry.bytes).plan.reason
        yield (
            f"Many parameters are not {_done(found)}: {_largest(found)} keep {kept / state:.0%} of all state"
            + (
                ". Name linear layers among them in include=[...]"
                if _converts(found)
                else f" (the largest: {largest}). Give matrices among them a group with a rank, as param_groups(model, "
                "include=[...]) does"
            )
        )


def wide_state(facts: Facts, optimizer: LowRankOptimizer, entries: list[Entry]) -> Iterator[str]:
    """Compare float32 state with the same state in bfloat16 and int8."""
    wide = [entry for entry in entries if entry.group.get("state_dtype") == "float32"]
    kept = sum(entry.bytes for entry in wide)
    less = {dtype: _with(optimizer, wide, state_dtype=dtype) for dtype in ("bfloat16", "int8")}
    if facts.matters(kept - less["int8"]):
        narrow = sum(entry.bytes for entry in wide if entry.p.dtype != torch.float32)
        contrast = ", though weights have 16 bits" if narrow > kept / 2 else ""
        yield (
            f"State is kept in float32{contrast}: {human(kept)}. state_dtype='bfloat16' keeps "
            f"{human(less['bfloat16'])}, 'int8' {human(less['int8'])}"
        )


def error_feedback(facts: Facts, optimizer: LowRankOptimizer, entries: list[Entry]) -> Iterator[str]:
    """Find the errors that a residual keeps, each as large as its matrix."""
    found = [entry for entry in entries if entry.plan.projected and _whole_keys(optimizer, entry)]
    kept = sum(entry.kept[key] for entry in found for key in _whole_keys(optimizer, entry))
    if not facts.matters(kept):
        return
    optional = [entry for entry in found if "error_feedback" in entry.group]
    less = sum(entry.bytes for entry in optional) - _with(optimizer, optional, error_feedback="int8")
    way_out = "error_feedback='none' drops it" if optional else "Take a method without it"
    if less > 0:
        way_out += f", 'int8' keeps {human(less)} less"
    yield f"Error feedback keeps {human(kept)}: a whole matrix for each of {_largest(found)}. {way_out}"


def stacked(facts: Facts, optimizer: LowRankOptimizer, entries: list[Entry]) -> Iterator[str]:
    """Compare the largest chunk of stacked matrices with the largest single matrix."""
    sizes: Counter[tuple[Any, ...]] = Counter()
    largest = 0
    for entry in entries:
        stack = entry.p.device.type != "cpu" if entry.group["foreach"] is None else entry.group["foreach"]
        size = entry.p.numel() * working_dtype(entry.p).itemsize
        largest = max(largest, size)
        if stack and entry.plan.projected:
            sizes[id(entry.group), entry.plan.matrix, entry.plan.batch, entry.plan.side, entry.p.dtype] += size
    most = min(limits.CHUNK_BYTES, max(sizes.values(), default=0))
    if facts.matters(most - largest):
        yield (
            f"Equal matrices are stacked, which takes up to {human(most)} for each operand of a step, instead of "
            f"{human(largest)} at most. foreach=False updates matrices one at a time"
        )


def whole_gradients(facts: Facts, optimizer: LowRankOptimizer, entries: list[Entry]) -> Iterator[str]:
    """Compare all gradients with the largest one, which step in backward would keep."""
    if in_backward(optimizer) is not None:
        return
    sizes = [entry.p.numel() * entry.p.element_size() for entry in entries]
    if facts.matters(sum(sizes) - max(sizes)):
        yield (
            f"All gradients live at once: {human(sum(sizes))}. With lowrank_optim.step_in_backward(model, optimizer) "
            f"only the largest one does: {human(max(sizes))}"
        )


def accumulated_whole(facts: Facts, optimizer: LowRankOptimizer, entries: list[Entry]) -> Iterator[str]:
    """Find gradients that step in backward accumulates whole."""
    handle = in_backward(optimizer)
    if handle is None or handle.accumulation_steps == 1:
        return
    whole = [row for row in handle.report() if row.method == "whole" and row.state_bytes]
    kept = sum(row.state_bytes for row in whole)
    if facts.matters(kept):
        largest = max(whole, key=lambda row: row.state_bytes)
        yield (
            f"Between micro-batches {human(kept)} of gradients accumulate whole; the largest is that of {largest.name} "
            f"({largest.reason}). accumulation_steps=1 keeps none; accumulate='projected' with GaLore, QGaLore or "
            "GoLore keeps r x n numbers of each projected matrix"
        )


def _whole_keys(optimizer: LowRankOptimizer, entry: Entry) -> list[str]:
    """Return the kinds of state of the residual that are at least as large as the matrix."""
    spec = optimizer.table.recipe(entry.plan, entry.group).residual.spec(entry.plan.matrix)
    return [key for key, tensor in spec.items() if math.prod(tensor.shape) >= math.prod(entry.plan.matrix)]


def _with(optimizer: LowRankOptimizer, entries: Iterable[Entry], **changes: Any) -> int:
    """Return the bytes of state of the entries, if their groups had these options."""
    return sum(expected_state(optimizer, entry.p, {**entry.group, **changes}).total() for entry in entries)


# -- of any training ---------------------------------------------------------------------------------------------------


def float32_weights(facts: Facts) -> Iterator[str]:
    wide = sum(p.nbytes for p in facts.trained if p.dtype == torch.float32 and not hasattr(p, "pack_"))
    if facts.matters(wide / 2):
        rounding = " (bf16_update='stochastic' keeps small updates)" if _ours(facts) else ""
        yield f"Weights are float32: {human(wide)}. In bfloat16 they and their gradients take half{rounding}"


def frozen_base(facts: Facts) -> Iterator[str]:
    frozen = facts.measured("frozen weights")
    if frozen > facts.measured("weights"):
        yield (
            f"Most weights are frozen: {human(frozen)}. Keep them in fewer bits: model.to(torch.bfloat16), "
            + (
                "or base='int8' or 'nf4', where the method has it"
                if isinstance(facts.optimizer, WeightSpaceOptimizer)
                else "or lowrank_optim.quantize_weights for linear layers"
            )
        )


def activations(facts: Facts) -> Iterator[str]:
    """Compare the bytes of a step's activations and temporaries with the kept bytes.

    The difference of two peaks is a lower bound of the former, because the peaks need not coincide.
    """
    if facts.peak is None:
        return
    rest = facts.peak.whole - facts.peak.gradients
    if rest > facts.measured("kept"):
        yield (
            f"Activations and temporaries outweigh everything else: at least {human(rest)} of a step's "
            f"{human(facts.peak.whole)}, compared with {human(facts.measured('kept'))} kept. Activation checkpointing, "
            "or smaller micro-batches with accumulation, lower them; the optimizer cannot"
        )


def _ours(facts: Facts) -> bool:
    return isinstance(facts.optimizer, LowRankOptimizer)


LOW_RANK: tuple[Callable[[Facts, LowRankOptimizer, list[Entry]], Iterator[str]], ...] = (
    rank_not_below,
    rank_too_large,
    wrong_side,
    thick_factors,
    embeddings,
    other_plain,
    wide_state,
    error_feedback,
    stacked,
    whole_gradients,
    accumulated_whole,
)
GENERAL: tuple[Callable[[Facts], Iterator[str]], ...] = (float32_weights, frozen_base, activations)
