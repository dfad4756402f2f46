"""Packing one expert's matrices into strips. Compiled, and free of the GIL while it runs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.formats.strips import STRIP_ROWS, StripLayout
from hybrid_moe.formats.table import Array
from hybrid_moe.formats.tensors import Matrix


@functools.lru_cache(maxsize=1)
def _pack_strips() -> Callable[..., int]:
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 15)
    return kind(drivers.addresses()["pack_strips"])


def _rows(array: Array) -> Array:
    """`array` with its last axis contiguous; rows may be any distance apart."""
    return array if array.strides[-1] == array.itemsize else np.ascontiguousarray(array)


def _pack(
    out: int, strips: range, layout: StripLayout, first: Matrix, second: Matrix | None, rows: int
) -> None:
    codes0 = _rows(first.codes)
    codes1 = codes0 if second is None else _rows(second.codes)
    if codes1.strides[0] != codes0.strides[0]:
        codes0, codes1 = np.ascontiguousarray(codes0), np.ascontiguousarray(codes1)
    scales_at0 = scales_at1 = scale_stride = 0
    if first.scales is not None:
        scales0 = np.ascontiguousarray(first.scales)
        other = first if second is None else second
        assert other.scales is not None
        scales1 = scales0 if second is None else np.ascontiguousarray(other.scales)
        scales_at0, scales_at1 = scales0.ctypes.data, scales1.ctypes.data
        scale_stride = scales0.strides[0]
    _pack_strips()(
        out,
        strips.start,
        strips.stop,
        layout.groups,
        layout.words,
        layout.scales,
        layout.scale_bytes,
        codes0.ctypes.data,
        codes1.ctypes.data,
        codes0.strides[0],
        scales_at0,
        scales_at1,
        scale_stride,
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
