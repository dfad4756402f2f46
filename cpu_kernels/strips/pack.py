"""Packing one expert's matrices into strips. Compiled, and free of the GIL while it runs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.dsl.tiers import best_tier
from hybrid_moe.cpu_kernels.kernels.library import compile_kernels
from hybrid_moe.cpu_kernels.kernels.pack_tiles import NARROW, pack_one_by_one, pack_tiles
from hybrid_moe.cpu_kernels.strips.places import PlanePlace, element_offsets, plane_places
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.strips import LINE, STRIP_ROWS, StripLayout
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.locks import ProcessLock

_ONE_BY_ONE = 0
_ARITIES = {LINE: 6, NARROW: 6, _ONE_BY_ONE: 7}
"""Bytes of a row that a kernel takes at a time -> the number of its parameters."""


# Threads that load experts need the same kernels at the same time; once is enough.
_once = ProcessLock()


def _kernel(itemsize: int, width: int) -> Callable[..., None]:
    """The kernel for elements of so many bytes that takes so many bytes of a row at a time."""
    with _once:
        return _compiled(itemsize, width)


@functools.cache
def _compiled(itemsize: int, width: int) -> Callable[..., None]:
    """For this processor, whatever tier computes: bytes are moved, and nothing else."""
    tier, arity = best_tier(), _ARITIES[width]
    body = pack_tiles(itemsize, width) if width else pack_one_by_one(itemsize)
    label = f"pack{itemsize}_{width}_{tier.name}"
    address = compile_kernels([("pack", arity, body)], tier, label)["pack"]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arity)(address)


def _rows(array: Array) -> Array:
    """`array` with its last axis contiguous; rows may be any distance apart."""
    return array if array.strides[-1] == array.itemsize else np.ascontiguousarray(array)


def _whole(array: Array, place: PlanePlace) -> Array:
    """Rows with all elements that the strip has places for: the last block may be short (zeros)."""
    missing = place.elements * place.itemsize - array.shape[1] * array.itemsize
    return np.pad(array, ((0, 0), (0, missing // array.itemsize))) if missing else array


def _row_numbers(strips: range, halves: int, places: int) -> npt.NDArray[np.int64]:
    """int64 [strips, places]: the row of its matrix that is in each place of each strip; of a panel
    the first one. A strip takes 64 rows of one matrix, or the same 32 of two (`halves`)."""
    each = STRIP_ROWS // halves
    lanes = np.arange(0, STRIP_ROWS, STRIP_ROWS // places) % each
    return np.arange(strips.start, strips.stop)[:, None] * each + lanes


def _pack_plane(
    out: int,
    strips: range,
    layout: StripLayout,
    place: PlanePlace,
    planes: list[Array],
    rows: int,
    shared: int,
) -> None:
    """Pack a plane of one matrix, or of two side by side, of which `shared` rows share an element.
    A place of a row at or past `rows` gets zeroes."""
    numbers = _row_numbers(strips, len(planes), place.places)
    each = numbers.reshape(len(strips), len(planes), -1)  # of a strip, the rows of each matrix
    addresses = np.empty_like(each)
    for half, plane in enumerate(planes):
        addresses[:, half] = plane.ctypes.data + each[:, half] // shared * plane.strides[0]
    if numbers.max() >= rows:
        nothing = np.zeros(place.elements * place.itemsize, np.uint8)
        addresses[each >= rows] = nothing.ctypes.data
    nbytes = place.elements * place.itemsize
    width = next((w for w in (LINE, NARROW) if nbytes >= w), _ONE_BY_ONE)
    if place.places != STRIP_ROWS:
        width = _ONE_BY_ONE
    offsets = element_offsets(place)
    given = [out, layout.nbytes, len(strips), addresses.ctypes.data, offsets.ctypes.data]
    more = () if width else (place.places,)
    _kernel(place.itemsize, width)(*given, place.elements, *more)


def _pack(
    out: int, strips: range, layout: StripLayout, matrices: tuple[Matrix, ...], rows: int
) -> None:
    if not strips:
        return
    if out % LINE:
        raise ValueError(f"strips begin a cache line of {LINE} bytes, not at address {out:#x}")
    for place in plane_places(layout):
        planes = [_whole(_rows(getattr(matrix, place.name)), place) for matrix in matrices]
        shared = matrices[0].scale_rows if place.name == "scales" else 1
        _pack_plane(out, strips, layout, place, planes, rows, shared)


def pack_gate_up(
    out: int, strips: range, layout: StripLayout, gate: Matrix, up: Matrix, rows: int
) -> None:
    """Pack strips of 32 gate rows and the same 32 up rows to `out`, an address of a cache line."""
    _pack(out, strips, layout, (gate, up), rows)


def pack_rows(out: int, strips: range, layout: StripLayout, matrix: Matrix, rows: int) -> None:
    """Pack strips of 64 rows to `out`, an address of a cache line."""
    _pack(out, strips, layout, (matrix,), rows)


@functools.lru_cache(maxsize=1)
def _publish_word() -> Callable[..., int]:
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    return kind(drivers.addresses()["publish_word"])


def publish_address(table: npt.NDArray[np.int64], address: int) -> None:
    """Store `address` in the table's first entry. A thread that reads it there sees everything that
    was written before."""
    _publish_word()(table.ctypes.data, address)
