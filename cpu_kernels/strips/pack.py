"""Packing one expert's matrices into strips. Compiled, and free of the GIL while it runs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.formats.strips import PANEL_ROWS, STRIP_ROWS, StripLayout
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
    stride = codes0.strides[0]
    at0, at1 = codes0.ctypes.data, codes1.ctypes.data
    scales_at0 = scales_at1 = scale_stride = scales_per_row = 0
    if first.scales is not None:
        scales0 = np.ascontiguousarray(first.scales)
        other = first if second is None else second
        assert other.scales is not None
        scales1 = scales0 if second is None else np.ascontiguousarray(other.scales)
        scales_at0, scales_at1 = scales0.ctypes.data, scales1.ctypes.data
        scale_stride, scales_per_row = scales0.strides[0], scales0.shape[1]
    if second is None:  # panel 1 is the next 16 rows of the same matrix
        at1 += PANEL_ROWS * stride
        scales_at1 += PANEL_ROWS * scale_stride
    _pack_strips()(
        out,
        strips.start,
        strips.stop,
        layout.nbytes,
        layout.scale_offset,
        layout.words,
        scales_per_row,
        at0,
        at1,
        stride,
        scales_at0,
        scales_at1,
        scale_stride,
        PANEL_ROWS if second is not None else STRIP_ROWS,
        rows,
    )


def pack_gate_up(
    out: int, strips: range, layout: StripLayout, gate: Matrix, up: Matrix, rows: int
) -> None:
    """Pack strips of 16 gate rows and 16 up rows to the address `out`."""
    _pack(out, strips, layout, gate, up, rows)


def pack_rows(out: int, strips: range, layout: StripLayout, matrix: Matrix, rows: int) -> None:
    """Pack strips of 32 rows to the address `out`."""
    _pack(out, strips, layout, matrix, None, rows)


@functools.lru_cache(maxsize=1)
def _publish_word() -> Callable[..., int]:
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    return kind(drivers.addresses()["publish_word"])


def publish_address(table: npt.NDArray[np.int64], address: int) -> None:
    """Store `address` in the table's first entry: whoever reads it there sees all that was written
    before."""
    _publish_word()(table.ctypes.data, address)
