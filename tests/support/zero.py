"""One model under DeepSpeed ZeRO and in one process."""

from __future__ import annotations

import functools
import os
import socket

import torch
from torch import nn

from tests.cases import gradients
from tests.support import processes

STEPS = 15  # refreshes before steps 0, 7 and 14, for most methods
# name, shape, rank: tall, wide, square, of lengths that no number of ranks divides; in full space; few rows
WEIGHTS = [
    ("tall", (24, 10), 4), ("wide", (9, 22), 3), ("square", (12, 12), 5), ("uneven", (31, 6), 2), ("low", (7, 40), 3),
    ("few", (3, 40), 2), ("stack", (3, 5, 16), 2), ("table", (11, 8), None), ("bias", (13,), None), ("one", (1,), None),
]  # fmt: skip


def spawn(worker, world, *args):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return processes.spawn(worker, world, *args, meet=functools.partial(_meet, port))


def _meet(port, rank, world, folder):
    own = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in own.items()}, MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu")
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a collective is compiled first
    deepspeed.init_distributed(dist_backend="gloo")


class Weights(nn.Module):
    """Parameters whose gradients are what the test says."""

    def __init__(self, some=WEIGHTS):
        super().__init__()
        torch.manual_seed(0)
        for name, shape, _ in some:
            setattr(self, name, nn.Parameter(torch.randn(shape) / 4))

    def forward(self, grads):
        return sum((p * g).sum() for p, g in zip(self.parameters(), grads, strict=True))


def build(model, case, side="std", **options):
    return case.build(groups_of(model, case, side), **options)


def groups_of(model, case, side="std", weights=WEIGHTS):
    """Projected ones together, as is usual under ZeRO, and the others."""
    ranks = sorted({str(rank) for _, _, rank in weights})
    groups = []
    for rank in ranks:
        some = [(name, getattr(model, name)) for name, _, own in weights if str(own) == rank]
        group = {"params": some, "rank": None if rank == "None" else int(rank), "as_matrix": "batch"}
        groups.append({**group, "proj_type": side} if case.has("proj_type", side) else group)
    return groups


def whole_gradients(dtype):
    torch.manual_seed(1)
    some = [gradients(shape, STEPS, dtype) for _, shape, _ in WEIGHTS]
    return [[one[step] for one in some] for step in range(STEPS)]


def alone(case, grads, **options):
    """The weights after training in this process."""
    model = Weights()
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
    model = Weights()
    engine = initialized(model, build(model, case, **options), stage, dtype, zero, **(config or {}))
    train(engine, grads)
    return weights(engine, stage)


def apart(some, others):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(some, others, strict=True))


STAGES = (0, 1, 2, 3)
ACCUMULATED_IN_FLOAT32 = {"data_types": {"grad_accum_dtype": "fp32"}}  # stage 1 in bfloat16 is another class then
