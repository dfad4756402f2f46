"""A hash of the sources that machine code comes from, so that it is found without making its IR."""

from __future__ import annotations

import functools
import hashlib
import logging
import platform
from collections.abc import Sequence
from pathlib import Path

import llvmlite

import hybrid_moe.formats
from hybrid_moe.imported import IMPORTED_AT

logger = logging.getLogger(__name__)

FOLDERS = (Path(__file__).parents[1], Path(hybrid_moe.formats.__path__[0]))
"""Everything in them counts: a list of the files that matter would be wrong one day."""

_CLOCK_S = 1.0  # a file's time may lag behind the clock, by the kernel's tick


def source_key(what: str) -> str | None:
    """What determines the IR of `what`, a name that says which functions of this package make it.

    None if files have changed since the package was imported: what runs here may not be what is
    there.
    """
    digest = source_digest(FOLDERS, IMPORTED_AT - _CLOCK_S)
    return None if digest is None else f"{digest}|{what}"


def source_digest(folders: Sequence[Path], before: float) -> str | None:
    """Hash of all Python files in `folders`; None if there are none, or one has changed after
    `before` (seconds since the epoch)."""
    files = tuple(
        file
        for folder in folders
        for file in sorted(folder.rglob("*.py*"))  # also a .pyc that stands in place of its source
        if file.parent.name != "__pycache__"
    )
    if not files:
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
