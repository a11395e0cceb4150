"""The folder of compiled libraries, from which nothing runs before its owner, its mode and its content are checked.

A library that is loaded may do all that the user may, and the names in the cache follow from public sources. So a
library from another user is refused (`UntrustedError`). A library with other bytes than its manifest says is built
again (`DamagedError`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .compile import BuildError, Manifest, Target, build, compiler_of, library_in, write_durably

_LOG = logging.getLogger("lowrank_optim")


class UntrustedError(BuildError):
    """A file or folder that another user can have written. It is neither run nor replaced."""


class DamagedError(BuildError):
    """A library with other bytes than its manifest says, or a manifest that cannot be read."""


@dataclass(frozen=True)
class Rules:
    """The owners that a file may have, the bits that its mode must not have, and advice for the user."""

    owners: frozenset[int]
    forbidden: int
    advice: str


def private() -> Rules:
    """Return the rules for the cache: files of this user or root, which no group and no other user can write."""
    if not hasattr(os, "geteuid") or not hasattr(os, "O_NOFOLLOW"):
        raise BuildError("this platform does not say who can write a file, so no library is loaded")
    advice = "make a folder that only you can write, and set LOWRANK_OPTIM_CACHE to it"
    return Rules(frozenset((0, os.geteuid())), stat.S_IWGRP | stat.S_IWOTH, advice)


def installed() -> Rules:
    """Return the rules for the library of an installation.

    The owner and the group of this file are trusted too, because Python runs this file already. Installers leave files
    that the group can write where the umask is 002.
    """
    owners = private().owners | {Path(__file__).stat().st_uid}
    return Rules(owners, stat.S_IWOTH, "install lowrank-optim again")


# -- checks ------------------------------------------------------------------------------------------------------------
#
# A check is followed by dlopen of the same path. Nobody can exchange the file in between: only its owner can write the
# file and its folder, and `_check_parents` finds that nobody else can rename a folder above them.


def _check(path: Path, status: os.stat_result, rules: Rules, kind: int) -> None:
    """Raise `UntrustedError` where the file or folder breaks the rules; `kind` is S_IFREG or S_IFDIR."""
    wanted = "a folder" if kind == stat.S_IFDIR else "a regular file"
    if stat.S_IFMT(status.st_mode) != kind:
        reason = "is a symbolic link" if stat.S_ISLNK(status.st_mode) else f"is not {wanted}"
    elif status.st_uid not in rules.owners:
        reason = f"belongs to the user {status.st_uid}, neither to this user nor to root"
    elif status.st_mode & rules.forbidden:
        reason = f"can be written by other users (its mode is {stat.S_IMODE(status.st_mode):04o})"
    else:
        return
    raise UntrustedError(f"{path} {reason}, so no library is loaded from it; {rules.advice}")


def _check_parents(folder: Path) -> None:
    """Raise `UntrustedError` where another user can rename a folder above `folder`.

    No folder above it is a symbolic link, see `cache`.
    """
    # In a container the machine's root can appear as another user. The owner of / can change every program anyway.
    rules = private()
    owners = rules.owners | {os.stat("/").st_uid}
    for parent in folder.parents:
        status = parent.lstat()
        loose = stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
        if loose == stat.S_IWGRP and _is_of_this_user_alone(status.st_gid):
            loose = 0
        # In a sticky folder, such as /tmp, only the owner of an entry can rename the entry.
        forbidden = 0 if status.st_mode & stat.S_ISVTX else loose
        _check(parent, status, Rules(owners, forbidden, rules.advice), stat.S_IFDIR)


def _is_of_this_user_alone(group: int) -> bool:
    """Whether a group is the private group of this user, for which a umask of 002 leaves folders writable."""
    import grp
    import pwd

    try:
        found, user = grp.getgrgid(group), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return found.gr_name == user and set(found.gr_mem) <= {user}


@contextlib.contextmanager
def _opened(path: Path, rules: Rules, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file whose content only a trusted user can have written; yield the descriptor."""
    try:
        # Without O_NONBLOCK a named pipe would stop the process here.
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except FileNotFoundError:
        raise
    except OSError:
        _check(path, path.lstat(), rules, stat.S_IFREG)  # a symbolic link, for example
        raise
    try:
        _check(path, os.fstat(file), rules, stat.S_IFREG)
        yield file
    finally:
        os.close(file)


def _read(path: Path, rules: Rules) -> bytes:
    with _opened(path, rules) as file, os.fdopen(os.dup(file), "rb") as stream:
        return stream.read()


def manifest_in(folder: Path, target: Target, rules: Rules) -> Manifest | None:
    """Return the manifest in a folder, or None where there is no complete library.

    Raises:
        UntrustedError: another user can have written the folder or the manifest.
        DamagedError: the manifest cannot be read.
    """
    path = folder / f"{target.backend}.json"
    try:
        _check(folder, folder.lstat(), rules, stat.S_IFDIR)
        fields = json.loads(_read(path, rules))
        manifest = Manifest(**{**fields, "archs": tuple(map(str, fields["archs"]))})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"{path} is damaged: {error!r}") from None
    return manifest if os.path.lexists(library_in(folder, target)) else None


def check_library(folder: Path, target: Target, manifest: Manifest, rules: Rules) -> None:
    """Check owner, mode, size and hash of a library; all are read from one open file.

    Raises:
        UntrustedError: another user can have written the library.
        DamagedError: the library has other bytes than its manifest says.
    """
    path, digest = library_in(folder, target), hashlib.sha256()
    with _opened(path, rules) as file:
        if (size := os.fstat(file).st_size) != manifest.size:
            raise DamagedError(f"{path} is damaged: it has {size} bytes, and its manifest says {manifest.size}")
        while block := os.read(file, 1 << 20):
            digest.update(block)
    if digest.hexdigest() != manifest.sha256:
        raise DamagedError(f"{path} is damaged: its bytes are not those that were built")


