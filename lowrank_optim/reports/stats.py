"""Counters of a training run, for any logger.

Training does not need them. Checkpoints have only the counters that are part of the state.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from ..engine.table import ParameterTable
from ..engine.watch import Watch
from ..parts.limited import HITS


def stats(table: ParameterTable, watch: Watch) -> dict[str, float]:
    """Return the counters of a run; `LowRankOptimizer.stats` names them."""
    states = list(table.all_states())
    result = {
        "refreshes": float(sum(_counts(states, "refreshes"))),
        "refresh_seconds": watch.refresh_seconds,
        "skipped_gradients": float(sum(_counts(states, "skipped"))),
        "moment_resets": float(sum(max(0, count - 1) for count in _counts(_restarting(table), "refreshes"))),
        "limiter_hits": float(sum(_counts(states, HITS))),
    }
    shares = _shares(watch.captured)
    if shares:
        result["captured_energy"] = sum(shares.values()) / len(shares)
    return {**result, **{f"captured_energy/{name}": share for name, share in shares.items()}}


def _counts(states: list[dict[str, Tensor]], key: str) -> list[int]:
    """Return the counter of every matrix, over all states that have it."""
    return [int(count) for counts in _read([state[key] for state in states if key in state]) for count in counts]


def _restarting(table: ParameterTable) -> list[dict[str, Tensor]]:
    """Return the states of the parameters whose moments a refresh resets.

    Their first refresh finds nothing to reset, so `stats` counts one reset fewer than refreshes.
    """
    restarts = {id(group) for group in table.groups if table.method.recipe(group).refresh.restarts}
    return [state for p, group in table.members() if id(group) in restarts and (state := table.state(p))]


def _shares(captured: dict[str, dict[int, Tensor]]) -> dict[str, float]:
    """Return the share of the gradient's energy in the subspace by parameter, averaged over its matrices."""
    read = iter(_read([part for parts in captured.values() for part in parts.values()]))
    numbers = {name: [share for _ in parts for share in next(read)] for name, parts in captured.items()}
    return {name: sum(shares) / len(shares) for name, shares in numbers.items()}


def _read(tensors: list[Tensor]) -> list[list[float]]:
    """Return the numbers of each tensor, with one synchronization per device."""
    devices: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        devices.setdefault(tensor.device, []).append(i)
    found: list[list[float]] = [[] for _ in tensors]
    for same in devices.values():
        flat = iter(torch.cat([tensors[i].reshape(-1) for i in same]).tolist())
        for i in same:
            found[i] = list(islice(flat, tensors[i].numel()))
    return found
