"""Packing against the layout as `formats.strips` describes it, element by element in NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.kernels.pack_tiles import NARROW, pack_one_by_one, pack_tiles
from hybrid_moe.cpu_kernels.strips.pack import pack_gate_up, pack_rows
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.strips import LINE, PANEL_ROWS, STRIP_ROWS, StripLayout, strip_layout
from hybrid_moe.formats.table import FORMATS
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.formats.weight_format import WeightFormat
from tests.cpu_kernels.emulation import RUNNABLE
from tests.cpu_kernels.toolbox import aligned, before_a_guard, compile_kernel
from tests.formats import random_matrix

Formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
UNTOUCHED = 0xEE


def elements(layout: StripLayout) -> Iterator[tuple[int, str, int, int, bool]]:
    """Of every element of a strip: offset, plane, number in a row, bytes, shared by a panel."""
    for group in range(layout.groups):
        at = layout.codes_at(group)
        for plane, words in (("codes", layout.words), ("high", layout.high_words)):
            for i in range(words):
                yield at, plane, group * words + i, 4, False
                at += 4 * STRIP_ROWS
    begins = [(layout.fields_at(block), block, layout.fields) for block in range(layout.blocks)]
    for begin, block, fields in [(0, 0, layout.row_fields), *begins]:
        for field in fields:
            for i in range(field.count):
                at = begin + field.offset + i * field.element_bytes
                yield at, field.name, block * field.count + i, field.itemsize, field.shared


def expected_strip(layout: StripLayout, of_lanes: list[tuple[Matrix, int] | None]) -> Array:
    """uint8 [nbytes] of one strip, of which each lane is a row of a matrix, or None. Bytes that
    nothing lies in are UNTOUCHED."""
    strip = np.full(layout.nbytes, UNTOUCHED, np.uint8)
    for at, plane, element, size, shared in elements(layout):
        for place, source in enumerate(of_lanes[::PANEL_ROWS] if shared else of_lanes):
            value = b""
            if source is not None:
                matrix, row = source
                line = matrix.planes[plane][row // (matrix.scale_rows if shared else 1)]
                value = line.tobytes()[element * size : (element + 1) * size]
            here = strip[at + place * size : at + (place + 1) * size]
            here[:] = np.frombuffer(value.ljust(size, b"\0"), np.uint8)
    return strip


def strided(matrix: Matrix, rng: np.random.Generator) -> Matrix:
    """The same, every plane as every second row of a larger array that begins anywhere."""
    planes = {}
    for name, plane in matrix.planes.items():
        size = 2 * plane.nbytes
        shift = plane.itemsize * int(rng.integers(1, 16))
        raw = np.full(size + 64 * plane.itemsize, UNTOUCHED, np.uint8)[shift : shift + size]
        apart = raw.view(plane.dtype).reshape(len(plane), 2, -1)[:, 1]
        apart[:] = plane
        planes[name] = apart
    return Matrix(**planes, scale_rows=matrix.scale_rows)


@Formats
@settings(max_examples=8)
@given(
    rows=st.integers(1, 200), units=st.integers(1, 40), skip=st.integers(0, 2), seed=st.integers()
)
def test_strips_are_as_described(
    fmt: WeightFormat, rows: int, units: int, skip: int, seed: int
) -> None:
    """Any number of rows and inputs, from any strip on, out of rows that are apart."""
    rng = np.random.default_rng(abs(seed))
    K = fmt.k_multiple * (1 + units * 32 // fmt.k_multiple)
    layout = strip_layout(fmt, K)
    first, second = (strided(random_matrix(fmt, rng, rows, K), rng) for _ in range(2))

    def lane(matrix: Matrix, row: int) -> tuple[Matrix, int] | None:
        return (matrix, row) if row < rows else None

    last = -(-rows // STRIP_ROWS)
    out = aligned((max(0, last - skip), layout.nbytes), np.uint8, fill=UNTOUCHED)
    pack_rows(out.ctypes.data, range(skip, last), layout, first, rows)
    for strip, found in enumerate(out, skip):
        lanes = [lane(first, STRIP_ROWS * strip + i) for i in range(STRIP_ROWS)]
        np.testing.assert_array_equal(found, expected_strip(layout, lanes))

    half = STRIP_ROWS // 2
    last = -(-rows // half)
    out = aligned((max(0, last - skip), layout.nbytes), np.uint8, fill=UNTOUCHED)
    pack_gate_up(out.ctypes.data, range(skip, last), layout, first, second, rows)
    for strip, found in enumerate(out, skip):
        lanes = [lane(m, half * strip + i) for m in (first, second) for i in range(half)]
        np.testing.assert_array_equal(found, expected_strip(layout, lanes))


@pytest.mark.parametrize("tier", RUNNABLE)
@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("width", [LINE, NARROW, 0])
def test_kernels_of_every_tier(tier: str, itemsize: int, width: int) -> None:
    """Elements at places of a table, the last tile not whole; nothing behind a row is read."""
    rng = np.random.default_rng(itemsize + width)
    count, strips = max(1, 2 * width // itemsize + 3 if width else 5), 2
    rows = before_a_guard(strips * STRIP_ROWS * count * itemsize)
    rows[:] = rng.integers(0, 256, rows.size)
    rows = rows.reshape(strips * STRIP_ROWS, -1)
    strip_bytes = STRIP_ROWS * itemsize * (count + 1)
    offsets = STRIP_ROWS * itemsize * rng.permutation(count + 1)[:count]
    order = rng.permutation(len(rows))
    addresses = rows.ctypes.data + order * rows.strides[0]
    out = aligned((strips, strip_bytes), np.uint8, fill=UNTOUCHED)
    body, more = (pack_tiles(itemsize, width), ()) if width else (pack_one_by_one(itemsize), (64,))
    kernel = compile_kernel(body, 6 + len(more), RUNNABLE[tier])
    kernel(out, strip_bytes, strips, addresses, offsets, count, *more)
    expected = np.full_like(out, UNTOUCHED)
    of_lanes = rows[order].reshape(strips, STRIP_ROWS, count, itemsize)
    for element, at in enumerate(offsets):
        values = of_lanes[:, :, element].reshape(strips, -1)
        expected[:, at : at + STRIP_ROWS * itemsize] = values
    np.testing.assert_array_equal(out, expected)


def test_an_address_between_lines_is_refused() -> None:
    """Words are stored a line at a time, which the processor refuses by ending the process."""
    layout = strip_layout(FORMATS["MXFP4"], 32)
    matrix = random_matrix(FORMATS["MXFP4"], np.random.default_rng(0), 64, 32)
    out = aligned((layout.nbytes + LINE,), np.uint8, fill=UNTOUCHED)
    with pytest.raises(ValueError, match="begin a cache line"):
        pack_rows(out.ctypes.data + 32, range(1), layout, matrix, 64)
    assert (out == UNTOUCHED).all()
