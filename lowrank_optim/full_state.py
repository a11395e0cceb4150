"""Optimizer state without a layout: whole tensors by parameter name, from which any number of processes can resume.

Only `Layout.gather`, `Layout.part` and `wrappers/assembly.py` (flat tensors) know layouts. The dictionaries that they
exchange hold plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .checks import few
from .distributed.layout import Layout, others
from .distributed.lockstep import ranks
from .engine.table import GROUP
from .optimizer import LowRankOptimizer
from .recipe.plan import bare_name, decide, shape_of
from .wrappers import adoption, assembly

FORMAT = 1
_KEYS = ("format", "method", "groups", "state")


def full_state(optimizer: LowRankOptimizer) -> dict[str, Any] | None:
    """Return all state of an optimizer, independent of the number of processes and of how they share it.

    It works for one process, DistributedDataParallel, FSDP2 (also hybrid) and DeepSpeed ZeRO 0 to 3. All ranks must
    call it. Each rank holds one whole tensor at a time (with ZeRO 1 to 3, the whole state of one parameter). Names are
    without the prefixes that wrappers add, so a wrapped model and a bare model save the same names.

    Returns:
        On rank 0, and without torch.distributed, a dictionary of copies that `torch.load(weights_only=True)` takes:
        `format`, `method` (the class), `groups` (the numbers of each group, and the names of its parameters) and
        `state` (tensors on the CPU, by parameter name). Under DeepSpeed also `masters`, where it updates weights of
        another dtype than the model's (float32 instead of bfloat16), and `borders`, rows of state that two processes
        have and that differ in their last bits. On other ranks None.

    Errors:
        TypeError: the optimizer is not of this package, such as DeepSpeed's `engine.optimizer`.
        NotImplementedError: flat tensors belong to a part of the ranks only, so other ranks may have more parameters.
        ValueError: two parameters have the same name.
        RuntimeError: state that must be the same on all ranks differs, such as with one head per rank (LTE).

    Example::

        state = lowrank_optim.full_state(optimizer)
        if state is not None:
            torch.save({"model": model.state_dict(), "optimizer": state}, "checkpoint.pt")
    """
    _find(optimizer)
    _same_on_all_ranks(optimizer)
    # Every rank walks the same parameters in the same order, because each of these loops runs collectives.
    state: dict[str, dict[str, Tensor]] = {}
    for name, layout, tensors in _by_name(optimizer):
        whole = {key: layout.gather(x) for key, x in tensors.items()}
        state[name] = {key: x for key, x in whole.items() if x is not None}
    borders: dict[str, assembly.Borders] = {}
    for p, assembled, rows in assembly.whole_states(optimizer.table):
        if not others():
            state[_name(optimizer, p)] = _copies(assembled.items())
        if rows:
            borders[_name(optimizer, p)] = rows
    borders = _of_all_ranks(optimizer, borders)
    masters = _copies((_name(optimizer, p), x) for p, x in assembly.masters(optimizer.table))
    if others():
        return None
    full = {"format": FORMAT, "method": type(optimizer).__name__, "groups": list(_groups(optimizer)), "state": state}
    return {**full, **{key: extra for key, extra in (("borders", borders), ("masters", masters)) if extra}}


def load_full_state(optimizer: LowRankOptimizer, state: Mapping[str, Any] | None) -> None:
    """Load the state that `full_state` has returned, on any number of processes; all ranks must call it.

    The loaded state has the saved bits. The same number of processes (with DeepSpeed also the same stage) resumes bit
    for bit; other numbers resume to rounding. Load the model's weights separately, before `deepspeed.initialize`, and
    call this function after it: then DeepSpeed's float32 weights become the saved masters (docs/distributed.md).

    Args:
        optimizer: built as the saved optimizer was, from parameters of the same names.
        state: the saved state on every rank, or on rank 0 only and None on other ranks, to which it is then sent. Each
            rank holds the whole state in main memory while it loads.

    Errors:
        TypeError, NotImplementedError: as `full_state`, and for numbers of groups that cannot be used here.
        ValueError: the state has another format, method or model; the message names missing and unknown parameters.
            Then no rank has loaded anything.
    """
    _find(optimizer)
    state = _everywhere(state)
    _agreed(lambda: _check(optimizer, state))
    numbers = _numbers(optimizer, state)
    saved: dict[str, Any] = {"state": {}, "param_groups": [], "full": {"borders": {}, "masters": {}, **state}}
    index, flats = 0, optimizer.table.pieces
    for group in optimizer.param_groups:
        local = dict(enumerate(group["params"], index))
        index += len(local)
        own = {key: group[key] for key in ("param_names",) if key in group}
        saved["param_groups"].append({**numbers[group[GROUP]], **own, "params": list(local)})
        names = {i: _name(optimizer, p) for i, p in local.items() if p not in flats}
        saved["state"] |= {i: state["state"][name] for i, name in names.items() if name in state["state"]}
    optimizer.load_state_dict(saved)


def _copies(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return copies on the CPU of rank 0; other ranks only consume the iterator, which may sum over ranks."""
    return {key: x.to("cpu", copy=True) for key, x in tensors if not others()}


