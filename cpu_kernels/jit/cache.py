"""Content-addressed store of compiled objects on disk.

A file is SHA-256(payload) followed by the payload: a relocatable object, or the name of one (see
`jit.compile`). Nothing is unpickled. The directory is ours alone (mode 0700, owner checked),
because the objects in it are executed. Writers rename a finished temporary file over the final
name, so concurrent processes see whole files only; a file that fails its digest is rebuilt.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 32


def cache_directory() -> Path:
    """`HYBRID_MOE_CACHE_DIR`, else `$XDG_CACHE_HOME/hybrid_moe`, else `~/.cache/hybrid_moe`."""
    named = os.environ.get("HYBRID_MOE_CACHE_DIR")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hybrid_moe"


@functools.lru_cache(maxsize=8)
def _usable(directory: Path) -> bool:
    """Create and check the directory; once per directory, say why it cannot be used."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
        if status.st_uid != os.geteuid():
            raise PermissionError(f"it belongs to user {status.st_uid}")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError("others may write to it; chmod 700 it")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError("it is not writable")
    except (OSError, RuntimeError) as error:
        logger.warning(
            "compiled kernels stay in memory: the cache directory %s cannot be used (%s)",
            directory,
            error,
        )
        return False
    return True


def read(name: str) -> bytes | None:
    """The payload of the entry `name`, or None if there is none or it is damaged."""
    directory = cache_directory()
    if not _usable(directory):
        return None
    try:
        blob = (directory / name).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("cannot read the kernel cache: %s", error)
        return None
    digest, payload = blob[:_DIGEST_BYTES], blob[_DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        logger.warning("kernel cache entry %s is damaged and will be rebuilt", name)
        return None
    return payload


def write(name: str, payload: bytes) -> None:
    """Store `payload` as entry `name`; a failure is logged and costs a compilation next time."""
    directory = cache_directory()
    if not _usable(directory):
        return
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=directory, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(hashlib.sha256(payload).digest() + payload)
        temporary.replace(directory / name)
    except OSError as error:
        logger.warning("cannot write the kernel cache: %s", error)
        if temporary is not None:
            temporary.unlink(missing_ok=True)
