"""Opening a checkpoint's files: regular files only, and each known again by its stamp.

A file is opened first and looked at then, through its descriptor: what was checked is what is read,
and opening a pipe does not wait for its writer.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

from hybrid_moe.formats.tensors import CheckpointError

MAX_JSON_BYTES = 64 << 20
"""Largest configuration or index that is read; the largest published index has 20 MB. Python's
objects are up to 25 times as large as the text."""

MAX_KEY_LENGTH = 1024
"""Characters of a tensor's name. Published ones have at most some 150; names are in messages."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class Stamp(NamedTuple):
    """What tells one state of a file from a later one."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int


def stamp(status: os.stat_result) -> Stamp:
    """The stamp in the result of `stat`."""
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def stamp_of(file: Path) -> Stamp | None:
    """The stamp of `file`, a folder included; None where there is none."""
    try:
        return stamp(file.stat())
    except OSError:
        return None


def open_regular(file: Path) -> tuple[int, Stamp]:
    """Open `file` for reading: its descriptor, which the caller closes, and its stamp.

    Raises:
        CheckpointError: there is no such file, it is no regular file, or it cannot be opened.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        what = "no regular file" if not file.is_file() else "cannot be opened"
        raise CheckpointError(f"{file}: {what}: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{file}: no regular file")
    return descriptor, stamp(status)


def check_no_pipes(folder: Path) -> None:
    """Raise `CheckpointError` where a file in `folder` is a pipe, a socket or a device: other
    libraries open what they look for there, and would wait for ever."""
    for file in sorted(folder.iterdir()):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise CheckpointError(f"{file}: no regular file")


def check_no_pointer(start: bytes, file: Path) -> None:
    """Raise `CheckpointError` where a file that starts so is a pointer of git-lfs."""
    if start.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{file}: this is a git-lfs pointer, not the file itself: run `git lfs pull` in "
            f"{file.parent}"
        )


def read_json(file: Path) -> tuple[dict[str, Any], Stamp]:
    """The JSON object in `file`, and the file's stamp.

    Infinities are read, as Transformers writes them; NaN and a key with two values are refused.

    Raises:
        CheckpointError: no regular file, too large, or no valid JSON object; names the file.
    """
    descriptor, found = open_regular(file)
    with os.fdopen(descriptor, "rb") as stream:
        if found.nbytes > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{file}: {found.nbytes} bytes are too many for such a file, "
                f"at most {MAX_JSON_BYTES} are read"
            )
        content = stream.read(MAX_JSON_BYTES)
    check_no_pointer(content, file)
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_one_value, parse_constant=_no_nan
        )
    except RecursionError as error:
        raise CheckpointError(f"{file}: damaged: nested too deeply") from error
    except ValueError as error:  # JSON and UTF-8 errors are ValueErrors
        why: object = error
        if content.startswith(b"\xef\xbb\xbf"):
            why = "it begins with a byte order mark; save it as UTF-8 without one"
        raise CheckpointError(f"{file}: damaged: {why}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: no JSON object")
    return value, found


def _one_value(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        for key, value in pairs:
            if result[key] != value:
                raise ValueError(f"key {shortened(key)} appears twice, with different values")
    return result


def _no_nan(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no value")
    return float(name)


def shortened(value: object, limit: int = 100) -> str:
    """`repr(value)`, cut to about `limit` characters: what a file holds may be of any length."""
    if isinstance(value, (str, list, tuple)):
        value = value[: limit + 1]  # repr of the rest would cost as much as it is long
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def is_utf8(text: str) -> bool:
    """Whether `text` can be written as UTF-8: JSON's escapes can spell half of a pair, which no
    file's or tensor's name holds and no terminal prints."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
