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

from hybrid_moe.formats.strips import PANEL_ROWS, PANELS, STRIP_ROWS, StripLayout
from hybrid_moe.formats.table import Array, WeightFormat
from hybrid_moe.formats.tensors import Matrix

RunAll = Callable[[Callable[[slice], None], Iterable[slice]], Iterable[Any]]
"""`map`, or that of an executor: copies need no GIL, so threads share them."""

_STRIPS_PER_COPY = 2  # of 70 to 140 KB each at a model's sizes


def unpack_gate_up(
    strips: Array, layout: StripLayout, fmt: WeightFormat, rows: int, run_all: RunAll
) -> tuple[Matrix, Matrix]:
    """The gate and up matrices in strips uint8 [S, layout.nbytes], without biases."""
    codes, scales = _panels(strips, layout, fmt, run_all)
    gate, up = (
        _matrix(codes[:, half], None if scales is None else scales[:, half], rows)
        for half in (slice(0, PANELS // 2), slice(PANELS // 2, PANELS))
    )
    return gate, up


def unpack_rows(
    strips: Array, layout: StripLayout, fmt: WeightFormat, rows: int, run_all: RunAll
) -> Matrix:
    """The matrix in strips uint8 [S, layout.nbytes], without its bias."""
    return _matrix(*_panels(strips, layout, fmt, run_all), rows)


def unpack_some(
    strips: Array, layout: StripLayout, fmt: WeightFormat, rows: npt.NDArray[np.int64]
) -> Matrix:
    """Some rows of the matrix in strips uint8 [S, layout.nbytes], in any order, also repeatedly."""
    by_group = strips.reshape(len(strips), layout.groups, layout.group_bytes)
    strip, lane = np.divmod(rows, STRIP_ROWS)
    words = by_group[:, :, : layout.code_bytes].view(np.uint32)
    words = words.reshape(len(strips), layout.groups, layout.words, STRIP_ROWS)
    # one index of axis 0 and one of axis 3 for each row: [rows, groups, words]
    codes = words[strip, :, :, lane].reshape(len(rows), layout.groups * layout.words)
    codes = codes.view(fmt.code_dtype)
    if fmt.scale is None:
        return Matrix(codes)
    scales = by_group[:, :, layout.code_bytes :].view(fmt.scale.dtype)
    scales = scales.reshape(len(strips), layout.groups, layout.scales, STRIP_ROWS)
    taken = scales[strip, :, :, lane].reshape(len(rows), layout.groups * layout.scales)
    return Matrix(codes, taken)


def _panels(
    strips: Array, layout: StripLayout, fmt: WeightFormat, run_all: RunAll
) -> tuple[Array, Array | None]:
    """Codes [S, 4, 16, units] and scales [S, 4, 16, K/group]; axis 1 is the panel."""
    S, groups = len(strips), layout.groups
    by_group = strips.reshape(S, groups, layout.group_bytes)
    words = by_group[:, :, : layout.code_bytes].view(np.uint32)
    words = words.reshape(S, groups, layout.words, PANELS, PANEL_ROWS)
    codes = np.empty((S, PANELS, PANEL_ROWS, groups, layout.words), np.uint32)

    def copy(part: slice) -> None:
        codes[part] = words[part].transpose(0, 3, 4, 1, 2)

    parts = (slice(at, at + _STRIPS_PER_COPY) for at in range(0, S, _STRIPS_PER_COPY))
    list(run_all(copy, parts))
    rows = (S, PANELS, PANEL_ROWS, -1)
    if fmt.scale is None:
        return codes.reshape(rows).view(fmt.code_dtype), None
    scales = by_group[:, :, layout.code_bytes :].view(fmt.scale.dtype)
    scales = scales.reshape(S, groups, layout.scales, PANELS, PANEL_ROWS)
    scales = np.ascontiguousarray(scales.transpose(0, 3, 4, 1, 2)).reshape(rows)
    return codes.reshape(rows).view(fmt.code_dtype), scales


def _matrix(codes: Array, scales: Array | None, rows: int) -> Matrix:
    """Axes before the last are rows; those past `rows` are padding."""
    return Matrix(
        codes.reshape(-1, codes.shape[-1])[:rows],
        None if scales is None else scales.reshape(-1, scales.shape[-1])[:rows],
    )
