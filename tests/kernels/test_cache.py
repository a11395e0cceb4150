"""Nothing in the build cache runs before its owner, mode and content are checked; damage is repaired."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lowrank_optim import backend_info
from lowrank_optim.ops import cache, native
from lowrank_optim.ops import compile as build
from tests.support.subprocesses import ROOT, environment, run

CPU = build.Target("cpu")
STRANGER = 12345  # the number of a user who is neither this user nor root
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
needs_native = pytest.mark.skipif(backend_info()["cpu"].kernels != "native", reason="no native kernels on this machine")

# This compiler copies PRODUCT instead of compiling.
COMPILER = """#!/bin/sh
case "$*" in *--version*) echo "fake 1"; exit 0;; esac
while [ $# -gt 0 ]; do out=$1; shift; done
case "$out" in *lowrank_optim_cpu.so) cat "$PRODUCT" > "$out";; *) : > "$out";; esac
"""


def program(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(0o755)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty cache that does not exist yet, and a compiler that takes no time."""
    (tmp_path / "product").write_bytes(b"a library" * 1000)
    monkeypatch.setenv("PRODUCT", str(tmp_path / "product"))
    monkeypatch.setenv("CXX", str(program(tmp_path / "compiler", COMPILER)))
    monkeypatch.setenv("LOWRANK_OPTIM_CACHE", str(tmp_path / "above" / "cache"))
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "nothing")
    return tmp_path / "above" / "cache"


def built(place: Path) -> dict[str, Path]:
    """Build, and return the paths that another user could plant."""
    folder, now = cache.build_cached(CPU)
    assert now
    assert folder.parent == place
    return {
        "parent": place.parent,
        "root": place,
        "folder": folder,
        "library": build.library_in(folder, CPU),
        "manifest": folder / "cpu.json",
        "lock": place / "cpu.lock",
    }


def assert_refused(place: Path, reason: str, lock: bool = False) -> None:
    """Assert that no file is replaced, and that plain torch runs and says why."""
    before = {path: path.lstat() for path in place.parent.rglob("*")}
    for call in (cache.build_cached,) if lock else (cache.find_cached, cache.build_cached):
        with pytest.raises(cache.UntrustedError, match=reason):
            call(CPU)
    if not lock:
        found = native._load("cpu", "auto")
        assert found.kernels == "reference"
        assert reason in found.how
        assert found.path is None
    after = {path: path.lstat() for path in place.parent.rglob("*")}
    assert [(s.st_ino, s.st_size, s.st_mode) for s in before.values()] == [
        (s.st_ino, s.st_size, s.st_mode) for s in after.values()
    ]


# -- who can write -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022])
def test_what_is_built_is_for_its_owner_alone(place, umask):
    before = os.umask(umask)
    try:
        paths = built(place)
        cache.write_durably(place / "cpu.failed", "a reason")
    finally:
        os.umask(before)
    for path in [place.parent, *place.parent.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path
    assert cache.find_cached(CPU)[0] == paths["folder"]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("parent", 0o777),
        ("root", 0o777),
        ("root", 0o1777),
        ("root", 0o770),
        ("folder", 0o777),
        ("folder", 0o720),
        ("library", 0o666),
        ("library", 0o720),
        ("manifest", 0o622),
    ],
)
def test_what_others_can_write_is_refused(place, name, mode):
    built(place)[name].chmod(mode)
    assert_refused(place, "can be written by other users")


@needs_root
@pytest.mark.parametrize("name", ["parent", "root", "folder", "library", "manifest"])
def test_what_another_user_owns_is_refused(place, name):
    os.chown(built(place)[name], STRANGER, STRANGER)
    assert_refused(place, f"belongs to the user {STRANGER}")


@pytest.mark.parametrize("name", ["root", "folder", "library", "manifest"])
def test_a_symbolic_link_is_refused(place, tmp_path, name):
    path = built(place)[name]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert_refused(place, "is a symbolic link")


def test_a_named_pipe_stops_nothing(place):
    path = built(place)["library"]
    path.unlink()
    os.mkfifo(path, 0o600)
    assert_refused(place, "is not a regular file")


