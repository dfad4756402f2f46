"""Which GGUF files a model consists of.

A model lies in one file, or in several whose names say so: `x-00001-of-00003.gguf`. Each of these
says the same in `split.count` and `split.no`, and how many tensors all of them have together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.gguf.gguf_header import GgufHeader
from hybrid_moe.loaders.regular import shortened

ENDING = ".gguf"
MAX_FILES = 1000
"""Of one model; published ones have some 30."""

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_OTHER_MODELS = ("mmproj",)
"""Beginnings of names of files beside a language model: what projects images into it."""


def gguf_files(path: Path) -> tuple[Path, ...]:
    """The files of the model at `path`, a GGUF file (any one of several) or a folder of them; empty
    where a folder has none.

    Raises:
        CheckpointError: a file is missing, or a folder holds several models.
    """
    if not path.is_dir():
        return _all_parts(path)
    found = [
        file
        for file in sorted(path.glob(f"*{ENDING}"))
        if not file.name.startswith((".", *_OTHER_MODELS))
    ]
    models = {_all_parts(file) if file == _first_of(found, file) else () for file in found}
    models.discard(())
    if len(models) > 1:
        names = ", ".join(sorted(files[0].name for files in models)[:8])
        raise CheckpointError(f"{path} holds several models: give one of {names}")
    return models.pop() if models else ()


def check_split(headers: Sequence[GgufHeader]) -> None:
    """Raise `CheckpointError` unless the files are all the parts of one model, in order."""
    total = sum(len(header.tensors) for header in headers)
    for number, header in enumerate(headers):
        stated = {
            "split.count": len(headers),
            "split.no": number,
            "split.tensors.count": total,
        }
        alone = len(headers) == 1 and "split.count" not in header.metadata
        for key, expected in stated.items():
            value = header.metadata.get(key)
            if value == expected and type(value) is int:
                continue
            if value is None and (alone or key == "split.tensors.count"):
                continue
            raise CheckpointError(_difference(header, key, value, expected, len(headers)))


def _difference(header: GgufHeader, key: str, value: object, expected: int, num_files: int) -> str:
    if key == "split.count" and num_files == 1:
        return (
            f"{header.file}: it is one of {shortened(value)} files of a model, which are found by "
            "names like model-00001-of-00003.gguf: give them their names back"
        )
    if key == "split.tensors.count":
        return f"{header.file}: {key} is {shortened(value)}, but the files have {expected} tensors"
    return f"{header.file}: {key} is {shortened(value)}, but by its name it must be {expected}"


def _first_of(found: Sequence[Path], file: Path) -> Path:
    """The first of those files that belong to the same model."""
    match = _PART.fullmatch(file.name)
    if match is None:
        return file
    same = (other for other in found if _set_of(other) == (match[1], match[3]))
    return next(same)


def _set_of(file: Path) -> tuple[str, str] | None:
    match = _PART.fullmatch(file.name)
    return None if match is None else (match[1], match[3])


def _all_parts(file: Path) -> tuple[Path, ...]:
    """A file, or all the parts of the model that it is a part of."""
    match = _PART.fullmatch(file.name)
    if match is None:
        return (file,)
    number, count = int(match[2]), int(match[3])
    if not 1 <= number <= count <= MAX_FILES:
        raise CheckpointError(
            f"{file}: by its name it is number {number} of {count} files, at most {MAX_FILES} are "
            "possible, counted from 1"
        )
    parts = tuple(
        file.with_name(f"{match[1]}-{part:05d}-of-{match[3]}{ENDING}")
        for part in range(1, count + 1)
    )
    missing = next((part for part in parts if not part.is_file()), None)
    if missing is not None:
        raise CheckpointError(
            f"{missing}: this file is missing: the name of {file.name} speaks of {count} files"
        )
    return parts
