"""The gradients that are alive with step in backward: their bytes, and a table per parameter."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..engine import limits
from ..engine.table import ParameterTable
from ..recipe.weights import working_dtype
from ..reports.report import Report, Row, human


def most_gradients(table: ParameterTable, accumulation_steps: int, accumulate: str = "projected") -> int:
    """Return the most bytes of gradients alive at once: kept between micro-batches, and waiting for an update."""
    members = table.members()
    kept = sum(_kept(table, p, group, accumulation_steps, accumulate) for p, group in members)
    return kept + _waiting(table)


def ever_thin(
    table: ParameterTable, p: Tensor, group: dict[str, Any], accumulation_steps: int, accumulate: str
) -> bool:
    """Whether gradients of p accumulate projected in windows without a refresh."""
    plan = table.plans[p]
    wanted = accumulation_steps > 1 and accumulate == "projected" and plan.projected
    return wanted and table.recipe(plan, group).thin


def gradient_report(table: ParameterTable, accumulation_steps: int, accumulate: str) -> Report:
    """Return a table of the gradient bytes kept per parameter between micro-batches, with the reason if it is whole."""
    members = table.members()
    found = _GradientReport(_row(table, p, group, accumulation_steps, accumulate) for p, group in members)
    found.waiting = _waiting(table)
    return found


class _GradientReport(Report):
    """The table of `gradient_report`.

    Attributes:
        waiting: the most bytes of complete gradients that wait for their update.
    """

    waiting: int = 0

    @property
    def summary(self) -> str:
        """Return the line below the table."""
        kept, full = sum(row.state_bytes for row in self), sum(row.full_bytes for row in self)
        line = f"of gradients, {human(kept)} are kept between micro-batches, and {human(self.waiting)} live at once"
        return line + f" in addition, instead of {human(full)}"


def _row(table: ParameterTable, p: Tensor, group: dict[str, Any], accumulation_steps: int, accumulate: str) -> Row:
    """Return the row of one parameter."""
    plan, thin = table.plans[p], ever_thin(table, p, group, accumulation_steps, accumulate)
    method, reason = "projected" if thin else "whole", ""
    if accumulation_steps == 1:
        method = "freed at once"
    elif not thin:
        used = plan.projected and not table.recipe(plan, group).thin
        reason = plan.reason or ("the rest of its gradient is used as well" if used else 'accumulate="whole"')
    return Row(
        name=plan.name,
        shape=plan.shape,
        method=method,
        rank=plan.rank if thin else None,
        side=plan.side,
        state_bytes=_kept(table, p, group, accumulation_steps, accumulate),
        full_bytes=p.numel() * p.element_size() if p.requires_grad else 0,
        skipped=0,
        reason=reason if p.requires_grad else "frozen",
    )


def _kept(table: ParameterTable, p: Tensor, group: dict[str, Any], accumulation_steps: int, accumulate: str) -> int:
    """Return the bytes kept of the gradient of p between micro-batches, in windows without a refresh."""
    if accumulation_steps == 1 or not p.requires_grad:
        return 0
    if not ever_thin(table, p, group, accumulation_steps, accumulate):
        return p.numel() * p.element_size()
    plan = table.plans[p]
    coordinates = table.recipe(plan, group).basis.coordinates(plan.matrix, plan.rank or 0)
    return plan.count * math.prod(coordinates) * working_dtype(p).itemsize


def _waiting(table: ParameterTable) -> int:
    """Return the most bytes of complete, unused gradients: the newest, and those that are stacked with it."""
    trained = [(p, group) for p, group in table.members() if p.requires_grad]
    sizes = [p.numel() * p.element_size() for p, _ in trained]
    stacked = any(group["foreach"] or p.device.type not in ("cpu", "meta") for p, group in trained)
    return min(max(sizes, default=0) + (limits.CHUNK_BYTES if stacked else 0), sum(sizes))
