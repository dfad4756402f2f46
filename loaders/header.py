"""The header of a safetensors file: parsed and checked before a byte of data is read.

A file is an 8-byte little-endian length, that many bytes of JSON, then the data. Tensors must fill
the data without holes or overlaps, so that every byte of the file is accounted for and a truncated
file is found when it is opened, not when its last tensor is read.

Source: the format description of https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.header_text import walk
from hybrid_moe.loaders.regular import Stamp, check_no_pointer, open_regular, shortened
from hybrid_moe.locks import ProcessLock

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; it also bounds what a damaged length can make a reader allocate."""

MAX_AXES = 8
"""Axes of a tensor; published ones have at most five."""

MAX_TENSOR_BITS = 1 << 63
"""Bits of a tensor, counted without axes of length 0: NumPy takes no larger shape."""

_LARGE_HEADER = 4 << 20
_one_large_header = ProcessLock()
"""Held while a large header is parsed: memory is that of one, however many threads scan."""


@dataclass(frozen=True)
class StorageType:
    """One dtype of safetensors: the bits of an element, and the NumPy dtype of its raw view."""

    bits: int
    raw: np.dtype[Any]


def _row(bits: int, raw: str) -> StorageType:
    return StorageType(bits, np.dtype(raw))


STORAGE_TYPES: Mapping[str, StorageType] = MappingProxyType(
    {
        "BOOL": _row(8, "?"),
        "U8": _row(8, "u1"),
        "I8": _row(8, "i1"),
        "F4": _row(4, "u1"),
        "F6_E2M3": _row(6, "u1"),
        "F6_E3M2": _row(6, "u1"),
        "F8_E5M2": _row(8, "u1"),
        "F8_E4M3": _row(8, "u1"),
        "F8_E8M0": _row(8, "u1"),
        "F8_E4M3FNUZ": _row(8, "u1"),
        "F8_E5M2FNUZ": _row(8, "u1"),
        "U16": _row(16, "<u2"),
        "I16": _row(16, "<i2"),
        "F16": _row(16, "<f2"),
        "BF16": _row(16, "<u2"),
        "U32": _row(32, "<u4"),
        "I32": _row(32, "<i4"),
        "F32": _row(32, "<f4"),
        "U64": _row(64, "<u8"),
        "I64": _row(64, "<i8"),
        "F64": _row(64, "<f8"),
        "C64": _row(64, "<c8"),
    }
)
"""Every dtype a header may name. NumPy has no bfloat16, 8-bit or smaller floats: raw bits then."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        key: name of the tensor.
        dtype: dtype as the header names it, such as "BF16" or "F8_E8M0".
        shape: shape as the header gives it; elements, also where several share a byte (F4).
        file: the shard that holds it.
        offset: bytes from the start of the file.
        nbytes: its size in bytes.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def raw_dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the raw view."""
        return STORAGE_TYPES[self.dtype].raw

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Shape of the raw view: elements smaller than a byte are counted in bytes."""
        bits = STORAGE_TYPES[self.dtype].bits
        if bits >= 8:
            return self.shape
        return (*self.shape[:-1], self.shape[-1] * bits // 8)

    @property
    def where(self) -> str:
        """Key and file, for messages."""
        return f"{self.key} in {self.file}"


def read_header(file: Path) -> tuple[list[TensorInfo], Stamp]:
    """The tensors of one safetensors file, in the order of their data, and the file's stamp.

    Raises:
        CheckpointError: no regular file, or it is truncated, or its header is not a valid one.
    """
    descriptor, found = open_regular(file)
    with os.fdopen(descriptor, "rb") as stream:
        return read_tensors(stream, found.nbytes, file), found


def read_tensors(stream: BinaryIO, size: int, file: Path) -> list[TensorInfo]:
    """As `read_header`, from an open file of `size` bytes; `file` is its name in messages."""
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{file}: {size} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or 8 + length > size:
        check_no_pointer(prefix + stream.read(100), file)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file}: a header of {length} bytes exceeds the format's limit of "
            f"{MAX_HEADER_BYTES}; this is no safetensors file, or it is damaged"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{file}: truncated: the header should end at byte {8 + length}, the file has {size}"
        )
    with _one_large_header if length > _LARGE_HEADER else nullcontext():
        try:
            return _parse(stream.read(length), 8 + length, size, file)
        except CheckpointError as error:
            problem = str(error)
    # raised anew: an exception keeps the frames that it came through, and they the header's text
    raise CheckpointError(problem)


def _parse(content: bytes, data_start: int, size: int, file: Path) -> list[TensorInfo]:
    tensors: list[TensorInfo] = []
    try:
        walk(
            content.decode("utf-8"),
            lambda key, entry: tensors.append(_tensor_info(key, entry, file, data_start, size)),
        )
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise CheckpointError(f"{file}: the safetensors header is damaged: {error}") from error
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_contiguous(tensors, file, data_start, size)
    return tensors


def _tensor_info(key: str, entry: Any, file: Path, data_start: int, size: int) -> TensorInfo:
    where = f"{key} in {file}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: the header's entry is no JSON object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in STORAGE_TYPES:
        raise CheckpointError(
            f"{where}: unknown dtype {shortened(dtype)}, known are {', '.join(STORAGE_TYPES)}"
        )
    shape = _sizes(entry.get("shape"))
    if shape is None:
        raise CheckpointError(f"{where}: shape {shortened(entry.get('shape'))} is no list of sizes")
    if len(shape) > MAX_AXES:
        raise CheckpointError(f"{where}: {len(shape)} axes, at most {MAX_AXES} are read")
    offsets = _sizes(entry.get("data_offsets"))
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: data_offsets {shortened(entry.get('data_offsets'))} are no [begin, end]"
        )
    if len(entry) > 3:
        unknown = next(name for name in entry if name not in ("dtype", "shape", "data_offsets"))
        raise CheckpointError(f"{where}: the header's entry has an unknown field {unknown!r}")
    begin, end = offsets
    if data_start + end > size:
        raise CheckpointError(
            f"{where}: truncated: its data should end at byte {data_start + end}, "
            f"the file has {size}"
        )
    bits = STORAGE_TYPES[dtype].bits
    if math.prod(filter(None, shape)) * bits > MAX_TENSOR_BITS:
        raise CheckpointError(f"{where}: no tensor of dtype {dtype} has the shape {shape}")
    if 8 * (end - begin) != math.prod(shape) * bits:
        raise CheckpointError(
            f"{where}: {end - begin} bytes of data do not fit dtype {dtype} and shape {shape}"
        )
    if bits < 8 and shape[-1] * bits % 8:
        raise CheckpointError(f"{where}: rows of shape {shape} and dtype {dtype} end within a byte")
    return TensorInfo(key, dtype, shape, file, data_start + begin, end - begin)


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A list of non-negative integers (JSON's true and 1.0 are none), else None."""
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return tuple(value)
    return None


def _check_contiguous(tensors: list[TensorInfo], file: Path, data_start: int, size: int) -> None:
    end = data_start
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else "follows a hole"
            raise CheckpointError(f"{tensor.where}: its data at byte {tensor.offset} {what}")
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(
            f"{file}: {size - end} bytes after the last tensor belong to no tensor"
        )
