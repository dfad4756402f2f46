"""A hash of the sources that machine code comes from, so that it is found without making its IR."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import time
from pathlib import Path

import llvmlite

import hybrid_moe.formats

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[1]
_FORMATS = tuple(Path(hybrid_moe.formats.__path__[0]).glob("*.py"))
_START_FIELD = 19  # of /proc/PID/stat behind the name, in clock ticks since the system started


def process_start() -> float:
    """When this process started, in seconds since the epoch; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[_START_FIELD]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):  # hidden, of another form, or no such constant
        return 0.0
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks)


_BEFORE = process_start() - 1.0  # clocks are coarse
"""Whatever is imported was read later than this."""


def source_key(what: str) -> str | None:
    """What determines the IR of `what`, a name that says which functions of this package make it.

    None if files have changed since the process started: what runs here may not be what is there.
    """
    digest = source_digest(_PACKAGE, _FORMATS, _BEFORE)
    return None if digest is None else f"{digest}|{what}"


def source_digest(package: Path, modules: tuple[Path, ...], before: float) -> str | None:
    """Hash of all Python files of a package and some more, none of them changed after `before`.
    Compiled ones that stand in place of their sources count, those of `__pycache__` do not.

    A whole package, because a list of the files that matter would be wrong one day.
    """
    sources = [*package.rglob("*.py"), *package.rglob("*.pyc")]
    files = *sorted(f for f in sources if f.parent.name != "__pycache__"), *sorted(modules)
    if len(files) == len(modules) or not all(file.is_file() for file in files):
        return None
    digest = _content_digest(files)
    for file in files:  # once they are read; by ctime, since copies and installers set mtime
        if file.stat().st_ctime > before:
            logger.debug("%s is new: compiled code is looked up by its IR", file)
            return None
    return digest


@functools.lru_cache(maxsize=4)
def _content_digest(files: tuple[Path, ...]) -> str:
    versions = f"{platform.python_version()} {llvmlite.__version__}"
    digest = hashlib.sha256(versions.encode())
    for file in files:
        text = file.read_bytes()
        digest.update(f"\0{file.name} {len(text)}\0".encode() + text)
    return digest.hexdigest()
