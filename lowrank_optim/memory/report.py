"""The memory report of a training: measured and predicted bytes, and the reasons why they are not fewer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks
from ..modes.backward import in_backward
from ..modes.gradient_memory import most_gradients
from ..optimizer import LowRankOptimizer
from ..recipe.weights import working_dtype
from ..reports.report import human, state_bytes
from ..reports.storages import stored
from ..weight_space import WeightSpaceOptimizer
from .estimate import _bytes_after_step, _meta, expected
from .needs import COUNTERS, expected_state, state_kinds
from .peak import StepPeak, measure
from .reasons import Facts, Figure, reasons

_COLUMNS = ("", "measured", "predicted", "AdamW")
_EMPTY = Figure(None, None, None)


@dataclass(frozen=True)
class MemoryReport:
    """The result of `memory_report`; `print` it.

    Attributes:
        figures: bytes by row, from "weights" to "whole step"; also `report["weights"]`.
        states: the bytes of the row "optimizer" by kind: moments by their key, "bases", "counters"; also
            `report["bases"]`.
        notes: remarks that are necessary to read the figures.
        reasons: one sentence per reason why the memory is not lower, with the way out.
    """

    figures: dict[str, Figure]
    states: dict[str, Figure]
    notes: tuple[str, ...]
    reasons: tuple[str, ...]

    def __getitem__(self, name: str) -> Figure:
        """Return the figure of a row or of a kind of state."""
        return {**self.states, **self.figures}[name]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [_COLUMNS]
        for name, figure in self.figures.items():
            rows.append((name, *_cells(figure)))
            if name == "optimizer":
                rows += [(f"  {kind}", *_cells(state)) for kind, state in self.states.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines += [f"({note})" for note in self.notes] + [f"- {reason}" for reason in self.reasons]
        return "\n".join(line.rstrip() for line in lines)


def memory_report(model: nn.Module, optimizer: Optimizer, *, step: Callable[[], object] | None = None) -> MemoryReport:
    """Report the memory of a training after at least one step: measured, predicted, under AdamW, and why not less.

    The column "measured" counts real storages, each once and whole. "predicted" is the result of `estimate_memory` for
    this optimizer. "AdamW" is torch's AdamW on the same weights, with whole gradients; converted layers count as plain
    layers. The row "kept" is the sum of the rows above it. The two rows below it are held for a moment only:

    - "update": the peak within `optimizer.step()`, beyond what was allocated when it was called. The prediction
      includes the refit of the largest basis if the measured step refitted any.
    - "whole step": the peak of everything that `step` made: activations, temporaries, gradients. On CUDA it comes from
      the allocator, whose peak statistics are reset. Elsewhere tensors are counted, which misses buffers of BLAS and
      LAPACK, and other threads.

    Args:
        model: the model that has the optimizer's parameters. Parameters that are frozen or left out of the optimizer
            are counted separately.
        optimizer: an optimizer of this package, or another torch.optim.Optimizer. There are no predictions for classes
            that are neither ours nor torch's own.
        step: runs one whole training step: forward, backward, `optimizer.step()`. It is called once, and trains.
            Existing gradients are dropped first. Without `step`, the gradients are those now in `p.grad`, and the last
            two rows are empty.

    Errors:
        TypeError: `model` is no module, `optimizer` no optimizer, or `step` cannot be called.
        ValueError: the optimizer has parameters of another model, trains none, or has taken no step.
        NotImplementedError: the model has sharded parameters (DTensor); `optimizer.report()` shows the local bytes.

    Example::

        def step():
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # the first one fits every basis
        print(lowrank_optim.memory_report(model, optimizer, step=step))
    """
    trained = _check(model, optimizer, step)
    before, peak = _refreshes(optimizer), None
    if step is not None:
        optimizer.zero_grad()
        peak = measure(step, optimizer, trained[0].device, lambda: _sums(optimizer))
    refits = _refreshes(optimizer) - before
    figures, states = _figures(model, optimizer, trained, peak, refits), _states(optimizer)
    if not _stepped(optimizer, figures["optimizer"]):
        raise ValueError("the optimizer has taken no step yet: run one training step before, or pass step=")
    facts = Facts(model, optimizer, figures, peak)
    return MemoryReport(figures, states, tuple(_notes(optimizer, peak, refits)), tuple(reasons(facts)))


def _check(model: nn.Module, optimizer: Optimizer, step: object) -> list[Tensor]:
    """Return the trained parameters, after refusing arguments that do not belong together."""
    checks.module(model)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; unwrap it")
    if step is not None and not callable(step):
        raise TypeError(f"step must be a function that runs one training step, got {type(step).__name__}")
    for name, p in model.named_parameters():
        checks.whole(name, p, "memory_report")
    inside = set(model.parameters())
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    outside = sum(p not in inside for p in trained)
    if outside or not trained:
        raise ValueError(
            f"{outside} of the {len(trained)} parameters that the optimizer trains are not the model's. Pass the model "
            "that the optimizer was made for, not a copy"
        )
    return trained


def _figures(
    model: nn.Module, optimizer: Optimizer, trained: list[Tensor], peak: StepPeak | None, refits: int
) -> dict[str, Figure]:
    """Return the rows of the report, in order."""
    weights = sum(p.stored_bytes() if hasattr(p, "stored_bytes") else p.nbytes for p in trained)
    own = sum(p.numel() * p.element_size() for p in trained)
    ids, inside = {id(p) for p in trained}, set(_converted(optimizer))
    frozen = stored([[p for p in model.parameters() if id(p) not in ids], list(model.buffers())])
    elsewhere = stored([p for p in model.parameters() if id(p) not in ids and p not in inside])
    gradients = stored([[p.grad for p in trained], list(_sums(optimizer))]) if peak is None else peak.gradients
    meta = _unconverted(optimizer, trained)
    plain = sum(p.nbytes for p in meta)
    adamw = _bytes_after_step(torch.optim.AdamW(meta), meta)
    found = {"weights": Figure(stored(trained), weights, plain)}
    # AdamW trains a converted layer as one dense weight, so its frozen bases are no separate bytes there.
    if frozen:
        found["frozen weights"] = Figure(frozen, frozen, elsewhere if inside else frozen)
    update = None
    if isinstance(optimizer, LowRankOptimizer):
        handle = in_backward(optimizer)
        most = own if handle is None else most_gradients(optimizer.table, handle.accumulation_steps, handle.accumulate)
        estimate = expected(optimizer, weights, most)
        found["gradients"] = Figure(gradients, estimate.gradients, plain)
        found["optimizer"] = Figure(state_bytes(optimizer), estimate.optimizer, adamw)
        if estimate.shared:
            found["shared dictionaries"] = Figure(stored(_dictionaries(optimizer)), estimate.shared, 0)
        update = estimate.step_workspace + (estimate.refresh_workspace if refits else 0)
    else:
        found["gradients"] = Figure(gradients, own, plain)
        found["optimizer"] = Figure(state_bytes(optimizer), _expected_of_torch(optimizer), adamw)
    found["kept"] = _total(found)
    in_step = None if peak is None or in_backward(optimizer) else peak.update
    found["update"] = Figure(in_step, update, None)
    found["whole step"] = Figure(None if peak is None else peak.whole, None, None)
    return found


def _converted(optimizer: Optimizer) -> Iterator[Tensor]:
    """Return the parameters that are kept in place of a converted weight, trained or not."""
    layers = optimizer.conversion.layers.values() if isinstance(optimizer, WeightSpaceOptimizer) else ()
    return (p for layer in layers for key, p in layer.named_parameters() if key != "bias")


def _unconverted(optimizer: Optimizer, trained: list[Tensor]) -> list[nn.Parameter]:
    """Return meta copies of what AdamW would train: the parameters, with a dense weight per converted layer."""
    inside = set(_converted(optimizer))
    meta = [_meta(p, 0, None)[1] for p in trained if p not in inside]
    if isinstance(optimizer, WeightSpaceOptimizer):
        for layer in optimizer.conversion.layers.values():
            shape, dtype = (layer.out_features, layer.in_features), layer.leader.dtype
            meta.append(nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))
    return meta


def _total(figures: dict[str, Figure]) -> Figure:
    """Return the sum of each column, or None where a summand is unknown."""
    columns = [[getattr(figure, key) for figure in figures.values()] for key in ("measured", "predicted", "adamw")]
    return Figure(*(None if None in column else sum(column) for column in columns))


def _states(optimizer: Optimizer) -> dict[str, Figure]:
    """Return the bytes of state by kind, counters last, without kinds that take none."""
    measured: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    low_rank = isinstance(optimizer, LowRankOptimizer)
    for group in optimizer.param_groups:
        for p in group["params"]:
            kinds = {"step": COUNTERS}
            if isinstance(optimizer, LowRankOptimizer):
                plan = optimizer.table.plans[p]
                kinds = state_kinds(optimizer.table.recipe(plan, group), plan)
                predicted.update(expected_state(optimizer, p, group))
            for key, value in optimizer.state.get(p, {}).items():
                measured[kinds.get(key, key)] += stored(value)
    names = sorted(measured.keys() | predicted.keys(), key=lambda kind: (kind == COUNTERS, kind))
    found = {name: Figure(measured[name], predicted[name] if low_rank else None, None) for name in names}
    return {name: figure for name, figure in found.items() if figure.measured or figure.predicted}


def _expected_of_torch(optimizer: Optimizer) -> int | None:
    """Return the bytes of state of torch's own classes; None for other classes, and where a step needs real numbers."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    members = [[_meta(p, 0, None)[1] for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
    groups = [
        {**group, "params": trained} for group, trained in zip(optimizer.param_groups, members, strict=True) if trained
    ]
    fresh = type(optimizer)(groups, **{key: value for key, value in optimizer.defaults.items() if key == "lr"})
    try:
        return _bytes_after_step(fresh, [p for trained in members for p in trained])
    except ValueError:
        return None


