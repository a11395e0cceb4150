"""Compiles csrc/: `python -m lowrank_optim.build`, setup.py, and the first optimizer where nothing was prebuilt.

Only the standard library: setup.py loads this file by its path, in an environment that has no torch. A library is bound
to torch's stable ABI and to nothing else, so it needs torch's headers (found, not imported) and no other part of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
PREBUILT = _PACKAGE / "_native"
# Products and sums are rounded one by one, or CPU, GPU and reference would differ in their last bits. No -march=native:
# what is cached or put into a wheel runs on other machines, and csrc/cpu/clones.h has a copy per instruction set.
_HOST = ("-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_DEVICE = ("-O3", "-std=c++17", "-fmad=false", "--threads", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden")
_TORCH = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)  # 2.10, the first whose stable ABI has all that is used
_DEFINES = {"cpu": (), "cuda": ("-DLRO_CUDA",), "emulated": ("-DLRO_EMULATED",)}
_STANDARD = {"cpu": "-std=c++17", "cuda": "-std=c++17", "emulated": "-std=c++20"}  # C++20 has barriers


class BuildError(RuntimeError):
    """What was missing or failed, in words for the user."""


@dataclass(frozen=True)
class Target:
    """A library: "cpu", "cuda" for some architectures, or "emulated", the CUDA sources on the CPU, for tests."""

    backend: str
    archs: tuple[str, ...] = ()  # as "9.0" or "10.0+PTX"
    extra: tuple[str, ...] = ()  # flags of host compilers and linker, for sanitizers

    def fingerprint(self) -> str:
        """Of all that decides what the library is, but for the compiler. The schemas are part of the contract."""
        digest = hashlib.sha256(repr((self, _HOST, _DEVICE, _TORCH, platform.machine(), platform.system())).encode())
        ops = _PACKAGE / "ops"
        schemas = [ops / "schema.py", ops / "signatures.py", *sorted((ops / "reference").glob("*.py"))]
        for path in [*schemas, *sorted(sources().rglob("*.*"))]:
            if path.suffix != ".md":
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Manifest:
    """What a library was built from and by; stands beside it as JSON."""

    fingerprint: str
    compiler: str
    archs: tuple[str, ...]


def sources() -> Path:
    """csrc/ of a checkout, or the copy of it that a wheel carries."""
    for place in (_PACKAGE / "_csrc", _PACKAGE.parent / "csrc"):
        if (place / "registration.cpp").exists():
            return place
    raise BuildError(f"the C++ sources are missing: neither {_PACKAGE}/_csrc nor {_PACKAGE.parent}/csrc has them")


def library_in(folder: Path, target: Target) -> Path:
    return folder / f"lowrank_optim_{target.backend}.so"


def manifest_in(folder: Path, target: Target) -> Manifest | None:
    """None where there is no complete library."""
    try:
        said = json.loads((folder / f"{target.backend}.json").read_text())
        return Manifest(**{**said, "archs": tuple(said["archs"])}) if library_in(folder, target).exists() else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


# -- the cache ---------------------------------------------------------------------------------------------------------


def cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LOWRANK_OPTIM_CACHE") or Path(root) / "lowrank_optim")


def find_cached(target: Target) -> Path | None:
    """A folder with this library. Where there is a compiler, only what this compiler made will do."""
    fingerprint = target.fingerprint()
    with contextlib.suppress(BuildError):
        folder = cache() / f"{target.backend}-{fingerprint}-{_short(compiler_of(target))}"
        return folder if manifest_in(folder, target) else None
    for folder in sorted(cache().glob(f"{target.backend}-{fingerprint}-*")):
        if manifest_in(folder, target):
            return folder
    return None


def build_cached(target: Target, retry: bool = False) -> tuple[Path, bool]:
    """(folder, was it built now?). Of several processes one builds and the others wait.

    The lock vanishes with a process that is killed. A build that failed is not tried again, unless `retry`.
    """
    folder = cache() / f"{target.backend}-{target.fingerprint()}-{_short(compiler_of(target))}"
    failure = folder.with_suffix(".failed")
    with _locked(cache(), target):
        if manifest_in(folder, target):
            return folder, False
        if failure.exists() and not retry:
            raise BuildError(
                f"an earlier build failed; `python -m lowrank_optim.build` tries again: {failure.read_text()}"
            )
        with tempfile.TemporaryDirectory(dir=cache(), prefix="building-") as place:
            try:
                build(target, Path(place) / "done")
            except BuildError as error:
                failure.write_text(str(error))
                raise
            shutil.rmtree(folder, ignore_errors=True)
            (Path(place) / "done").rename(folder)
        failure.unlink(missing_ok=True)
    return folder, True


@contextlib.contextmanager
def _locked(folder: Path, target: Target) -> Iterator[None]:
    import fcntl  # not on Windows, where nothing is built

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f"{target.backend}.lock").open("w")
    except OSError as error:
        raise BuildError(
            f"{folder} cannot be written ({error}); set LOWRANK_OPTIM_CACHE to a folder that can"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- compiling ---------------------------------------------------------------------------------------------------------


def build(target: Target, folder: Path) -> Path:
    """Compiles and links into `folder`, the manifest last: what has one is complete."""
    root, cxx, include = sources(), _cxx(), _torch_include()
    folder.mkdir(parents=True, exist_ok=True)
    library = library_in(folder, target)
    kernels = sorted((root / ("cpu" if target.backend == "cpu" else "cuda")).glob("*.c[pu]*"))
    host = [cxx, *_HOST, _STANDARD[target.backend], *_DEFINES[target.backend], *target.extra]
    with tempfile.TemporaryDirectory() as scratch:
        # The one that reads torch's headers takes longest, so it begins.
        objects = [Path(scratch) / f"{path.stem}.o" for path in [root / "registration.cpp", *kernels]]
        commands = [[*host, *_TORCH, "-isystem", str(include), "-c", str(root / "registration.cpp")]]
        commands += [[*_compile(target, host), str(path)] for path in kernels]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            jobs = zip(commands, objects, strict=True)
            list(pool.map(lambda job: _run([*job[0], "-o", str(job[1])]), jobs))
        _link(target, cxx, [str(path) for path in objects], Path(scratch), library)
    manifest = Manifest(target.fingerprint(), compiler_of(target), target.archs)
    (folder / f"{target.backend}.json").write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    return library


def _compile(target: Target, host: Sequence[str]) -> list[str]:
    if target.backend != "cuda":
        return [*host, "-x", "c++", "-c"]
    codes = []
    for arch in target.archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        codes += [f"-gencode=arch=compute_{number},code=sm_{number}"]
        codes += [f"-gencode=arch=compute_{number},code=compute_{number}"] * arch.endswith("+PTX")
    warn = ["-Xptxas", "-warn-spills", "-Xptxas", "-Werror"] if "LOWRANK_OPTIM_STRICT" in os.environ else []
    return [_nvcc(), *_DEVICE, *warn, "-ccbin", _cxx(), *codes, "-c"]


def _link(target: Target, cxx: str, objects: list[str], scratch: Path, library: Path) -> None:
    """Against an empty stand-in for libtorch.so: the loader finds torch's own, with its CUDA part if it has one."""
    if platform.system() == "Darwin":
        _run([cxx, "-shared", "-undefined", "dynamic_lookup", *objects, "-o", str(library)])
        return
    _run([cxx, "-shared", "-x", "c++", "/dev/null", "-Wl,-soname,libtorch.so", "-o", str(scratch / "libtorch.so")])
    flags = "--no-as-needed,-ltorch,--as-needed"
    if target.backend == "cuda":
        head, tail = [_nvcc(), "-shared", "--cudart", "static", "-ccbin", cxx], ["-Xlinker", flags, "-ldl"]
    else:
        head, tail = [cxx, "-shared", *target.extra], [f"-Wl,{flags}", "-pthread"]
    _run([*head, *objects, f"-L{scratch}", *tail, "-o", str(library)])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{(done.stderr or done.stdout)[-4000:]}")
    return done.stdout