def test_symbolic_links_above_the_cache_are_followed_once(place, tmp_path, monkeypatch):
    built(place)
    (tmp_path / "link").symlink_to(place.parent)
    monkeypatch.setenv("LOWRANK_OPTIM_CACHE", str(tmp_path / "link" / "cache"))
    assert cache.cache() == place
    assert cache.find_cached(CPU)[0].parent == place


def test_a_sticky_folder_may_be_above_the_cache_and_not_be_it(place, tmp_path, monkeypatch):
    built(place)
    place.parent.chmod(0o1777)
    assert cache.find_cached(CPU)[0].parent == place
    monkeypatch.setenv("LOWRANK_OPTIM_CACHE", str(place.parent))
    with pytest.raises(cache.UntrustedError, match="can be written by other users"):
        cache.build_cached(CPU)


@needs_root
def test_the_private_group_of_this_user_may_write_above_the_cache(place):
    """A umask of 002 leaves such folders; a group of several people may not."""
    paths = built(place)
    paths["parent"].chmod(0o770)
    assert cache.find_cached(CPU)[0] == paths["folder"]
    os.chown(paths["parent"], 0, STRANGER)
    assert_refused(place, "can be written by other users")


@needs_root
def test_nothing_is_created_below_a_folder_of_another_user(place):
    place.parent.mkdir()
    os.chown(place.parent, STRANGER, STRANGER)
    with pytest.raises(cache.UntrustedError, match=f"belongs to the user {STRANGER}"):
        cache.build_cached(CPU)
    assert not place.exists()


def test_a_planted_lock_empties_no_file(place, tmp_path):
    (tmp_path / "victim").write_text("precious")
    lock = built(place)["lock"]
    lock.unlink()
    lock.symlink_to(tmp_path / "victim")
    assert_refused(place, "is a symbolic link", lock=True)
    lock.unlink()
    lock.symlink_to(tmp_path / "not_there")
    assert_refused(place, "is a symbolic link", lock=True)
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "not_there").exists()


def test_a_lock_is_not_emptied(place):
    lock = built(place)["lock"]
    lock.write_text("content")
    cache.build_cached(CPU)
    assert lock.read_text() == "content"


def test_a_planted_failure_empties_no_file(place, tmp_path, monkeypatch):
    paths = built(place)
    shutil.rmtree(paths["folder"])
    (tmp_path / "victim").write_text("precious")
    failure = paths["folder"].with_suffix(".failed")
    failure.symlink_to(tmp_path / "victim")
    with pytest.raises(cache.UntrustedError, match="is a symbolic link"):
        cache.build_cached(CPU)
    monkeypatch.setattr(build, "_link", fails)
    with pytest.raises(build.BuildError, match="the linker is broken"):
        cache.build_cached(CPU, retry=True)
    assert (tmp_path / "victim").read_text() == "precious"
    assert not failure.is_symlink()
    assert failure.read_text() == "the linker is broken"


def fails(*arguments):
    raise build.BuildError("the linker is broken")


@pytest.mark.skipif(not shutil.which("gcc"), reason="no C compiler")
def test_a_planted_library_does_not_run(place, tmp_path, monkeypatch):
    """It has the right name and the right manifest. In a private cache it runs, so the test would see it."""
    (tmp_path / "planted.c").write_text(
        f'#include <stdio.h>\n__attribute__((constructor)) void f(void) {{ fclose(fopen("{tmp_path}/ran", "w")); }}'
    )
    subprocess.run(["gcc", "-shared", "-fPIC", tmp_path / "planted.c", "-o", tmp_path / "product"], check=True)
    paths = built(place)
    place.chmod(0o777)
    assert native._load("cpu", "auto").kernels == "reference"
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert native._load("cpu", "auto").kernels == "reference"
    assert not (tmp_path / "ran").exists()
    place.chmod(0o700)
    native._load("cpu", "auto")
    assert (tmp_path / "ran").exists(), paths