def _dictionaries(optimizer: LowRankOptimizer) -> list[dict[str, Tensor]]:
    """Return the shared tensors of each projected parameter; equal matrices share the same tensors."""
    found = []
    for p, group in optimizer.table.members():
        plan = optimizer.table.plans[p]
        if plan.projected and p.requires_grad:
            like = torch.empty(0, dtype=working_dtype(p), device=p.device)
            found.append(optimizer.table.recipe(plan, group).basis.sharing(plan.matrix, like))
    return found


def _sums(optimizer: Optimizer) -> Iterator[Tensor]:
    """Return the tensors in which gradients accumulate outside `p.grad`."""
    handle = in_backward(optimizer)
    return iter(()) if handle is None else handle.sums()


def _refreshes(optimizer: Optimizer) -> int:
    """Return how many bases have been fitted so far."""
    if not isinstance(optimizer, LowRankOptimizer):
        return 0
    return sum(int(state["refreshes"].sum()) for state in optimizer.state.values() if "refreshes" in state)


def _stepped(optimizer: Optimizer, state: Figure) -> bool:
    """Whether the optimizer has taken a step. `state` has the bytes of its state."""
    if isinstance(optimizer, LowRankOptimizer):
        return any(state["step"] for state in optimizer.state.values() if state)
    return (
        bool(state.measured) or not state.predicted
    )  # torch makes its state at the first step; plain SGD never has any


def _notes(optimizer: Optimizer, peak: StepPeak | None, refits: int) -> Iterator[str]:
    """Yield the remarks below the table."""
    handle = in_backward(optimizer)
    if peak is None:
        yield "update, whole step: not measured; pass step="
    if refits:
        yield f"the measured step refitted {refits} bases"
    if handle is not None:
        measured = "gradients as they are kept between steps, predicted" if peak is None else "gradients"
        yield f"steps during backward: {measured} as most live at once; no row shows the updates apart"


def _cells(figure: Figure) -> tuple[str, ...]:
    """Return the cells of a row as text; unknown bytes are empty."""
    return tuple("" if x is None else human(x) for x in (figure.measured, figure.predicted, figure.adamw))
