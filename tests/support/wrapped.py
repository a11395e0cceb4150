"""A small model as DistributedDataParallel or fully_shard wraps it, and its training."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


class Small(nn.Module):
    def __init__(self, hidden=21):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.up = nn.Linear(12, hidden)
        self.down = nn.Linear(hidden, 12, bias=False)
        self.norm = nn.LayerNorm(12)
        self.lm_head = nn.Linear(12, 11, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.lm_head(self.norm(x + self.down(torch.tanh(self.up(x)))))


_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def build(case, kind, start=None):
    """A model as `kind` wraps it, and its optimizer; `start` gives weights, whole."""
    torch.manual_seed(0)
    model = Small()
    if start is not None:
        model.load_state_dict(start)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind != "one":
        world = dist.get_world_size()
        shape, names = ((1, world), ("replicate", "shard")) if kind == "hybrid" else ((world,), None)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in (model.up, model.down):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, case.build(model.named_parameters(), rank=3, proj_type="right", moments="rotate")


def steps(model, optimizer, first, last, rank=0, world=1):
    for step in range(first, last):
        tokens = torch.randint(0, 11, (12, 9), generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


def weights(model):
    """Whole, by bare names, on rank 0."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return {key: x.clone() for key, x in get_model_state_dict(model, options=_FULL).items()}


def apart(one, other):
    return max((one[key] - other[key]).abs().max().item() for key in one)


def equal(one, other):
    """Equal bits, of two full states."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other