def compiler_of(target: Target) -> str:
    """Its version, in one line."""
    lines = _run([_cxx(), "--version"]).splitlines()[:1]
    return "; ".join(lines + (_run([_nvcc(), "--version"]).splitlines()[-1:] if target.backend == "cuda" else []))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _cxx() -> str:
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        if shutil.which(name):
            return name
    what = f"CXX={named} is not a program" if named else "no C++ compiler on PATH (g++, clang++, c++)"
    raise BuildError(f"{what}; install one, or set CXX")


def _nvcc() -> str:
    """What the environment names comes before what is on PATH, as for torch: a system's own is often older."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = os.environ.get("CUDACXX") or (f"{home}/bin/nvcc" if home else None)
    for name in (named, "nvcc", "/usr/local/cuda/bin/nvcc"):
        if name and shutil.which(name):
            return name
    raise BuildError("no nvcc on PATH; install the CUDA toolkit, or set CUDA_HOME")


def _torch_include() -> Path:
    """pip hides installed packages from an isolated build, but its interpreter knows where they are."""
    paths = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    places = [Path(path) / "torch" / "include" for path in paths if path]
    if named := os.environ.get("LOWRANK_OPTIM_TORCH_INCLUDE"):
        places.insert(0, Path(named))
    for place in places:
        if (place / "torch" / "csrc" / "stable" / "library.h").exists():
            return place
    raise BuildError("torch's headers were not found; install torch, or set LOWRANK_OPTIM_TORCH_INCLUDE")


def asked_flags() -> tuple[str, ...]:
    """More flags for host compilers and linker: sanitizers."""
    return tuple(os.environ.get("LOWRANK_OPTIM_FLAGS", "").split())


def asked_archs() -> tuple[str, ...]:
    """The architectures that the environment names: "9.0" or "8.0;9.0;10.0+PTX"."""
    text = os.environ.get("LOWRANK_OPTIM_CUDA_ARCHS", "")
    archs = tuple(text.replace(",", ";").replace(" ", ";").strip(";").split(";")) if text.strip() else ()
    for arch in archs:
        number = arch.removesuffix("+PTX")
        if not number.replace(".", "", 1).rstrip("a").isdigit() or "." not in number:
            raise BuildError(f'LOWRANK_OPTIM_CUDA_ARCHS must be like "9.0" or "8.0;9.0;10.0+PTX", got {text!r}')
    return archs