# -- the cache ---------------------------------------------------------------------------------------------------------


def cache() -> Path:
    """Return the folder of libraries that were built on this machine, with no symbolic link above it."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.path.abspath(os.environ.get("LOWRANK_OPTIM_CACHE") or Path(root) / "lowrank_optim"))
    return Path(os.path.realpath(path.parent)) / path.name


def find_cached(target: Target) -> tuple[Path, Manifest]:
    """Return a cached folder with this library, and its manifest; all checks are done.

    Where there is a compiler, only a library that it has built is used. Without one, a library of any compiler is.

    Raises:
        BuildError: there is no such library, or each is refused.
    """
    root, fingerprint = cache(), target.fingerprint()
    try:
        folders = [_folder(target, fingerprint)]
    except BuildError:
        folders = sorted(root.glob(f"{target.backend}-{fingerprint}-*"))
    reasons = []
    for folder in folders if os.path.lexists(root) else []:
        try:
            if manifest := _checked(folder, target, fingerprint):
                return folder, manifest
        except DamagedError as error:
            reasons.append(str(error))
    raise BuildError("; ".join(reasons) or f"nothing that fits was built before in {root}")


def _folder(target: Target, fingerprint: str) -> Path:
    """Return the folder of a library in the cache; its name has the sources and the compiler."""
    compiler = hashlib.sha256(compiler_of(target).encode()).hexdigest()[:8]
    return cache() / f"{target.backend}-{fingerprint}-{compiler}"


def _checked(folder: Path, target: Target, fingerprint: str) -> Manifest | None:
    """Return the manifest of a library in the cache after all checks, or None where there is no library."""
    rules = private()
    _check_root(folder.parent)
    manifest = manifest_in(folder, target, rules)
    if manifest is None:
        return None
    if manifest.fingerprint != fingerprint:
        raise DamagedError(f"{folder} is damaged: its manifest is that of other sources or flags")
    check_library(folder, target, manifest, rules)
    return manifest


def _check_root(root: Path) -> None:
    _check_parents(root)
    _check(root, root.lstat(), private(), stat.S_IFDIR)


def build_cached(target: Target, retry: bool = False) -> tuple[Path, bool]:
    """Return the folder of this library, and whether it was built now.

    One process builds, and all others wait for its lock. The lock ends with its process, also if that is killed. A
    damaged library is replaced. A failed build is not repeated unless `retry`.

    Raises:
        BuildError: the library could not be built, or another user can write in the cache.
    """
    fingerprint, why = target.fingerprint(), "once for this machine"
    folder = _folder(target, fingerprint)
    # The root is resolved once: a symbolic link above it, if another user owns the link, can change at any time.
    root, failure = folder.parent, folder.with_suffix(".failed")
    with _locked(root, target):
        _remove_leftovers(root, target)
        try:
            if _checked(folder, target, fingerprint):
                return folder, False
        except DamagedError as error:
            why = f"because {error}"
        if not retry and os.path.lexists(failure):
            text = _read(failure, private()).decode(errors="replace")
            raise BuildError(f"an earlier build failed; `python -m lowrank_optim.build` tries again: {text}")
        _LOG.warning("building native kernels for %s, %s; takes some seconds", target.backend, why)
        with tempfile.TemporaryDirectory(dir=root, prefix=_prefix(target), ignore_cleanup_errors=True) as place:
            done = Path(place) / "done"
            try:
                build(target, done)
            except BuildError as error:
                write_durably(failure, str(error))
                raise
            _make_private_and_durable(done)
            shutil.rmtree(folder, ignore_errors=True)
            done.rename(folder)
            _synchronize(root)
        failure.unlink(missing_ok=True)
    return folder, True


def _prefix(target: Target) -> str:
    return f"building-{target.backend}-"


def _remove_leftovers(root: Path, target: Target) -> None:
    """Remove the files of builders that were killed. The lock of the target is held, so no builder of it runs."""
    for place in root.glob(f"{_prefix(target)}*"):
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)


def _make_private_and_durable(folder: Path) -> None:
    """Leave a built folder to its owner alone, and write it to the disk before it gets its name."""
    for path in folder.iterdir():
        path.chmod(0o700 if path.suffix == ".so" else 0o600)
        _synchronize(path)
    folder.chmod(0o700)
    _synchronize(folder)


def _synchronize(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def _locked(folder: Path, target: Target) -> Iterator[None]:
    """Hold the lock of a target in a folder, which is created with its missing parents, each for this user alone."""
    rules = private()
    import fcntl  # does not exist on Windows, where nothing is built

    try:
        for place in [*reversed(folder.parents), folder]:
            if not os.path.lexists(place):
                _check_parents(place)
                with contextlib.suppress(FileExistsError):  # another process was faster
                    place.mkdir(mode=0o700)
        _check_root(folder)
        with _opened(folder / f"{target.backend}.lock", rules, os.O_RDWR | os.O_CREAT) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _LOG.warning("waiting for another process that builds native kernels for %s", target.backend)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:  # also of the builder: the disk can be full
        raise BuildError(
            f"{folder} cannot be written ({error}); set LOWRANK_OPTIM_CACHE to a folder that can"
        ) from None
