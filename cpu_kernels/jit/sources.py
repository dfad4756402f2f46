"""A hash of the sources that machine code comes from, so that it is found without making its IR."""

from __future__ import annotations

import functools
import hashlib
import logging
import platform
import time
from pathlib import Path

import llvmlite

import hybrid_moe.formats

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[1]
_FORMATS = Path(hybrid_moe.formats.__file__)
_LOADED_BEFORE = time.time() - 2.0
"""Modules of this package are imported together, within this time."""


def source_key(what: str) -> str | None:
    """What determines the IR of `what`, a name that says which functions of this package make it.

    None if files have changed since they were imported: what runs here is not what is there.
    """
    digest = source_digest(_PACKAGE, _FORMATS, _LOADED_BEFORE)
    return None if digest is None else f"{digest}|{what}"


@functools.lru_cache(maxsize=4)
def source_digest(package: Path, module: Path, before: float) -> str | None:
    """Hash of all Python files of a package and one more, none of them changed after `before`.

    A whole package, because a list of the files that matter would be wrong one day.
    """
    versions = f"{platform.python_version()} {llvmlite.__version__}"
    digest = hashlib.sha256(versions.encode())
    files = [*sorted(package.rglob("*.py")), module]
    for file in files:
        if not file.is_file() or file.stat().st_mtime > before:
            logger.debug("%s is new: compiled code is looked up by its IR", file)
            return None
        text = file.read_bytes()
        digest.update(f"\0{file.name} {len(text)}\0".encode() + text)
    return digest.hexdigest() if len(files) > 1 else None
