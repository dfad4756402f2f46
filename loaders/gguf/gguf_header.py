"""The header of a GGUF file: parsed and checked before a byte of data is read.

A file is the magic, a version, two counts, that many keys with values, that many tensors (name,
dimensions, type, offset), padding, and the tensors' data. All of it comes from whoever made the
file. Numbers here are Python's, which do not wrap; a length is compared with what is left of the
file before anything of that length is read; values that nothing needs (a vocabulary) are walked
over and not kept.

What is accepted, the `gguf` library reads with the same values. These rules are stricter than it:

* little-endian files alone;
* a header of at most 100 MB, 65,536 keys and as many tensors;
* keys of at most 65,535 bytes, names of tensors of at most 1,024, both not empty;
* no arrays in arrays (llama.cpp has none either); a bool is 0 or 1;
* tensors of one to four axes, none of them of length 0, whose rows are whole blocks;
* an alignment of at most 1 MiB;
* a tensor's data is within the file, begins at the alignment, and overlaps no other's; between two
  tensors, and behind the last, there is nothing but padding.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and `gguf.cpp` of llama.cpp.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_moe.formats.strips import round_up
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.gguf.ggml_types import GGML_TYPES, REMOVED, TYPES_BY_NAME
from hybrid_moe.loaders.gguf.header_bytes import UINT32, HeaderBytes, Value
from hybrid_moe.loaders.header import TensorInfo
from hybrid_moe.loaders.regular import (
    MAX_KEY_LENGTH,
    Stamp,
    check_no_pointer,
    open_regular,
    shortened,
)

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_COUNT = 1 << 16
"""Keys, and tensors, of a file; published ones have some 60 and 2,000."""
MAX_AXES = 4
ALIGNMENT = 32
"""Of the data, where `general.alignment` does not say."""
MAX_ALIGNMENT = 1 << 20
_ALIGNMENT_KEY = "general.alignment"
_KEY_BYTES = (1 << 16) - 1
_SMALLEST_VALUE = 13  # bytes: length of the key, type, a byte
_SMALLEST_TENSOR = 24  # bytes: length of the name, number of axes, type, offset
_U32 = 4


@dataclass(frozen=True, slots=True)
class BlockTensor(TensorInfo):
    """Where a GGUF file's tensor lies. `dtype` is the name of its ggml type, and `shape` has the
    outermost axis first, the other way round than in the file.

    Attributes:
        stored_name: name in the file; `key` is what the rest of the package knows it by.
    """

    stored_name: str

    @property
    def raw_dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the raw view: bytes, where there are blocks."""
        return TYPES_BY_NAME[self.dtype].raw

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Shape of the raw view: rows of blocks are counted in bytes."""
        kind = TYPES_BY_NAME[self.dtype]
        if kind.weights == 1:
            return self.shape
        return (*self.shape[:-1], self.shape[-1] // kind.weights * kind.nbytes)

    @property
    def where(self) -> str:
        """Name and file, for messages."""
        return f"{self.stored_name} in {self.file}"


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself.

    Attributes:
        file: its name.
        metadata: values by key.
        tensors: in the order of their data.
        stamp: of the file when it was read.
    """

    file: Path
    metadata: Mapping[str, Value]
    tensors: tuple[BlockTensor, ...]
    stamp: Stamp


def read_gguf_header(file: Path) -> GgufHeader:
    """Parse and check the header of `file`.

    Raises:
        CheckpointError: no regular file, or a header that is truncated or breaks a rule; names the
            file, and the key or tensor.
    """
    descriptor, stamp = open_regular(file)
    try:
        source = HeaderBytes(descriptor, stamp.nbytes, file)
        metadata, tensors = _parse(source)
    finally:
        os.close(descriptor)
    return GgufHeader(file, metadata, tensors, stamp)


