"""DistributedDataParallel: two processes train like one with the joined batch, and stay equal bit for bit."""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import CASES, Net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS = 9


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def batch(step):
    return torch.randint(0, 11, (8, 9), generator=torch.Generator().manual_seed(step))


def worker(rank, world, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for case in CASES:
        torch.manual_seed(0)
        model = DistributedDataParallel(Net().double())
        optimizer = case.build(model.named_parameters(), moments="rotate")
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, batch(step).chunk(world)[rank]).backward()
            optimizer.step()
        torch.save(model.module.state_dict(), f"{folder}/{case.name}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (2, port, str(tmp_path)), nprocs=2)
    for case in CASES:
        torch.manual_seed(0)
        model = Net().double()
        optimizer = case.build(model.named_parameters(), moments="rotate")
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, batch(step)).backward()
            optimizer.step()
        first, second = (torch.load(tmp_path / f"{case.name}.{rank}.pt") for rank in (0, 1))
        for name, one in model.state_dict().items():
            assert torch.equal(first[name], second[name]), f"{case.name}: {name} differs between ranks"
            assert (first[name] - one).abs().max() < 1e-9, f"{case.name}: {name} differs from one process"
