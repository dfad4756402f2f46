"""Content-addressed store of compiled objects on disk.

A file is SHA-256(payload) followed by the payload: a relocatable object or the name of one (see
`cpu_kernels/jit/compile.py`), or code for a GPU (`gpu_kernels/toolchain`). Nothing is unpickled.
Writers rename a finished temporary file over the final name, so concurrent processes see whole
files only; a file that fails its digest is rebuilt.

What is read here is executed. So the directory must belong to this user or to root, and nobody else
may write to it; the same holds for each file. Both are checked on what has been opened, never on a
path: every call opens the directory anew (a link in its place is refused), looks at what it got,
and reaches the files through it. Folders above may belong to anybody: who can write to one can put
another directory there, but none that passes the check, unless this user or root has filled it.

A directory that cannot be written to, a read-only mount say, is read all the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

LIMIT_BYTES = 256 << 20
"""Of a directory; then entries go, those first that were not used for the longest time. All kernels
of one version and processor take a few MB, those of a GPU as much."""

_DIGEST_BYTES = 32
_OURS = re.compile(r"[0-9a-f]{64}\.(o|index|cubin)(\.[0-9a-f]{16}\.tmp)?")
_LOCK = "lock"
TEMPORARY_S = 3600
"""A temporary file so old is left from a process that was killed."""

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
CREATE_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def cache_directory() -> Path:
    """`HYBRID_MOE_CACHE_DIR`, else `$XDG_CACHE_HOME/hybrid_moe`, else `~/.cache/hybrid_moe`.

    Raises:
        RuntimeError: none of these is set, and this user has no home directory.
    """
    named = os.environ.get("HYBRID_MOE_CACHE_DIR")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hybrid_moe"


_told: set[str] = set()


def _tell_once(directory: str, reason: object) -> None:
    """Say why kernels stay in memory; once for each directory."""
    if directory not in _told:
        _told.add(directory)
        logger.warning(
            "compiled kernels stay in memory: the cache directory %s cannot be used (%s); "
            "HYBRID_MOE_CACHE_DIR names another",
            directory,
            reason,
        )


def check_private(status: os.stat_result) -> None:
    """Raise unless only this user and root can have written what has been opened."""
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"it belongs to user {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError("others may write to it; chmod 700 it")


@contextmanager
def _opened(create: bool) -> Iterator[int | None]:
    """A descriptor of the directory, or None where there is none or it cannot be used; says why,
    once."""
    name = "in the home directory"
    descriptor = None
    try:
        directory = cache_directory()
        name = str(directory)
        if create:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory, OPEN_DIRECTORY)
        check_private(os.fstat(descriptor))
    except (OSError, RuntimeError) as error:
        if descriptor is not None:
            os.close(descriptor)
        if create or not isinstance(error, FileNotFoundError):
            a_link = Path(name).is_symlink()
            _tell_once(name, "it is a link: name the folder itself" if a_link else error)
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read(name: str) -> bytes | None:
    """The payload of the entry `name`, or None if there is none or it is damaged."""
    with _opened(create=False) as directory:
        if directory is None or not _OURS.fullmatch(name):
            return None
        try:
            blob = _read_file(name, directory)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("cannot read the kernel cache: %s: %s", name, error)
            return None
    digest, payload = blob[:_DIGEST_BYTES], blob[_DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        logger.warning("kernel cache entry %s is damaged and will be rebuilt", name)
        return None
    return payload


def has_any(suffix: str) -> bool:
    """Whether there are entries of a kind, "cubin"."""
    with _opened(create=False) as directory:
        if directory is None:
            return False
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries]
    return any(_OURS.fullmatch(name) and name.endswith(f".{suffix}") for name in names)


def _read_file(name: str, directory: int) -> bytes:
    with os.fdopen(os.open(name, OPEN_FILE, dir_fd=directory), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise PermissionError("it is not a regular file")
        check_private(status)
        if _is_writable(directory):  # mark it as used; the kernel may not, or once a day
            with suppress(PermissionError):  # root's
                os.utime(file.fileno(), ns=(time.time_ns(), status.st_mtime_ns))
        return file.read()


def _is_writable(directory: int) -> bool:
    return os.access(".", os.W_OK | os.X_OK, dir_fd=directory, effective_ids=True)


def write(name: str, payload: bytes) -> None:
    """Store `payload` as entry `name`; a failure is logged and costs a compilation next time."""
    with _opened(create=True) as directory:
        if directory is None:
            return
        if not _is_writable(directory):
            _tell_once(str(cache_directory()), "it lacks some of them, and is not writable")
            return
        temporary = f"{name}.{secrets.token_hex(8)}.tmp"
        try:
            try:
                new = os.open(temporary, CREATE_FILE, 0o600, dir_fd=directory)
                with os.fdopen(new, "wb") as file:
                    file.write(hashlib.sha256(payload).digest() + payload)
                os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
            except OSError:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=directory)
                raise
            _evict(directory, name)
        except OSError as error:
            logger.warning("cannot write the kernel cache: %s", error)


@contextmanager
def one_process() -> Iterator[None]:
    """Let one process at a time work on what all of them would store, so that the others find it.
    Where the directory cannot be written to, nobody waits."""
    lock = None
    with _opened(create=True) as directory:
        if directory is not None and _is_writable(directory):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                lock = os.open(_LOCK, flags, 0o600, dir_fd=directory)
                fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, or its process ends
            except OSError as error:  # a file system without locks
                logger.warning("cannot lock the kernel cache: %s", error)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _evict(directory: int, newest: str) -> None:
    """Remove what was not used for the longest time while all takes more than LIMIT_BYTES, and what
    writers have left behind. Files that are not of this cache are not looked at."""
    used: list[tuple[int, int, str]] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if not _OURS.fullmatch(entry.name):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # another process was faster
                continue
            if not entry.name.endswith(".tmp"):
                used.append((status.st_atime_ns, status.st_size, entry.name))
            elif status.st_mtime < time.time() - TEMPORARY_S:
                _remove(entry.name, directory)
    total = sum(size for _, size, _ in used)
    for _, size, name in sorted(used):
        if total <= LIMIT_BYTES:
            break
        if name != newest:
            _remove(name, directory)
            total -= size


def _remove(name: str, directory: int) -> None:
    with suppress(FileNotFoundError):  # another process was faster
        os.unlink(name, dir_fd=directory)
    logger.debug("removed %s from the kernel cache", name)
