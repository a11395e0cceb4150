"""Tasks that run in lockstep have threads of their own, with all that torch keeps per thread as the caller has it."""

from __future__ import annotations

import threading

import pytest
import torch

from lowrank_optim.distributed import lockstep


def each_task(look):
    """What two tasks of a caller see, both in other threads than its own."""
    seen, threads = [], set()

    def work():
        seen.append(look())
        threads.add(threading.get_ident())

    lockstep.together([work, work])
    assert threading.get_ident() not in threads
    return seen


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients(enabled):
    with torch.set_grad_enabled(enabled):
        assert each_task(torch.is_grad_enabled) == [enabled, enabled]


@pytest.mark.parametrize("enabled", [True, False])
def test_inference_mode(enabled):
    with torch.inference_mode(enabled), torch.no_grad():
        assert each_task(torch.is_inference_mode_enabled) == [enabled, enabled]
        assert each_task(torch.is_grad_enabled) == [False, False]


def test_the_stream_of_a_gpu(monkeypatch):
    """Kernels of a task follow those that the caller has launched: on its stream, which every thread has its own of."""
    current = threading.local()
    of_thread = lambda: getattr(current, "stream", "default stream")  # noqa: E731
    initialized = type("module", (), {"is_initialized": staticmethod(lambda: True)})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda: initialized)
    monkeypatch.setattr(torch.accelerator, "current_stream", of_thread)
    monkeypatch.setattr(torch.accelerator, "set_stream", lambda stream: setattr(current, "stream", stream))
    current.stream = "stream of the loop"
    assert each_task(of_thread) == ["stream of the loop"] * 2


def test_sums_stay_on_their_gpu(monkeypatch):
    """The type alone is the current GPU, which is another one where nobody called torch.cuda.set_device."""
    sent = []
    monkeypatch.setattr(lockstep.dist, "all_reduce", lambda flat, op, group: sent.append(flat))
    x = torch.ones(2, 3, device="meta")
    letter = lockstep._Letter(x, lockstep.dist.ReduceOp.SUM, lockstep.Peers(None, "meta"))
    moved = lambda y, place: y if isinstance(place, torch.device) else pytest.fail(f"moved to some {place}")  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "to", moved)
    lockstep._send([letter])
    assert sent[0].device == x.device
    assert letter.x.shape == x.shape
