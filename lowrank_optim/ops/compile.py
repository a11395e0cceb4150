"""The compilation of csrc/: for `python -m lowrank_optim.build`, setup.py, and the first optimizer without a library.

This file imports the standard library only, because setup.py loads it by its path in an environment without torch. A
library is bound to torch's stable ABI only. So it needs torch's headers, which are found and not imported, and nothing
else of torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
PREBUILT = _PACKAGE / "_native"
# Each product and each sum is rounded, or CPU, GPU and reference would differ in their last bits. There is no
# -march=native, because a library from a cache or a wheel runs on other machines, and csrc/cpu/clones.h has a copy per
# instruction set.
_HOST = ("-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_DEVICE = ("-O3", "-std=c++17", "-fmad=false", "--threads", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden")
_TORCH = (
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)  # 2.10, the first version whose stable ABI has all functions that csrc/ uses
_FORMAT = 2  # of the manifest
_DEFINES = {"cpu": (), "cuda": ("-DLRO_CUDA",), "emulated": ("-DLRO_EMULATED",)}
_STANDARD = {"cpu": "-std=c++17", "cuda": "-std=c++17", "emulated": "-std=c++20"}  # C++20 has barriers


class BuildError(RuntimeError):
    """A missing tool or a failed command, in words for the user."""


@dataclass(frozen=True)
class Target:
    """A library to build.

    Attributes:
        backend: "cpu", "cuda", or "emulated", which runs the CUDA sources on the CPU for tests.
        archs: the CUDA architectures, such as "9.0" or "10.0+PTX".
        extra: more flags for host compilers and linker, such as those of sanitizers.
    """

    backend: str
    archs: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Return a hash of the sources and flags that decide the content of the library; the compiler is not included.

        Schemas are included, because a library registers kernels for them.
        """
        machine = platform.machine(), platform.system()
        digest = hashlib.sha256(repr((_FORMAT, self, _HOST, _DEVICE, _TORCH, *machine)).encode())
        ops = _PACKAGE / "ops"
        schemas = [ops / "schema.py", ops / "signatures.py", *sorted((ops / "reference").glob("*.py"))]
        for path in [*schemas, *sorted(sources().rglob("*.*"))]:
            if path.suffix != ".md":
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Manifest:
    """The origin of a library, stored next to it as JSON.

    Attributes:
        fingerprint: the hash of its sources and flags, see `Target.fingerprint`.
        compiler: the versions of its compilers.
        archs: its CUDA architectures.
        sha256: the hash of the library, in hexadecimal digits.
        size: the bytes of the library.
    """

    fingerprint: str
    compiler: str
    archs: tuple[str, ...]
    sha256: str
    size: int


def sources() -> Path:
    """Return csrc/ of a checkout, or its copy in an installed wheel."""
    for place in (_PACKAGE / "_csrc", _PACKAGE.parent / "csrc"):
        if (place / "registration.cpp").exists():
            return place
    raise BuildError(f"the C++ sources are missing: neither {_PACKAGE}/_csrc nor {_PACKAGE.parent}/csrc has them")


def library_in(folder: Path, target: Target) -> Path:
    """Return the path of a library in a folder."""
    return folder / f"lowrank_optim_{target.backend}.so"


