"""Strips back into rows: what `pack` did, undone, bit for bit.

Packing only moves 32-bit words, so the bytes of a checkpoint are all still there. Whoever wants an
expert in its checkpoint's layout (prefill of whole layers on a GPU) gets it from memory, and no
file is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from hybrid_moe.cpu_kernels.strips.places import PlanePlace, plane_places
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.strips import PANEL_ROWS, PANELS, STRIP_ROWS, StripLayout
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.formats.weight_format import GROUP, Plane, WeightFormat

RunAll = Callable[[Callable[[slice], None], Iterable[slice]], Iterable[Any]]
"""`map`, or that of an executor: copies need no GIL, so threads share them."""

_STRIPS_PER_COPY = 2  # of 70 to 140 KB each at a model's sizes
_HALF = PANELS // 2


def unpack_gate_up(
    strips: Array, layout: StripLayout, fmt: WeightFormat, rows: int, run_all: RunAll
) -> tuple[Matrix, Matrix]:
    """The gate and up matrices in strips uint8 [S, layout.nbytes], without biases."""
    planes = _panels(strips, layout, fmt, run_all)
    gate, up = (
        _matrix({name: plane[:, half] for name, plane in planes.items()}, fmt, rows)
        for half in (slice(0, _HALF), slice(_HALF, PANELS))
    )
    return gate, up


def unpack_rows(
    strips: Array, layout: StripLayout, fmt: WeightFormat, rows: int, run_all: RunAll
) -> Matrix:
    """The matrix in strips uint8 [S, layout.nbytes], without its bias."""
    return _matrix(_panels(strips, layout, fmt, run_all), fmt, rows)


def unpack_some(
    strips: Array, layout: StripLayout, fmt: WeightFormat, rows: npt.NDArray[np.int64]
) -> Matrix:
    """Some rows of the matrix in strips uint8 [S, layout.nbytes], in any order, also repeatedly.

    Raises:
        NotImplementedError: rows of the format share their scales.
    """
    if fmt.scale_rows > 1:
        raise NotImplementedError(f"single rows of {fmt.name} have no scales of their own")
    strip, lane = np.divmod(rows, STRIP_ROWS)
    found: dict[str, Any] = {}
    for place in plane_places(layout):
        parts = [
            # one index of axis 0 and one of the last for each row: [rows, blocks, units, elements]
            _view(strips, place, block, blocks, units)[strip, :, :, :, lane].reshape(
                len(rows), blocks * units * place.count
            )
            for block, blocks, units in _runs(place)
        ]
        found[place.name] = _stored(np.concatenate(parts, axis=-1), layout, fmt, place.name)
    return Matrix(**found)


def _plane(fmt: WeightFormat, name: str) -> Plane:
    plane = fmt.plane(name)
    assert plane is not None
    return plane


def _runs(place: PlanePlace) -> list[tuple[int, int, int]]:
    """(first block, blocks, units of each): all whole blocks, then the last one if it is short."""
    whole, rest = divmod(place.units, place.block_units)
    runs = [(0, whole, place.block_units)] if whole else []
    return runs + ([(whole, 1, rest)] if rest else [])


def _view(strips: Array, place: PlanePlace, block: int, blocks: int, units: int) -> Array:
    """Some blocks of a plane where they lie: [S, blocks, units, elements, rows], in integers of its
    element's size."""
    kind = np.dtype(f"u{place.itemsize}")
    element = place.places * place.itemsize
    steps = (strips.strides[0], place.block_bytes, place.unit_bytes, element)
    begin = place.offset + block * place.block_bytes
    return as_strided(
        strips[:, begin : begin + place.itemsize].view(kind),
        (len(strips), blocks, units, place.count, place.places),
        (*steps, place.itemsize),
    )


def _stored(values: Array, layout: StripLayout, fmt: WeightFormat, name: str) -> Array:
    """Elements [..., those that a strip has room for] -> [..., those of a row] in the plane's
    dtype."""
    kind = _plane(fmt, name).dtype
    found = np.ascontiguousarray(values).view(kind)
    _, elements = _plane(fmt, name).shape(1, GROUP * layout.groups)
    return found[..., :elements]


def _panels(
    strips: Array, layout: StripLayout, fmt: WeightFormat, run_all: RunAll
) -> dict[str, Array]:
    """Each plane as [S, 4, 16, elements], or [S, 4, 1, elements] where rows share it."""
    found = {}
    for place in plane_places(layout):
        shape = (len(strips), place.places, place.elements)
        out = np.empty(shape, np.dtype(f"u{place.itemsize}"))

        def copy(part: slice, place: PlanePlace = place, out: Array = out) -> None:
            for block, blocks, units in _runs(place):
                values = _view(strips[part], place, block, blocks, units)
                first = block * place.block_units * place.count
                to = out[part][..., first : first + blocks * units * place.count]
                to[...] = values.transpose(0, 4, 1, 2, 3).reshape(to.shape)

        list(
            run_all(
                copy,
                [
                    slice(at, at + _STRIPS_PER_COPY)
                    for at in range(0, len(strips), _STRIPS_PER_COPY)
                ],
            )
        )
        values = _stored(out, layout, fmt, place.name)
        found[place.name] = values.reshape(len(strips), PANELS, place.places // PANELS, -1)
    return found


def _matrix(planes: dict[str, Array], fmt: WeightFormat, rows: int) -> Matrix:
    """Axes before the last are rows; those past `rows` are padding."""
    found: dict[str, Any] = {}
    for name, plane in planes.items():
        each = _plane(fmt, name).rows
        lines = plane.reshape(-1, plane.shape[-1])
        if each > 1:  # all panels of a block of rows say the same
            lines = lines[:: each // PANEL_ROWS]
        found[name] = lines[: -(-rows // each)]
    return Matrix(**found, scale_rows=fmt.scale_rows)