def _find(optimizer: LowRankOptimizer) -> None:
    """Refuse optimizers that cannot be saved, and enter tensors that replace parameters into the table."""
    if not isinstance(optimizer, LowRankOptimizer):
        raise TypeError(
            f"full_state and load_full_state need an optimizer of lowrank_optim, got {type(optimizer).__name__}. Under "
            "DeepSpeed pass the optimizer that was given to deepspeed.initialize, not engine.optimizer"
        )
    names: set[str] = set()
    for name in (name for group in optimizer.param_groups for name in _names(optimizer, group)):
        if name in names:
            raise ValueError(f"two parameters are called {name}; give each its own name")
        names.add(name)
    adoption.adopt(optimizer.table, early=True)
    assembly.check(optimizer.table)


def _by_name(optimizer: LowRankOptimizer) -> Iterator[tuple[str, Layout, dict[str, Tensor]]]:
    """Yield (name, layout, local state) of each parameter that has state and is in no flat tensor."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if optimizer.state.get(p) and p not in optimizer.table.pieces:
                yield _name(optimizer, p), optimizer.table.layouts[p], optimizer.state[p]


def _name(optimizer: LowRankOptimizer, p: Tensor) -> str:
    """Return the name of a parameter without the prefixes of wrappers."""
    return bare_name(optimizer.table.plans[p].name)


def _names(optimizer: LowRankOptimizer, group: dict[str, Any]) -> list[str]:
    """Return the names of the parameters that a group was given, even if other tensors replace them now."""
    return [_name(optimizer, p) for _, p in optimizer.table.given[group[GROUP]]]


def _numbers(optimizer: LowRankOptimizer, state: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the saved options of each group by its group number; saved groups are found by their names."""
    saved = {frozenset(group["names"]): group for group in state["groups"]}
    found = {group[GROUP]: saved[frozenset(_names(optimizer, group))] for group in optimizer.param_groups}
    return {number: {key: value for key, value in group.items() if key != "names"} for number, group in found.items()}


def _groups(optimizer: LowRankOptimizer) -> Iterator[dict[str, Any]]:
    """Yield the options of each group, with the names of its parameters."""
    for group in optimizer.param_groups:
        numbers = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for key, value in numbers.items():
            numbers[key] = (
                value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
            )  # lr may be a tensor
        yield {"names": _names(optimizer, group), **numbers}


# -- states that do not fit --------------------------------------------------------------------------------------------


def _check(optimizer: LowRankOptimizer, state: Any) -> None:
    """Refuse a state that is not a full state of such an optimizer."""
    if not isinstance(state, Mapping) or any(key not in state for key in _KEYS):
        keys = list(state) if isinstance(state, Mapping) else type(state).__name__
        raise _misfit(f"expected the keys {list(_KEYS)}, got {keys!r:.80}. Was it made by full_state?")
    if state["format"] != FORMAT:
        raise _misfit(f"it has format {state['format']!r}, and this version reads {FORMAT}")
    if state["method"] != type(optimizer).__name__:
        raise _misfit(f"it is of {state['method']}, and this optimizer is {type(optimizer).__name__}")
    _check_names(optimizer, state["groups"])
    _check_tensors(optimizer, state)


def _check_names(optimizer: LowRankOptimizer, groups: list[Mapping[str, Any]]) -> None:
    """Refuse groups of other parameters. Groups may have another order, as may the parameters within a group."""
    saved = [frozenset(group["names"]) for group in groups]
    ours = [frozenset(_names(optimizer, group)) for group in optimizer.param_groups]
    known, present = {name for names in saved for name in names}, {name for names in ours for name in names}
    missing, unknown = present - known, known - present
    if missing:
        raise _misfit(f"it has nothing for {few(sorted(missing))}")
    if unknown:
        raise _misfit(f"no parameter here is called {few(sorted(unknown))}")
    split = [names for names in ours if names not in saved]
    if split:
        raise _misfit(f"its groups differ: {few(sorted(split[0]))} are one group here. Build the groups alike")