def write_durably(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all, also after a crash; only its owner can read it.

    The file gets its name last, which replaces a symbolic link of that name and does not follow it. A cache removes
    what a killed process leaves, by the prefix.
    """
    file, name = tempfile.mkstemp(dir=path.parent, prefix=f"building-{path.name}-")  # its mode is 0600
    try:
        with os.fdopen(file, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# -- compiling ---------------------------------------------------------------------------------------------------------


def build(target: Target, folder: Path) -> Path:
    """Compile and link into `folder`. The manifest is written last, so a folder with a manifest is complete."""
    root, cxx, include = sources(), _cxx(), _torch_include()
    folder.mkdir(parents=True, exist_ok=True)
    library = library_in(folder, target)
    kernels = sorted((root / ("cpu" if target.backend == "cpu" else "cuda")).glob("*.c[pu]*"))
    host = [cxx, *_HOST, _STANDARD[target.backend], *_DEFINES[target.backend], *target.extra]
    # Scratch files are in the folder, because a cache removes what a killed builder leaves there.
    with tempfile.TemporaryDirectory(dir=folder, prefix="scratch-") as scratch:
        # registration.cpp is compiled first, because torch's headers make it take longest.
        objects = [Path(scratch) / f"{path.stem}.o" for path in [root / "registration.cpp", *kernels]]
        commands = [[*host, *_TORCH, "-isystem", str(include), "-c", str(root / "registration.cpp")]]
        commands += [[*_compile(target, host), str(path)] for path in kernels]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            jobs = zip(commands, objects, strict=True)
            list(pool.map(lambda job: _run([*job[0], "-o", str(job[1])]), jobs))
        _link(target, cxx, [str(path) for path in objects], Path(scratch), library)
    content = library.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    manifest = Manifest(target.fingerprint(), compiler_of(target), target.archs, digest, len(content))
    write_durably(folder / f"{target.backend}.json", json.dumps(asdict(manifest), indent=1) + "\n")
    return library


def _compile(target: Target, host: Sequence[str]) -> list[str]:
    """Return the command that compiles a source file of kernels, without the file."""
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
    """Link against an empty libtorch.so in `scratch`.

    At run time the loader finds the libtorch.so of the process, with its CUDA part if it has one.
    """
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
    """Run a command and return its output, or raise `BuildError` with the end of its messages."""
    try:
        # Messages of compilers are in the encoding of the user's locale, which need not be that of Python.
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{(done.stderr or done.stdout)[-4000:]}")
    return done.stdout


def compiler_of(target: Target) -> str:
    """Return the versions of the compilers of this target, in one line."""
    lines = _run([_cxx(), "--version"]).splitlines()[:1]
    return "; ".join(lines + (_run([_nvcc(), "--version"]).splitlines()[-1:] if target.backend == "cuda" else []))


def _cxx() -> str:
    """Return the C++ compiler: CXX, or the first of the usual names on PATH."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        if shutil.which(name):
            return name
    reason = f"CXX={named} is not a program" if named else "no C++ compiler on PATH (g++, clang++, c++)"
    raise BuildError(f"{reason}; install one, or set CXX")


def _nvcc() -> str:
    """Return nvcc: the one that the environment names, else the one on PATH, which is often older."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = os.environ.get("CUDACXX") or (f"{home}/bin/nvcc" if home else None)
    for name in (named, "nvcc", "/usr/local/cuda/bin/nvcc"):
        if name and shutil.which(name):
            return name
    raise BuildError("no nvcc on PATH; install the CUDA toolkit, or set CUDA_HOME")


def _torch_include() -> Path:
    """Return the folder of torch's headers.

    pip hides installed packages from an isolated build, but the interpreter still knows their folders.
    """
    paths = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    places = [Path(path) / "torch" / "include" for path in paths if path]
    if named := os.environ.get("LOWRANK_OPTIM_TORCH_INCLUDE"):
        places.insert(0, Path(named))
    for place in places:
        if (place / "torch" / "csrc" / "stable" / "library.h").exists():
            return place
    raise BuildError("torch's headers were not found; install torch, or set LOWRANK_OPTIM_TORCH_INCLUDE")


def asked_flags() -> tuple[str, ...]:
    """Return the additional flags for host compilers and linker that the environment names, such as sanitizers."""
    return tuple(os.environ.get("LOWRANK_OPTIM_FLAGS", "").split())


def asked_archs() -> tuple[str, ...]:
    """Return the architectures that the environment names, such as "9.0" or "8.0;9.0;10.0+PTX"."""
    text = os.environ.get("LOWRANK_OPTIM_CUDA_ARCHS", "")
    archs = tuple(text.replace(",", ";").replace(" ", ";").strip(";").split(";")) if text.strip() else ()
    for arch in archs:
        number = arch.removesuffix("+PTX")
        if not number.replace(".", "", 1).rstrip("a").isdigit() or "." not in number:
            raise BuildError(f'LOWRANK_OPTIM_CUDA_ARCHS must be like "9.0" or "8.0;9.0;10.0+PTX", got {text!r}')
    return archs