def _parse(source: HeaderBytes) -> tuple[dict[str, Value], tuple[BlockTensor, ...]]:
    _check_version(source)
    num_tensors = source.count("tensors", MAX_COUNT, _SMALLEST_TENSOR)
    num_keys = source.count("keys", MAX_COUNT, _SMALLEST_VALUE)
    metadata: dict[str, Value] = {}
    for number in range(num_keys):
        key = source.text(f"key {number}", _KEY_BYTES)
        if not key or key in metadata:
            what = "appears twice" if key else f"number {number} is empty"
            raise CheckpointError(f"{source.file}: key {shortened(key)} {what}")
        if key == _ALIGNMENT_KEY:
            source.check_kind(key, UINT32)
        metadata[key] = source.value(key if len(key) < 200 else shortened(key))
    alignment = _alignment(metadata, source.file)
    stated: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for number in range(num_tensors):
        name = source.text(f"name of tensor {number}", MAX_KEY_LENGTH)
        if not name or name in stated:
            what = "appears twice" if name else f"number {number} has no name"
            raise CheckpointError(f"{source.file}: tensor {shortened(name)} {what}")
        stated[name] = source.tensor(name, MAX_AXES)
    start = round_up(source.position, alignment)
    tensors = [
        _tensor(name, *entry, start, alignment, source.size, source.file)
        for name, entry in stated.items()
    ]
    tensors.sort(key=lambda tensor: tensor.offset)
    _check_contiguous(tensors, source, start, alignment)
    return metadata, tuple(tensors)


def _check_version(source: HeaderBytes) -> None:
    """The magic and the version."""
    file = source.file
    start = source.take(min(len(MAGIC), source.size), "magic")
    if start != MAGIC:
        check_no_pointer(start + source.take(min(100, source.size - len(start)), "text"), file)
        raise CheckpointError(f"{file}: no GGUF file: it begins with {start!r}, not {MAGIC!r}")
    version = source.integer(_U32, "version")
    if version in VERSIONS:
        return
    if version and version & 0xFFFF == 0:
        raise CheckpointError(
            f"{file}: a big-endian GGUF file, which is not read: convert it with gguf-py's "
            "gguf_convert_endian"
        )
    raise CheckpointError(
        f"{file}: version {version} of GGUF, versions {' and '.join(map(str, VERSIONS))} are read"
    )


def _alignment(metadata: Mapping[str, Value], file: Path) -> int:
    value = metadata.get(_ALIGNMENT_KEY, ALIGNMENT)
    good = type(value) is int and 0 < value <= MAX_ALIGNMENT and value & (value - 1) == 0
    if not good:
        raise CheckpointError(
            f"{file}: general.alignment is {shortened(value)}, must be a power of two up to "
            f"{MAX_ALIGNMENT}"
        )
    assert isinstance(value, int)
    return value


def _tensor(
    name: str,
    shape: tuple[int, ...],
    number: int,
    offset: int,
    start: int,
    alignment: int,
    size: int,
    file: Path,
) -> BlockTensor:
    """Check what the header says of a tensor, and find its bytes."""
    where = f"{name} in {file}"
    kind = GGML_TYPES.get(number)
    if kind is None:
        what = "was removed from ggml" if number in REMOVED else "is not known"
        known = ", ".join(t.name for t in GGML_TYPES.values())
        raise CheckpointError(f"{where}: ggml type {number} {what}, known are {known}")
    if not 1 <= len(shape) <= MAX_AXES or 0 in shape:
        raise CheckpointError(
            f"{where}: shape {shape}, must have one to {MAX_AXES} axes and none of length 0"
        )
    if shape[-1] % kind.weights:
        raise CheckpointError(
            f"{where}: rows of {shape[-1]} weights are no whole blocks of {kind.weights}, as "
            f"{kind.name} has them"
        )
    nbytes = math.prod(shape) // kind.weights * kind.nbytes
    if offset % alignment:
        raise CheckpointError(
            f"{where}: its data at offset {offset} is not aligned to {alignment} bytes"
        )
    if start + offset + nbytes > size:
        raise CheckpointError(
            f"{where}: truncated: its data should end at byte {start + offset + nbytes}, the file "
            f"has {size}"
        )
    return BlockTensor(name, kind.name, shape, file, start + offset, nbytes, name)


def _check_contiguous(
    tensors: list[BlockTensor], source: HeaderBytes, start: int, alignment: int
) -> None:
    end = start if tensors else source.position
    for tensor in tensors:
        if tensor.offset != round_up(end, alignment):
            what = "overlaps the tensor before it" if tensor.offset < end else "follows a hole"
            raise CheckpointError(f"{tensor.where}: its data at byte {tensor.offset} {what}")
        end = tensor.offset + tensor.nbytes
    if source.size > round_up(end, alignment):
        raise CheckpointError(
            f"{source.file}: {source.size - end} bytes behind the last tensor belong to no tensor"
        )
