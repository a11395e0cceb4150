"""How much memory this process, or its GPU, has held at most."""

from __future__ import annotations

import sys

import torch


def peak_bytes(device: str) -> int:
    """Peak of the allocator on a GPU, peak resident size of the process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return _resident_peak()


def _resident_peak() -> int:
    """VmHWM where it exists: Linux hands ru_maxrss down from the parent, which held all the text."""
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return _usage_peak()


def _usage_peak() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
