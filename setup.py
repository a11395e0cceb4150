"""Compiles csrc/ into the package where that is possible; everything else is in pyproject.toml.

`LOWRANK_OPTIM_BUILD`: `auto` builds what it can; `0` nothing, the first optimizer then does; `1` fails where it cannot.
`LOWRANK_OPTIM_CUDA_ARCHS="9.0"`: CUDA kernels too. torch is found, not imported: it is no requirement of the build.
"""

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "0", "1")


def _recipe():
    """lowrank_optim/ops/compile.py, without importing lowrank_optim, which needs torch."""
    spec = importlib.util.spec_from_file_location(
        "_lowrank_optim_compile", ROOT / "lowrank_optim" / "ops" / "compile.py"
    )
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(folder: Path) -> list[Path]:
    """The libraries that could be built, each with its manifest."""
    mode = os.environ.get("LOWRANK_OPTIM_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"LOWRANK_OPTIM_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    recipe = _recipe()
    if mode == "0" or platform.system() == "Windows":
        return []
    try:
        archs = recipe.asked_archs()
        for target in [recipe.Target("cpu"), *([recipe.Target("cuda", archs)] if archs else [])]:
            recipe.build(target, folder)
    except recipe.BuildError as error:
        if mode == "1":
            raise SystemExit(f"LOWRANK_OPTIM_BUILD=1, and native kernels could not be built: {error}") from None
        print(f"native kernels are left to first use: {error}", file=sys.stderr)
    return sorted(path for path in folder.iterdir() if (folder / f"{_backend(path)}.json").exists())


def _backend(path: Path) -> str:
    return path.stem.removeprefix("lowrank_optim_")


class BuildPy(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return  # sources change; first use builds
        package = Path(self.build_lib) / "lowrank_optim"
        for name in ("_csrc", "_native"):  # a build/ folder that stayed must not leak old libraries into new wheels
            shutil.rmtree(package / name, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", package / "_csrc")
        with tempfile.TemporaryDirectory() as scratch:
            for path in _compile(Path(scratch)):
                (package / "_native").mkdir(exist_ok=True)
                # The manifest is its owner's only, but every user of an installation reads it.
                copy = Path(shutil.copy2(path, package / "_native"))
                copy.chmod(0o755 if path.suffix == ".so" else 0o644)


class BdistWheel(bdist_wheel):
    """One wheel for every CPython and every torch: the libraries know neither."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def run(self):
        self.run_command("build_py")
        self.root_is_pure = not (
            Path(self.get_finalized_command("build_py").build_lib) / "lowrank_optim/_native"
        ).exists()
        super().run()

    def get_tag(self):
        return "py3", "none", "any" if self.root_is_pure else super().get_tag()[2]


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
