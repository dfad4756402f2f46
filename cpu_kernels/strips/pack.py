"""Packing one expert's matrices into strips. Compiled, and free of the GIL while it runs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.strips import STRIP_ROWS, StripLayout
from hybrid_moe.formats.tensors import Matrix

_PARAMETERS = 16


@functools.lru_cache(maxsize=1)
def _pack_plane() -> Callable[..., int]:
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * _PARAMETERS)
    return kind(drivers.addresses()["pack_plane"])


@dataclass(frozen=True)
class PlanePlace:
    """Where a plane lies in a strip: units, each so many elements of all rows.

    Attributes:
        name: of the plane.
        offset: from the strip to the first unit.
        units: of a row.
        unit_bytes: from one unit of a block to the next.
        block_units: units of a block.
        block_bytes: from one block to the next.
        count: elements of a unit.
        itemsize: bytes of an element.
    """

    name: str
    offset: int
    units: int
    unit_bytes: int
    block_units: int
    block_bytes: int
    count: int
    itemsize: int


def plane_places(layout: StripLayout) -> Iterator[PlanePlace]:
    """The planes of a strip."""
    groups, n = layout.groups, layout.block_groups
    for name, offset, words in (
        ("codes", layout.codes_at(0), layout.words),
        ("high", layout.codes_at(0) + layout.high_offset, layout.high_words),
    ):
        if words:
            yield PlanePlace(
                name, offset, groups, layout.code_bytes, n, layout.block_bytes, words, 4
            )
    for field in layout.fields:
        at = layout.fields_at(0) + field.offset
        yield PlanePlace(
            field.name, at, layout.blocks, 0, 1, layout.block_bytes, field.count, field.itemsize
        )
    for field in layout.row_fields:
        yield PlanePlace(field.name, field.offset, 1, 0, 1, 0, field.count, field.itemsize)


def _rows(array: Array) -> Array:
    """`array` with its last axis contiguous; rows may be any distance apart."""
    return array if array.strides[-1] == array.itemsize else np.ascontiguousarray(array)


def _whole(array: Array, place: PlanePlace) -> Array:
    """Rows with all elements that the strip has places for: the last block may be short (zeros)."""
    missing = place.units * place.count * place.itemsize - array.shape[1] * array.itemsize
    return np.pad(array, ((0, 0), (0, missing // array.itemsize))) if missing else array


def _pack(
    out: int, strips: range, layout: StripLayout, first: Matrix, second: Matrix | None, rows: int
) -> None:
    for place in plane_places(layout):
        rows0 = _whole(_rows(getattr(first, place.name)), place)
        rows1 = rows0
        if second is not None:
            rows1 = _whole(_rows(getattr(second, place.name)), place)
            if rows1.strides[0] != rows0.strides[0]:
                rows0, rows1 = np.ascontiguousarray(rows0), np.ascontiguousarray(rows1)
        _pack_plane()(
            out + place.offset,
            strips.start,
            strips.stop,
            layout.nbytes,
            place.units,
            place.unit_bytes,
            place.block_units,
            place.block_bytes,
            place.count,
            place.itemsize,
            rows0.ctypes.data,
            rows1.ctypes.data,
            rows0.strides[0],
            first.scale_rows if place.name == "scales" else 1,
            STRIP_ROWS // 2 if second is None else 0,
            rows,
        )


def pack_gate_up(
    out: int, strips: range, layout: StripLayout, gate: Matrix, up: Matrix, rows: int
) -> None:
    """Pack strips of 32 gate rows and the same 32 up rows to the address `out`."""
    _pack(out, strips, layout, gate, up, rows)


def pack_rows(out: int, strips: range, layout: StripLayout, matrix: Matrix, rows: int) -> None:
    """Pack strips of 64 rows to the address `out`."""
    _pack(out, strips, layout, matrix, None, rows)


@functools.lru_cache(maxsize=1)
def _publish_word() -> Callable[..., int]:
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    return kind(drivers.addresses()["publish_word"])


def publish_address(table: npt.NDArray[np.int64], address: int) -> None:
    """Store `address` in the table's first entry. A thread that reads it there sees everything that
    was written before."""
    _publish_word()(table.ctypes.data, address)
