"""The table that `report()` returns: how an optimizer updates each parameter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from ..engine.mode import StepMode
from ..engine.table import ParameterTable
from .storages import stored

_NORM_BYTES = 16  # two float64: a sum of squares, and the number of ranks that have a gradient
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Row:
    """The row of one parameter.

    Attributes:
        name, shape: of the whole parameter, also where it is sharded.
        method: the class that projects it, or the rule for plain parameters.
        rank, side: of the projection; None and "-" where there is none.
        state_bytes: bytes of its state in this process.
        full_bytes: bytes of two float32 moments of the local part; 0 for frozen parameters.
        skipped: non-finite gradients that were skipped.
        reason: the remark: why the parameter is plain or frozen, or how a layer is converted.
        layout: the local part of a DTensor; "" for ordinary tensors.
        sent_per_step, sent_per_refresh: average bytes that this process handed to collectives for the parameter,
            without the norms of gradients; None before the first measurement. A refresh of a shard sends its bytes in
            addition to those of a step; with `ddp_project` it sends them instead.
    """

    name: str
    shape: tuple[int, ...]
    method: str
    rank: int | None
    side: str
    state_bytes: int
    full_bytes: int
    skipped: int
    reason: str
    layout: str = ""
    sent_per_step: float | None = None
    sent_per_refresh: float | None = None


class Report(list[Row]):
    """A list of rows whose `str` is a table with a summary line below it.

    Attributes:
        note: a remark at the end of the summary, or "".
        verb: the participle for parameters that the method reduces: "projected" or "converted".
    """

    note: str = ""
    verb: str = "projected"

    def __str__(self) -> str:
        head: tuple[str, ...] = ("parameter", "shape", "method", "rank", "side", "state", "remarks")
        right, sharded = {3, 5}, any(row.layout or row.sent_per_step or row.sent_per_refresh for row in self)
        if sharded:
            right, head = {3, 5, 7, 8}, (*head[:-1], "here", "sent/step", "per refresh", head[-1])
        cells = [head, *(_cells(row, sharded) for row in self)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        lines = []
        for row in cells:
            padded = [cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)]
            lines.append("  ".join(padded).rstrip())
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, self.summary])

    @property
    def summary(self) -> str:
        """Return one line: how many parameters are projected, and the state compared with full-rank moments."""
        state, full = sum(row.state_bytes for row in self), sum(row.full_bytes for row in self)
        projected = sum(row.rank is not None for row in self)
        skipped = sum(row.skipped for row in self)
        subject = "parameters" if self.verb == "projected" else "layers and parameters"
        line = f"{projected} of {len(self)} {subject} {self.verb}; state {human(state)}"
        line += f", {state / max(full, 1):.2f} of the {human(full)} of two float32 moments"
        line += f"; {skipped} non-finite gradients skipped" if skipped else ""
        return line + (f"; {self.note}" if self.note else "")


def report(table: ParameterTable, mode: StepMode | None) -> Report:
    """Return one row per updated tensor, with the note of the mode or of the layouts below the table."""
    found = Report(parameter_row(table, mode, p) for p, _ in table.members())
    if mode is not None:
        found.note = mode.note()
    sharded = sum(layout.sharded for layout in table.layouts.values())
    if sharded:
        found.note = f"of this process; norms of gradients: {human(_NORM_BYTES * sharded)} sent per step"
    return found


def parameter_row(table: ParameterTable, mode: StepMode | None, p: Tensor) -> Row:
    """Return the row of one updated tensor."""
    plan, state = table.plans[p], table.state(p)
    layout = table.layouts[p]
    per_step, per_refresh = (None if mode is None else mode.sent(p)) or layout.sent
    frozen = "" if state or p.requires_grad else "frozen: no state yet"
    return Row(
        name=plan.name,
        shape=plan.shape,
        method=table.name if plan.projected else table.method.rule,
        rank=plan.rank,
        side=plan.side,
        state_bytes=sum(layout.here(tensor).nbytes for tensor in state.values()),
        full_bytes=0 if frozen else 2 * 4 * layout.here(p).numel(),
        skipped=int(state["skipped"]) if state else 0,
        reason=frozen or plan.reason + (" (fallback)" if plan.fallback else ""),
        layout=layout.place,
        sent_per_step=per_step,
        sent_per_refresh=per_refresh,
    )


def _cells(row: Row, sharded: bool) -> tuple[str, ...]:
    """Return the cells of a row as text, with columns for layout and traffic if a parameter is sharded."""
    shape = "x".join(map(str, row.shape)) or "scalar"
    rank = "-" if row.rank is None else str(row.rank)
    cells = row.name, shape, row.method, rank, row.side, human(row.state_bytes)
    if not sharded:
        return *cells, row.reason
    sent = ("-" if count is None else human(count) for count in (row.sent_per_step, row.sent_per_refresh))
    return *cells, row.layout or "whole", *sent, row.reason


def human(count: float) -> str:
    """Return a byte count in a readable unit, such as "1.50 MiB"."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.2f} {_UNITS[unit]}" if unit else f"{count:.0f} B"


def state_bytes(optimizer: Optimizer) -> int:
    """Return the persistent bytes of any optimizer: each storage that its state keeps alive, counted once and whole."""
    return stored(list(optimizer.state.values()))
