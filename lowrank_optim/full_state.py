"""Optimizer state without a layout: whole tensors by parameter name, with which any number of processes can go on.

What knows layouts is `Layout.gather` and `Layout.part`, and of flat tensors assembly.py; what is in between is plain.
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
    """All state of an optimizer, independent of how many processes there are and of how they share it.

    For one process, DistributedDataParallel, FSDP2 (also hybrid) and DeepSpeed ZeRO 0 to 3. All ranks call it, and each
    sharded tensor is on all of them for a moment, one after the other (of ZeRO 1 to 3: the state of each parameter).
    Names are without what wrappers put into them, so that what a wrapped model has saved is that of the bare one.

    Returns:
        On rank 0, and without torch.distributed: `format`, `method` (the class), `groups` (the numbers of each group,
        and the names of its parameters) and `state` (by parameter name, tensors on the CPU), copies that
        `torch.load(weights_only=True)` takes. Under DeepSpeed also `masters`, where it updates other weights than the
        model's (float32 beside bfloat16), and `borders`, what two processes have of one row and differs in its last
        bits. None on other ranks.

    Errors:
        TypeError: an optimizer that is not of this package, such as DeepSpeed's `engine.optimizer`.
        NotImplementedError: parameters in flat tensors of some ranks, of which others may have more.
        ValueError: two parameters of one name.
        RuntimeError: state that should be the same on all ranks and is not, such as with one head per rank (LTE).

    Example::

        state = lowrank_optim.full_state(optimizer)
        if state is not None:
            torch.save({"model": model.state_dict(), "optimizer": state}, "checkpoint.pt")
    """
    _find(optimizer)
    _same_on_all_ranks(optimizer)
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
    return {**full, **{key: some for key, some in (("borders", borders), ("masters", masters)) if some}}


def load_full_state(optimizer: LowRankOptimizer, state: Mapping[str, Any] | None) -> None:
    """Goes on with what `full_state` has returned, on any number of processes; all ranks call it.

    State of equal bits, so that as many processes as before go on bit for bit (of DeepSpeed in the same stage), and
    others to rounding. Load the model's weights by their own means, before `deepspeed.initialize`, and this after it:
    then DeepSpeed's float32 weights become the saved ones (docs/distributed.md).

    Args:
        optimizer: built as the saved one was, from parameters of the same names.
        state: on every rank, or on rank 0 and None on others, to which it is then sent. Each rank has it whole in main
            memory meanwhile.

    Errors:
        TypeError, NotImplementedError: as of `full_state`, and numbers of groups that cannot be used here.
        ValueError: a state of another format, method or model; it names what is missing and what is unknown. Nothing
            was loaded then, on no rank.
    """
    _find(optimizer)
    state = _everywhere(state)
    _agreed(lambda: _check(optimizer, state))
    numbers = _numbers(optimizer, state)
    saved: dict[str, Any] = {"state": {}, "param_groups": [], "full": {"borders": {}, "masters": {}, **state}}
    index, flats = 0, optimizer.table.pieces
    for group in optimizer.param_groups:
        here = dict(enumerate(group["params"], index))
        index += len(here)
        own = {key: group[key] for key in ("param_names",) if key in group}
        saved["param_groups"].append({**numbers[group[GROUP]], **own, "params": list(here)})
        names = {i: _name(optimizer, p) for i, p in here.items() if p not in flats}
        saved["state"] |= {i: state["state"][name] for i, name in names.items() if name in state["state"]}
    optimizer.load_state_dict(saved)


def _copies(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """On the CPU of rank 0, one after the other."""
    return {key: x.to("cpu", copy=True) for key, x in tensors if not others()}


def _find(optimizer: LowRankOptimizer) -> None:
    """Where everything is, before anything is done with it."""
    if not isinstance(optimizer, LowRankOptimizer):
        raise TypeError(
            f"full_state and load_full_state need an optimizer of lowrank_optim, got {type(optimizer).__name__}. Under "
            "DeepSpeed pass the one that was given to deepspeed.initialize, not engine.optimizer"
        )
    names: set[str] = set()
    for name in (name for group in optimizer.param_groups for name in _names(optimizer, group)):
        if name in names:
            raise ValueError(f"two parameters are called {name}; give each a name of its own")
        names.add(name)
    adoption.adopt(optimizer.table, early=True)
    assembly.check(optimizer.table)


def _by_name(optimizer: LowRankOptimizer) -> Iterator[tuple[str, Layout, dict[str, Tensor]]]:
    """What is here of the state of each parameter that has any and is in no flat tensor."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if optimizer.state.get(p) and p not in optimizer.table.pieces:
                yield _name(optimizer, p), optimizer.table.layouts[p], optimizer.state[p]


def _name(optimizer: LowRankOptimizer, p: Tensor) -> str:
    return bare_name(optimizer.table.plans[p].name)


def _names(optimizer: LowRankOptimizer, group: dict[str, Any]) -> list[str]:
    """Of the parameters that a group was made of, whatever is in their place now."""
    return [_name(optimizer, p) for _, p in optimizer.table.given[group[GROUP]]]