# -- content -----------------------------------------------------------------------------------------------------------


def truncate(paths):
    os.truncate(paths["library"], 4000)


def empty(paths):
    os.truncate(paths["library"], 0)


def flip(paths):
    content = bytearray(paths["library"].read_bytes())
    content[len(content) // 2] ^= 1
    paths["library"].write_bytes(content)


def garbage(paths):
    paths["manifest"].write_bytes(b"\xff{")


def another_type(paths):
    paths["manifest"].write_text("[1]")


def edited(**changes):
    def edit(paths):
        fields = json.loads(paths["manifest"].read_text())
        paths["manifest"].write_text(json.dumps({**fields, **changes}))

    return edit


DAMAGE = {
    "truncated": truncate,
    "empty": empty,
    "flipped": flip,
    "garbage": garbage,
    "list": another_type,
    "fingerprint": edited(fingerprint="0123456789abcdef"),
    "sha256": edited(sha256="0" * 64),
    "size": edited(size=1),
    "archs": edited(archs=1),
    "unknown": edited(other=1),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_library_is_built_again_once(place, name, caplog):
    paths = built(place)
    DAMAGE[name](paths)
    with pytest.raises(build.BuildError, match="is damaged"):
        cache.find_cached(CPU)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert cache.build_cached(CPU) == (paths["folder"], True)
    assert [record.getMessage().count("is damaged") for record in caplog.records] == [1]
    assert cache.build_cached(CPU) == (paths["folder"], False)
    assert cache.find_cached(CPU)[0] == paths["folder"]


@pytest.mark.parametrize("name", ["library", "manifest", "folder"])
def test_an_incomplete_library_is_built_again(place, name):
    path = built(place)[name]
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(build.BuildError, match="nothing that fits was built before"):
        cache.find_cached(CPU)
    assert cache.build_cached(CPU)[1]


def test_the_manifest_has_hash_and_size(place):
    paths = built(place)
    fields, content = json.loads(paths["manifest"].read_text()), paths["library"].read_bytes()
    assert fields["sha256"] == hashlib.sha256(content).hexdigest()
    assert fields["size"] == len(content)
    assert fields["fingerprint"] == CPU.fingerprint()
    assert not list(paths["folder"].glob("scratch-*"))


def test_without_a_compiler_the_first_whole_library_is_taken(place, tmp_path, monkeypatch):
    first = built(place)
    program(tmp_path / "compiler", COMPILER.replace("fake 1", "fake 2"))
    second = built(place)
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    flip(min(first, second, key=lambda paths: paths["folder"]))
    assert cache.find_cached(CPU)[0] == max(first["folder"], second["folder"])


ALL_DAMAGE = """
from lowrank_optim.ops import cache, native
from tests.kernels import test_cache
folder = cache.find_cached(test_cache.CPU)[0]
paths = {"library": folder / "lowrank_optim_cpu.so", "manifest": folder / "cpu.json"}
whole = {path: path.read_bytes() for path in paths.values()}
for name, damage in test_cache.DAMAGE.items():
    damage(paths)
    found = native._load("cpu", "auto")
    assert (found.kernels, "is damaged" in found.how) == ("reference", True), (name, found)
    for path, content in whole.items():
        path.write_bytes(content)
native.load()
print("survived,", native.backend_info()["cpu"].kernels)
"""


@needs_native
def test_no_damage_kills_the_process(place, tmp_path, monkeypatch):
    """With a library that loads, so a cut file would be a bus error."""
    shutil.copyfile(backend_info()["cpu"].path, tmp_path / "product")
    built(place)
    settings = {"CXX": str(tmp_path / "none"), "LOWRANK_OPTIM_CACHE": str(place)}
    assert "survived, native" in run(ALL_DAMAGE, **settings)


def build_command(**changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lowrank_optim.build"]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**changes), cwd=ROOT)


@needs_native
def test_the_build_command_repairs(place, tmp_path):
    shutil.copyfile(backend_info()["cpu"].path, tmp_path / "product")
    empty(built(place))
    done = build_command(LOWRANK_OPTIM_CACHE=str(place))
    assert done.returncode == 0, done.stderr
    assert "cpu  native" in done.stdout
    assert "building native kernels for cpu, because" in done.stderr
    assert done.stderr.count("building") == 1


def test_the_build_command_fails_without_a_working_library(place):
    """The fake compiler makes a file that is no library."""
    done = build_command(LOWRANK_OPTIM_CACHE=str(place))
    assert done.returncode == 1
    assert "native kernels could not be built: there are no native kernels for cpu" in done.stderr


@pytest.mark.slow
def test_the_build_command_and_require_refuse_a_planted_cache(place):
    built(place)
    place.chmod(0o777)
    done = build_command(LOWRANK_OPTIM_CACHE=str(place))
    assert done.returncode == 1
    assert "can be written by other users" in done.stderr
    code = "from lowrank_optim.ops import native; native.load()"
    said = run(code, fails=True, LOWRANK_OPTIM_CACHE=str(place), LOWRANK_OPTIM_NATIVE="require")
    assert "RuntimeError: LOWRANK_OPTIM_NATIVE=require, and there are no native kernels for cpu" in said
    assert "can be written by other users" in said


# -- builders ----------------------------------------------------------------------------------------------------------


def test_leftovers_of_killed_builders_are_removed(place, tmp_path):
    """The lock of this target is held; another target has a lock of its own, so its builder may be running."""
    built(place)
    (tmp_path / "other").mkdir()
    for name in ("building-cpu-killed", "building-cuda-running", "building-plans"):
        (place / name / "done" / "scratch").mkdir(parents=True)
    (place / "building-cpu-file").write_text("")
    (place / "building-cpu-link").symlink_to(tmp_path / "other")
    cache.build_cached(CPU)
    assert sorted(path.name for path in place.glob("building-*")) == ["building-cuda-running", "building-plans"]
    assert (tmp_path / "other").exists()


KILLED = """
import os, signal
from lowrank_optim.ops import cache, compile as build
from tests.kernels import test_cache
build._link = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
cache.build_cached(test_cache.CPU)
"""


@pytest.mark.slow
def test_after_a_killed_builder_another_builds(place):
    run(KILLED, fails=True, LOWRANK_OPTIM_CACHE=str(place), LOWRANK_OPTIM_NATIVE="off")
    assert list(place.glob("building-cpu-*"))
    built(place)
    assert not list(place.glob("building-*"))


def test_a_process_that_waits_says_so_once_and_builds_nothing(place, caplog):
    paths, result = built(place), []
    with paths["lock"].open() as file, caplog.at_level(logging.WARNING):
        caplog.clear()
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: result.append(cache.build_cached(CPU)))
        thread.start()
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not result
        fcntl.flock(file, fcntl.LOCK_UN)
        thread.join(10)
    assert result == [(paths["folder"], False)]
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for another process that builds native kernels for cpu"
    ]


def test_building_is_said_where_something_is_built(place, caplog):
    with caplog.at_level(logging.WARNING):
        built(place)
        assert ["building native kernels for cpu" in record.getMessage() for record in caplog.records] == [True]
        caplog.clear()
        assert not cache.build_cached(CPU)[1]
        assert not caplog.records


def test_an_earlier_failure_is_not_called_building(place, monkeypatch, caplog):
    monkeypatch.setattr(build, "_link", fails)
    with pytest.raises(build.BuildError, match="the linker is broken"):
        cache.build_cached(CPU)
    caplog.clear()
    with pytest.raises(build.BuildError, match=r"an earlier build failed.*the linker is broken"):
        cache.build_cached(CPU)
    assert not caplog.records
    assert {path.name.split("-")[0] for path in place.iterdir()} == {"cpu.lock", "cpu"}, "no leftovers"


@pytest.mark.parametrize("stream", [1, 2])
def test_messages_of_a_compiler_need_not_be_utf8(place, tmp_path, stream):
    lines = (
        f'case "$*" in *--version*) printf "f\\351e 1\\n"; exit 0;; esac\nprintf "erreur \\351\\n" >&{stream}; exit 1\n'
    )
    program(tmp_path / "compiler", f"#!/bin/sh\n{lines}")
    for expected in (
        "erreur \N{REPLACEMENT CHARACTER}",
        "an earlier build failed(.|\n)*erreur \N{REPLACEMENT CHARACTER}",
    ):
        with pytest.raises(build.BuildError, match=expected):
            cache.build_cached(CPU)


def test_a_compiler_that_cannot_be_run(place, tmp_path):
    program(tmp_path / "compiler", b"\x7fELF no program")
    with pytest.raises(build.BuildError, match="does not run"):
        cache.build_cached(CPU)


def test_a_cache_that_cannot_be_written(place):
    place.parent.write_text("a file")
    with pytest.raises(build.BuildError):
        cache.build_cached(CPU)


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    cache.write_durably(path, "first")
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        cache.write_durably(path, "second")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "first"


@pytest.mark.parametrize("name", ["geteuid", "O_NOFOLLOW"])
def test_platforms_that_know_no_owners_use_plain_torch(place, monkeypatch, name):
    built(place)
    monkeypatch.delattr(os, name)
    found = native._load("cpu", "auto")
    assert found.kernels == "reference"
    assert "this platform does not say who can write a file" in found.how


# -- the library of an installation ------------------------------------------------------------------------------------


@pytest.fixture
def prebuilt(place, tmp_path, monkeypatch):
    folder = shutil.copytree(built(place)["folder"], tmp_path / "_native")
    monkeypatch.setattr(build, "PREBUILT", folder)
    return {"folder": folder, "library": build.library_in(folder, CPU), "manifest": folder / "cpu.json"}


def test_a_prebuilt_library_may_be_its_groups(prebuilt):
    for path in prebuilt.values():
        path.chmod(0o775)
    assert native._prebuilt(CPU)[1] == prebuilt["library"]


@pytest.mark.parametrize("name", ["folder", "library", "manifest"])
def test_a_prebuilt_library_that_others_can_write_is_refused(prebuilt, name):
    path = prebuilt[name]
    path.chmod(0o777)
    with pytest.raises(cache.UntrustedError, match=r"can be written by other users.*install lowrank-optim again"):
        native._prebuilt(CPU)
    path.chmod(0o755)
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(cache.UntrustedError, match="is a symbolic link"):
        native._prebuilt(CPU)


@needs_root
@pytest.mark.parametrize("name", ["folder", "library", "manifest"])
def test_a_prebuilt_library_of_another_user_is_refused(prebuilt, name, monkeypatch):
    os.chown(prebuilt[name], STRANGER, STRANGER)
    if Path(cache.__file__).stat().st_uid != STRANGER:
        with pytest.raises(cache.UntrustedError, match=f"belongs to the user {STRANGER}"):
            native._prebuilt(CPU)
    # Python runs the code of the package's owner already.
    rules = cache.installed()
    monkeypatch.setattr(cache, "installed", lambda: dataclasses.replace(rules, owners=rules.owners | {STRANGER}))
    assert native._prebuilt(CPU)[1] == prebuilt["library"]


@pytest.mark.parametrize("damage", [truncate, flip, empty, garbage])
def test_a_damaged_prebuilt_library_is_not_loaded(prebuilt, damage):
    damage(prebuilt)
    with pytest.raises(cache.DamagedError, match="is damaged"):
        native._prebuilt(CPU)


@pytest.mark.slow
def test_every_user_of_an_installation_can_read_its_library(place, tmp_path):
    for name in ("lowrank_optim", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    command = [sys.executable, "setup.py", "build_py", "--build-lib", str(tmp_path / "out")]
    subprocess.run(command, cwd=tmp_path / "source", env=environment(LOWRANK_OPTIM_BUILD="1"), check=True, umask=0o022)
    files = (tmp_path / "out" / "lowrank_optim" / "_native").iterdir()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}
    assert modes == {"lowrank_optim_cpu.so": 0o755, "cpu.json": 0o644}
