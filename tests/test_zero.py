"""DeepSpeed ZeRO: every stage trains like one process, without a whole gradient travelling, or says why it cannot.

DeepSpeed runs here on the CPU, in two processes that work through everything, because to start them takes longer.
"""

from __future__ import annotations

import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import CASES, gradients
from torch import nn

pytest.importorskip("deepspeed")

STEPS = 15  # refreshes before steps 0, 7 and 14, for most methods
# name, shape, rank: tall, wide, square, of lengths that no number of ranks divides; in full space; few rows
WEIGHTS = [
    ("tall", (24, 10), 4), ("wide", (9, 22), 3), ("square", (12, 12), 5), ("uneven", (31, 6), 2), ("low", (7, 40), 3),
    ("few", (3, 40), 2), ("stack", (3, 5, 16), 2), ("table", (11, 8), None), ("bias", (13,), None), ("one", (1,), None),
]  # fmt: skip


# -- processes ---------------------------------------------------------------------------------------------------------


def spawn(worker, world, *args):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_entry, (world, port, worker, args), nprocs=world)


def _entry(rank, world, port, worker, args):
    own = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in own.items()}, MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a collective is compiled first
    deepspeed.init_distributed(dist_backend="gloo")
    worker(rank, world, *args)
    dist.barrier()
    dist.destroy_process_group()


# -- one optimizer, under DeepSpeed or not -----------------------------------------------------------------------------


class Weights(nn.Module):
    """Parameters whose gradients are what the test says."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        for name, shape, _ in WEIGHTS:
            setattr(self, name, nn.Parameter(torch.randn(shape).div(4).to(dtype).float()))

    def forward(self, grads):
        return sum((p * g).sum() for p, g in zip(self.parameters(), grads, strict=True))


def build(model, case, side="std", **options):
    """Projected ones together, as is usual under ZeRO, and the others."""
    ranks = sorted({str(rank) for _, _, rank in WEIGHTS})
    groups = []
    for rank in ranks:
        some = [(name, getattr(model, name)) for name, _, own in WEIGHTS if str(own) == rank]
        group = {"params": some, "rank": None if rank == "None" else int(rank), "as_matrix": "batch"}
        groups.append({**group, "proj_type": side} if case.has("proj_type", side) else group)
    return case.build(groups, **options)


def whole_gradients(dtype):
    torch.manual_seed(1)
    some = [gradients(shape, STEPS, dtype) for _, shape, _ in WEIGHTS]
    return [[one[step] for one in some] for step in range(STEPS)]


def alone(case, grads, dtype=torch.float32, **options):
    """The weights after training in this process."""
    model = Weights(dtype)
    optimizer = build(model, case, **options)
    for step in grads:
        for p, g in zip(model.parameters(), step, strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def initialized(model, optimizer, stage, dtype=torch.float32, zero=None, **config):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0, **(zero or {}),
        },
        **config,
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine, grads):
    for step in grads:
        engine.backward(engine(step))
        engine.step()


def weights(engine, stage):
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        return [p.detach().clone() for p in engine.module.parameters()]


def under_zero(case, stage, grads, dtype=torch.float32, zero=None, config=None, **options):
    model = Weights(dtype)
    engine = initialized(model, build(model, case, **options), stage, dtype, zero, **(config or {}))
    train(engine, grads)
    return weights(engine, stage)


def apart(some, others):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(some, others, strict=True))
