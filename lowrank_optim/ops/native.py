"""Native kernels: find a library that is prebuilt or cached, else build one, load it, and report the result.

Nothing happens at import. The first optimizer loads kernels (`load`), or `python -m lowrank_optim.build` does.
`LOWRANK_OPTIM_NATIVE` decides: `auto`; `prebuilt`, which never compiles; `require`, which raises where there are no
kernels; `off`, which uses plain torch.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from . import cache
from . import compile as build
from .schema import NAMESPACE

_MODES = ("auto", "prebuilt", "require", "off")
_LOCK = threading.Lock()
_FOUND: dict[str, Backend] = {}
_LOG = logging.getLogger("lowrank_optim")


@dataclass(frozen=True)
class Backend:
    """The kernels of one device type.

    Attributes:
        device: "cpu" or "cuda".
        kernels: "native", or "reference", which is plain torch.
        how: where native kernels come from, or why there are none.
        path: the path of the library, None for plain torch.
    """

    device: str
    kernels: str
    how: str
    path: Path | None = None

    def __str__(self) -> str:
        return f"{self.device:4} {self.kernels:9} {self.how}" + (f"\n{'':15}{self.path}" if self.path else "")


@dataclass(frozen=True)
class BackendInfo:
    """The kernels of each device, and the reason. Printed as lines; iteration gives a `Backend` per device."""

    backends: tuple[Backend, ...]

    def __iter__(self) -> Iterator[Backend]:
        return iter(self.backends)

    def __getitem__(self, device: str) -> Backend:
        return {backend.device: backend for backend in self.backends}[device]

    def __str__(self) -> str:
        return "\n".join(map(str, self.backends))


def backend_info() -> BackendInfo:
    """Return which kernels are loaded for each device, and how they were built or why there are none; load nothing."""
    waiting = "nothing was looked for yet: the first optimizer does, or python -m lowrank_optim.build"
    devices = ("cpu", "cuda")
    return BackendInfo(tuple(_FOUND.get(name, Backend(name, "reference", waiting)) for name in devices))


def load() -> None:
    """Load the kernels of each device, once per process; build them where that is needed and allowed."""
    if len(_FOUND) == 2:
        return
    with _LOCK:
        mode = os.environ.get("LOWRANK_OPTIM_NATIVE", "auto")
        if mode not in _MODES:
            raise ValueError(f"LOWRANK_OPTIM_NATIVE must be one of {', '.join(_MODES)}, got {mode!r}")
        for device in ("cpu", "cuda"):
            if device not in _FOUND:
                _FOUND[device] = found = _load(device, mode)
                if mode == "require" and found.kernels != "native" and (device == "cpu" or _has_cuda()):
                    del _FOUND[device]
                    raise RuntimeError(
                        f"LOWRANK_OPTIM_NATIVE=require, and there are no native kernels for {device}: {found.how}"
                    )


def build_now() -> None:
    """Build the libraries for this machine and load them.

    A build that has failed before is tried again, and a damaged library is replaced.

    Raises:
        BuildError: a library could not be built, or was built and cannot be loaded.
    """
    for target in [_cpu_target(), *([_cuda_target()] if _has_cuda() or build.asked_archs() else [])]:
        cache.build_cached(target, retry=True)
    load()
    for device in ("cpu", "cuda") if _has_cuda() else ("cpu",):
        found = _FOUND[device]
        if found.kernels != "native" and os.environ.get("LOWRANK_OPTIM_NATIVE") != "off":
            raise build.BuildError(f"there are no native kernels for {device}: {found.how}")


def _load(device: str, mode: str) -> Backend:
    """Load the first library that the mode allows: prebuilt, cached, built now."""
    if mode == "off":
        return Backend(device, "reference", "LOWRANK_OPTIM_NATIVE=off")
    if device == "cuda" and not _has_cuda():
        return Backend(device, "reference", "torch sees no CUDA device")
    reasons: list[str] = []
    for step in (_prebuilt, _cached) if mode == "prebuilt" else (_prebuilt, _cached, _built):
        try:
            how, path = step(_cpu_target() if device == "cpu" else _cuda_target())
            _register(path, device)
            return Backend(device, "native", how, path)
        except (build.BuildError, OSError, RuntimeError) as error:
            if isinstance(error, cache.UntrustedError) and str(error) not in reasons:
                _LOG.warning("%s", error)
            reasons.append(str(error))
    return Backend(device, "reference", "; ".join(dict.fromkeys(reasons)))


def _prebuilt(target: build.Target) -> tuple[str, Path]:
    """Return how the library of the installation was built, and its path; raise `BuildError` where it does not fit."""
    rules = cache.installed()
    manifest = cache.manifest_in(build.PREBUILT, target, rules)
    if manifest is None:
        raise build.BuildError("nothing was built at installation")
    same = build.Target(target.backend, manifest.archs, target.extra)
    if manifest.fingerprint != same.fingerprint():
        raise build.BuildError(f"the prebuilt library is stale: {build.sources()} or its flags have changed since")
    if any(arch not in _covered(manifest.archs) for arch in target.archs):
        raise build.BuildError(f"the prebuilt library is for {', '.join(manifest.archs)}")
    cache.check_library(build.PREBUILT, target, manifest, rules)
    return f"prebuilt with {manifest.compiler}", build.library_in(build.PREBUILT, target)


def _covered(archs: tuple[str, ...]) -> list[str]:
    """Return the architectures that run code for `archs`.

    A GPU runs code for earlier architectures of its major version. The driver compiles PTX for all later ones.
    """
    covered = []
    for arch in archs:
        major, minor = map(int, arch.removesuffix("+PTX").rstrip("a").split("."))
        later = range(major, 30) if arch.endswith("+PTX") else range(major, major + 1)
        covered += [f"{m}.{n}" for m in later for n in range(minor if m == major else 0, 10)]
    return covered


def _cached(target: build.Target) -> tuple[str, Path]:
    """Return how the cached library was built, and its path; raise `BuildError` where there is none that fits."""
    folder, manifest = cache.find_cached(target)
    return f"built before with {manifest.compiler}", build.library_in(folder, target)


def _built(target: build.Target) -> tuple[str, Path]:
    """Build the library into the cache, or wait for another process to do it; return how it was built, and its path."""
    start, compiler = time.perf_counter(), build.compiler_of(target)
    folder, now = cache.build_cached(target)
    how = f"in {time.perf_counter() - start:.1f} s " if now else ""
    return f"built {how}with {compiler}", build.library_in(folder, target)


def _register(path: Path, device: str) -> None:
    """Load the library, whose initializers register its kernels with the dispatcher."""
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::projected_adam_", device.upper()):
        raise RuntimeError(f"{path} was loaded and has no kernels for {device}")


def _has_cuda() -> bool:
    return torch.version.cuda is not None and torch.cuda.is_available()


def _cpu_target() -> build.Target:
    return build.Target("cpu", extra=build.asked_flags())


def _cuda_target() -> build.Target:
    """Return the target for the architectures that the environment names, or for those of this machine's GPUs."""
    archs = build.asked_archs()
    if not archs:
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        archs = tuple(f"{major}.{minor}" for major, minor in sorted(found))
    return build.Target("cuda", archs, build.asked_flags())