def _numbers(optimizer: LowRankOptimizer, state: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The saved numbers of each group, by its own number."""
    saved = {frozenset(group["names"]): group for group in state["groups"]}
    found = {group[GROUP]: saved[frozenset(_names(optimizer, group))] for group in optimizer.param_groups}
    return {one: {key: value for key, value in group.items() if key != "names"} for one, group in found.items()}


def _groups(optimizer: LowRankOptimizer) -> Iterator[dict[str, Any]]:
    for group in optimizer.param_groups:
        numbers = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for key, value in numbers.items():
            numbers[key] = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value  # lr may be one
        yield {"names": _names(optimizer, group), **numbers}


# -- what does not fit -------------------------------------------------------------------------------------------------


def _check(optimizer: LowRankOptimizer, state: Any) -> None:
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
    saved = [frozenset(group["names"]) for group in groups]
    ours = [frozenset(_names(optimizer, group)) for group in optimizer.param_groups]
    known, here = {name for names in saved for name in names}, {name for names in ours for name in names}
    missing, unknown = here - known, known - here
    if missing:
        raise _misfit(f"it has nothing for {few(sorted(missing))}")
    if unknown:
        raise _misfit(f"no parameter here is called {few(sorted(unknown))}")
    split = [names for names in ours if names not in saved]
    if split:
        raise _misfit(f"its groups are others: {few(sorted(split[0]))} are one group here. Build the groups alike")


def _check_tensors(optimizer: LowRankOptimizer, state: Mapping[str, Any]) -> None:
    """Of what is in flat tensors: also of parameters of which this rank has nothing, so that all say the same."""
    numbers = _numbers(optimizer, state)
    for p, one in optimizer.table.spread.items():
        group, name = {**one.group, **numbers[one.group[GROUP]]}, _name(optimizer, p)
        plan = decide(name, 0, 0, shape_of(p), group, optimizer.ranked)
        if name in state["state"]:
            checks.loaded_state(
                name, state["state"][name], assembly.expected(optimizer.table, plan, one.flat.dtype, group)
            )
    for p in [p for pairs in optimizer.table.given.values() for _, p in pairs]:
        saved = state.get("masters", {}).get(_name(optimizer, p))
        if saved is not None and saved.shape != shape_of(p):
            raise _misfit(f"{_name(optimizer, p)} is {tuple(shape_of(p))}, and its master {tuple(saved.shape)}")


def _misfit(why: str) -> ValueError:
    return ValueError(f"the full state does not fit: {why}; nothing was loaded")


# -- ranks -------------------------------------------------------------------------------------------------------------


def _agreed(check: Callable[[], None]) -> None:
    """Raises on all ranks what it raises on any."""
    own = None
    try:
        check()
    except (ValueError, NotImplementedError) as error:
        own = error
    for one in [own, *_of_each(own)]:
        if one is not None:
            raise one


def _of_each(own: Any) -> list[Any]:
    """What each rank has, in their order."""
    if not _several():
        return [own]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def _several() -> bool:
    return ranks()[1] > 1


def _everywhere(state: Mapping[str, Any] | None) -> Any:
    """The state on every rank, sent by rank 0 if some have none."""
    if not _several():
        return state
    having = _of_each(state is not None)
    if not having[0]:
        raise _misfit("rank 0 was given None")
    if not all(having):
        sent = [state]
        dist.broadcast_object_list(sent, src=0)
        state = sent[0]
    return state


def _sum(x: Tensor) -> int:
    return int(x.detach().contiguous().view(-1).view(torch.uint8).sum())


def _of_all_ranks(optimizer: LowRankOptimizer, found: dict[str, assembly.Borders]) -> dict[str, assembly.Borders]:
    """What each of them has found in flat tensors, by name."""
    if not optimizer.table.spread:
        return found
    everyone = _of_each(found)
    names = dict.fromkeys(name for one in everyone for name in one)
    return {name: {at: row for one in everyone for at, row in one.get(name, {}).items()} for name in names}


def _same_on_all_ranks(optimizer: LowRankOptimizer) -> None:
    """Of state that is not cut, rank 0 speaks for all; a sum of its bytes tells if it may."""
    if not _several():
        return
    sums = {
        f"{key} of {name}": _sum(x)
        for name, _, tensors in _by_name(optimizer)
        for key, x in tensors.items()
        if not hasattr(x, "device_mesh") and x.numel()
    }
    sums |= {what: _sum(x) for what, x in assembly.replicated(optimizer.table) if x.numel()}
    everyone = _of_each(sums)
    odd = [what for what in everyone[0] if any(other.get(what) != everyone[0][what] for other in everyone)]
    if odd or any(other.keys() != sums.keys() for other in everyone):
        raise RuntimeError(
            f"ranks have different state ({few(odd) or 'of different parameters'}), so there is no state of all of "
            "them; nothing was saved. Save each rank's own state_dict()"
        )