def _check_tensors(optimizer: LowRankOptimizer, state: Mapping[str, Any]) -> None:
    """Refuse state and masters that do not fit parameters in flat tensors.

    A rank also checks parameters of which it has no part, so that all ranks raise the same error.
    """
    numbers = _numbers(optimizer, state)
    for p, spread in optimizer.table.spread.items():
        group, name = {**spread.group, **numbers[spread.group[GROUP]]}, _name(optimizer, p)
        plan = decide(name, 0, 0, shape_of(p), group, optimizer.ranked)
        if name in state["state"]:
            checks.loaded_state(
                name, state["state"][name], assembly.expected(optimizer.table, plan, spread.flat.dtype, group)
            )
    for p in [p for pairs in optimizer.table.given.values() for _, p in pairs]:
        saved = state.get("masters", {}).get(_name(optimizer, p))
        if saved is not None and saved.shape != shape_of(p):
            raise _misfit(f"{_name(optimizer, p)} is {tuple(shape_of(p))}, and its master {tuple(saved.shape)}")


def _misfit(why: str) -> ValueError:
    """Return the error for a state that does not fit."""
    return ValueError(f"the full state does not fit: {why}; nothing was loaded")


# -- ranks -------------------------------------------------------------------------------------------------------------


def _agreed(check: Callable[[], None]) -> None:
    """Run a check on all ranks, and raise on every rank: its own error, or else that of the first rank with an error.

    A rank that raised alone would leave the other ranks waiting in the next collective.
    """
    own = None
    try:
        check()
    except (ValueError, NotImplementedError) as error:
        own = error
    for failure in [own, *_of_each(own)]:
        if failure is not None:
            raise failure


def _of_each(own: Any) -> list[Any]:
    """Return the objects of all ranks, in the order of the ranks."""
    if not _several():
        return [own]
    per_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(per_rank, own)
    return per_rank


def _several() -> bool:
    return ranks()[1] > 1


def _everywhere(state: Mapping[str, Any] | None) -> Any:
    """Return the state on every rank, sent by rank 0 if any rank has None."""
    if not _several():
        return state
    # All ranks must know whether there is a broadcast before any of them enters it.
    having = _of_each(state is not None)
    if not having[0]:
        raise _misfit("rank 0 was given None")
    if not all(having):
        sent = [state]
        dist.broadcast_object_list(sent, src=0)
        state = sent[0]
    return state


def _sum(x: Tensor) -> int:
    """Return the sum of the bytes of a tensor, as a checksum."""
    return int(x.detach().contiguous().view(-1).view(torch.uint8).sum())


def _of_all_ranks(optimizer: LowRankOptimizer, found: dict[str, assembly.Borders]) -> dict[str, assembly.Borders]:
    """Return the borders that all ranks have found in flat tensors, by parameter name."""
    if not optimizer.table.spread:
        return found
    per_rank = _of_each(found)
    names = dict.fromkeys(name for borders in per_rank for name in borders)
    return {
        name: {start: row for borders in per_rank for start, row in borders.get(name, {}).items()} for name in names
    }


def _same_on_all_ranks(optimizer: LowRankOptimizer) -> None:
    """Refuse state that is not sharded and differs between ranks, because only rank 0 saves it.

    Checksums are compared, not the tensors themselves. DTensors are left out: their shards differ by design.
    """
    if not _several():
        return
    sums = {
        f"{key} of {name}": _sum(x)
        for name, _, tensors in _by_name(optimizer)
        for key, x in tensors.items()
        if not hasattr(x, "device_mesh") and x.numel()
    }
    sums |= {label: _sum(x) for label, x in assembly.replicated(optimizer.table) if x.numel()}
    per_rank = _of_each(sums)
    odd = [label for label in per_rank[0] if any(theirs.get(label) != per_rank[0][label] for theirs in per_rank)]
    if odd or any(theirs.keys() != sums.keys() for theirs in per_rank):
        raise RuntimeError(
            f"ranks have different state ({few(odd) or 'of different parameters'}), so there is no common state of all "
            "ranks; nothing was saved. Save each rank's own state_dict()"
        )
