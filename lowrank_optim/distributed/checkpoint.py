"""Optimizer state without a layout: whole tensors by parameter name, with which any number of processes can go on.

What knows layouts is `Layout.gather` and `Layout.part`; what comes in between is plain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import few
from ..optimizer import LowRankOptimizer
from ..plan import bare_name
from .layout import Layout, others

FORMAT = 1
_KEYS = ("format", "method", "groups", "state")


def full_state(optimizer: LowRankOptimizer) -> dict[str, Any] | None:
    """All state of an optimizer, independent of how many processes there are and of how they share it.

    For one process, DistributedDataParallel and FSDP2 (also hybrid). All ranks call it, and each sharded tensor is on
    all of them for a moment, one after the other. Names are without what wrappers put into them, so that what a wrapped
    model has saved is that of the bare one.

    Returns:
        On rank 0, and without torch.distributed: `format`, `method` (the class), `groups` (the numbers of each group,
        and the names of its parameters) and `state` (by parameter name, tensors on the CPU), copies that
        `torch.load(weights_only=True)` takes. None on other ranks.

    Errors:
        NotImplementedError: parameters in flat tensors (DeepSpeed ZeRO 1 to 3).
        ValueError: two parameters of one name.
        RuntimeError: state that should be the same on all ranks and is not, such as with one head per rank (LTE).

    Example::

        state = lowrank_optim.full_state(optimizer)
        if state is not None:
            torch.save({"model": model.state_dict(), "optimizer": state}, "checkpoint.pt")
    """
    _check_whole(optimizer)
    _same_on_all_ranks(optimizer)
    state: dict[str, dict[str, Tensor]] = {}
    for name, layout, tensors in _by_name(optimizer):
        whole = {key: layout.gather(x) for key, x in tensors.items()}
        state[name] = {key: x for key, x in whole.items() if x is not None}
    if others():
        return None
    return {"format": FORMAT, "method": type(optimizer).__name__, "groups": list(_groups(optimizer)), "state": state}


def load_full_state(optimizer: LowRankOptimizer, state: Mapping[str, Any] | None) -> None:
    """Goes on with what `full_state` has returned, on any number of processes; all ranks call it.

    State of equal bits, so that as many processes as before go on bit for bit, and others to rounding. Load the model's
    weights by their own means.

    Args:
        optimizer: built as the saved one was, from parameters of the same names.
        state: on every rank, or on rank 0 and None on others, to which it is then sent. Each rank has it whole in main
            memory meanwhile.

    Errors:
        NotImplementedError: parameters in flat tensors (DeepSpeed ZeRO 1 to 3).
        ValueError: a state of another format, method or model; it names what is missing and what is unknown. Nothing
            was loaded then, on no rank.
    """
    _check_whole(optimizer)
    state = _everywhere(state)
    _check(optimizer, state)
    groups = {frozenset(group["names"]): group for group in state["groups"]}
    saved: dict[str, Any] = {"state": {}, "param_groups": []}
    index = 0
    for group in optimizer.param_groups:
        names = [_name(optimizer, p) for p in group["params"]]
        numbers = {key: value for key, value in groups[frozenset(names)].items() if key != "names"}
        own = {"params": list(range(index, index + len(names)))}
        own |= {key: group[key] for key in ("param_names",) if key in group}
        saved["param_groups"].append({**numbers, **own})
        saved["state"] |= {index + i: state["state"][name] for i, name in enumerate(names) if name in state["state"]}
        index += len(names)
    optimizer.load_state_dict(saved)


def _by_name(optimizer: LowRankOptimizer) -> Iterator[tuple[str, Layout, dict[str, Tensor]]]:
    """What is here of the state of each parameter that has any."""
    names: set[str] = set()
    for p, _ in optimizer._members():
        name = _name(optimizer, p)
        if name in names:
            raise ValueError(f"two parameters are called {name}; give each a name of its own")
        names.add(name)
        if optimizer.state.get(p):
            yield name, optimizer._layouts[p], optimizer.state[p]


def _name(optimizer: LowRankOptimizer, p: Tensor) -> str:
    return bare_name(optimizer._plans[p].name)


def _groups(optimizer: LowRankOptimizer) -> Iterator[dict[str, Any]]:
    for group in optimizer.param_groups:
        numbers = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for key, value in numbers.items():
            numbers[key] = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value  # lr may be one
        yield {"names": [_name(optimizer, p) for p in group["params"]], **numbers}


# -- what does not fit -------------------------------------------------------------------------------------------------


def _check_whole(optimizer: LowRankOptimizer) -> None:
    optimizer._stand_ins.adopt()
    if optimizer._stand_ins.pieces:
        raise NotImplementedError(
            f"{type(optimizer).__name__} has its parameters in the flat tensors of a wrapper (DeepSpeed ZeRO 1 to 3), "
            "whose ranges full_state does not put together. Save and load the engine's checkpoint instead"
        )


def _check(optimizer: LowRankOptimizer, state: Any) -> None:
    if not isinstance(state, Mapping) or any(key not in state for key in _KEYS):
        keys = list(state) if isinstance(state, Mapping) else type(state).__name__
        raise _misfit(f"expected the keys {list(_KEYS)}, got {keys!r:.80}. Was it made by full_state?")
    if state["format"] != FORMAT:
        raise _misfit(f"it has format {state['format']!r}, and this version reads {FORMAT}")
    if state["method"] != type(optimizer).__name__:
        raise _misfit(f"it is of {state['method']}, and this optimizer is {type(optimizer).__name__}")
    _check_names(optimizer, state["groups"])


def _check_names(optimizer: LowRankOptimizer, groups: list[Mapping[str, Any]]) -> None:
    saved = [frozenset(group["names"]) for group in groups]
    ours = [frozenset(_name(optimizer, p) for p in group["params"]) for group in optimizer.param_groups]
    known, here = {name for names in saved for name in names}, {name for names in ours for name in names}
    missing, unknown = here - known, known - here
    if missing:
        raise _misfit(f"it has nothing for {few(sorted(missing))}")
    if unknown:
        raise _misfit(f"no parameter here is called {few(sorted(unknown))}")
    split = [names for names in ours if names not in saved]
    if split:
        raise _misfit(f"its groups are others: {few(sorted(split[0]))} are one group here. Build the groups alike")


def _misfit(why: str) -> ValueError:
    return ValueError(f"the full state does not fit: {why}; nothing was loaded")


# -- ranks -------------------------------------------------------------------------------------------------------------


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _everywhere(state: Mapping[str, Any] | None) -> Any:
    """The state on every rank, sent by rank 0 if some have none."""
    if not _several():
        return state
    having: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(having, state is not None)
    if not having[0]:
        raise _misfit("rank 0 was given None")
    if not all(having):
        sent = [state]
        dist.broadcast_object_list(sent, src=0)
        state = sent[0]
    return state


def _same_on_all_ranks(optimizer: LowRankOptimizer) -> None:
    """Of state that is not cut, rank 0 speaks for all; a sum of its bytes tells if it may."""
    if not _several():
        return
    sums = {
        f"{key} of {name}": int(x.detach().contiguous().view(-1).view(torch.uint8).sum())
        for name, _, tensors in _by_name(optimizer)
        for key, x in tensors.items()
        if not hasattr(x, "device_mesh") and x.numel()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sums)
    odd = [what for what in everyone[0] if any(other.get(what) != everyone[0][what] for other in everyone)]
    if odd or any(other.keys() != sums.keys() for other in everyone):
        raise RuntimeError(
            f"ranks have different state ({few(odd) or 'of different parameters'}), so there is no state of all of "
            "them; nothing was saved. Save each rank's own state_dict()"
        )
