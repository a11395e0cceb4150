"""One optimizer on sharded parameters and on whole ones, and a small model under fully_shard with its checkpoints."""

from __future__ import annotations

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import lowrank_optim
from tests.cases import gradients
from tests.support.processes import same_everywhere
from tests.support.wrapped import Small, steps

STEPS = 15  # refreshes before steps 0, 7 and 14, for most methods
# name, shape, rank: tall, wide, square, of lengths that no number of ranks divides; in full space; few rows
WEIGHTS = [
    ("tall", (24, 10), 4), ("wide", (9, 22), 3), ("square", (12, 12), 5), ("uneven", (31, 6), 2), ("low", (7, 40), 3),
    ("table", (11, 8), None), ("bias", (13,), None), ("stack", (5, 6, 4), None), ("few", (3, 40), 2),
]  # fmt: skip
ROWWISE = (Shard(0),)
# What a method says that cannot have the projected side of a matrix sharded, or no side of it.
ROWS = {"dct": "a sum along that side"}
NEVER = {"galore_plus": "take density=0"}


def build(case, dtype, mesh=None, placements=ROWWISE, side="std", **options):
    """Parameters, sharded if there is a mesh, and their optimizer."""
    torch.manual_seed(0)
    groups, whole = [], [torch.randn(shape).div(4).to(dtype) for _, shape, _ in WEIGHTS]
    for (name, shape, rank), w in zip(WEIGHTS, whole, strict=True):
        some = [Shard(0) if one.is_shard() and (len(shape) != 2 or min(shape) < 4) else one for one in placements]
        p = nn.Parameter(w if mesh is None else laid_out(w, mesh, some))
        group = {"params": [(name, p)], "rank": rank}
        groups.append({**group, "proj_type": side} if case.has("proj_type", side) else group)
    return [group["params"][0][1] for group in groups], case.build(groups, **options)


def laid_out(x, mesh, placements):
    """As `distribute_tensor`, which does not know what FSDP makes of rows that tensor parallelism has cut."""
    if not any(type(one).__name__ == "_StridedShard" for one in placements):
        return distribute_tensor(x, mesh, placements)
    here = x
    for dim in (1, 0):
        parts = here.chunk(mesh.size(dim))
        here = parts[mesh.get_local_rank(dim)] if mesh.get_local_rank(dim) < len(parts) else here[:0]
    return DTensor.from_local(here.clone(), mesh, placements, run_check=False, shape=x.shape, stride=x.stride())


def whole_gradients(dtype):
    torch.manual_seed(1)
    return [gradients(shape, STEPS, dtype) for _, shape, _ in WEIGHTS]


def train(params, optimizer, grads, first=0, last=STEPS):
    for step in range(first, last):
        for p, some in zip(params, grads, strict=True):
            g = some[step]
            p.grad = laid_out(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
        optimizer.step()


def difference(case, dtype, mesh, placements=ROWWISE, side="std", last=STEPS, **options):
    """The largest from one process, or what was said instead of training; and whether state differs between ranks."""
    try:
        params, optimizer = build(case, dtype, mesh, placements, side, **options)
    except NotImplementedError as error:
        return str(error)
    grads = whole_gradients(dtype)
    train(params, optimizer, grads, last=last)
    ours, one = build(case, dtype, side=side, **options)
    train(ours, one, grads, last=last)
    for state in optimizer.state.values():
        for key, tensor in state.items():
            assert isinstance(tensor, DTensor) or same_everywhere([tensor]), f"{case.name}: {key} differs between ranks"
    pairs = zip(params, ours, strict=True)
    return max((p.full_tensor().double() - q.double()).abs().max().item() for p, q in pairs)


def small(mesh=None, hidden=21, **options):
    torch.manual_seed(0)
    model = Small(hidden)
    if mesh is not None:
        for layer in (model.up, model.down):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    options = {"lr": 0.01, "rank": 3, "update_proj_gap": 4, "moments": "rotate", "state_dtype": "bfloat16", **options}
    return model, lowrank_optim.GaLoreAdamW(model.named_parameters(), **options)


def saved(model, optimizer, **options):
    options = StateDictOptions(**options)
    return {
        "model": model_state(model, options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def model_state(model, options=None):
    return get_model_state_dict(model, options=options)


def whole(model):
    full = model_state(model, StateDictOptions(full_state_dict=True))
    return {key: value.clone() for key, value in full.items()}


def whole_from(folder, mesh, rank, world, hidden=21):
    """What the rest of the run makes of the checkpoint on these ranks; without a mesh in this process alone."""
    model, optimizer = small(mesh, hidden)
    state = saved(model, optimizer)
    dcp.load(state, checkpoint_id=f"{folder}/dcp", no_dist=mesh is None)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    steps(model, optimizer, 6, 11, rank, world)
    return whole(model)
