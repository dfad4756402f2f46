"""Strips back into rows: what `pack` did, undone, bit for bit.

Packing only moves 32-bit words, so the bytes of a checkpoint are all still there. Whoever wants an
expert in its checkpoint's layout (prefill of whole layers on a GPU) gets it from memory, and no
file is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from hybrid_moe.formats.strips import PANEL_ROWS, StripLayout
from hybrid_moe.formats.table import Array, WeightFormat
from hybrid_moe.formats.tensors import Matrix

RunAll = Callable[[Callable[[slice], None], Iterable[slice]], Iterable[Any]]
"""`map`, or that of an executor: copies need no GIL, so threads share them."""

_STRIPS_PER_COPY = 4  # of 35 to 70 KB each at a model's sizes


def unpack_gate_up(
    strips: Array, layout: StripLayout, fmt: WeightFormat, rows: int, run_all: RunAll
) -> tuple[Matrix, Matrix]:
    """The gate and up matrices in strips uint8 [S, layout.nbytes], without biases."""
    codes, scales = _panels(strips, layout, fmt, run_all)
    gate, up = (
        _matrix(codes[:, panel], None if scales is None else scales[:, panel], rows)
        for panel in range(2)
    )
    return gate, up


def unpack_rows(
    strips: Array, layout: StripLayout, fmt: WeightFormat, rows: int, run_all: RunAll
) -> Matrix:
    """The matrix in strips uint8 [S, layout.nbytes], without its bias."""
    return _matrix(*_panels(strips, layout, fmt, run_all), rows)


def _panels(
    strips: Array, layout: StripLayout, fmt: WeightFormat, run_all: RunAll
) -> tuple[Array, Array | None]:
    """Codes [S, 2, 16, units] and scales [S, 2, 16, K/group]; axis 1 is the panel."""
    S = len(strips)
    words = strips[:, : layout.scale_offset].view(np.uint32)
    words = words.reshape(S, layout.words, 2, PANEL_ROWS)
    codes = np.empty((S, 2, PANEL_ROWS, layout.words), np.uint32)

    def copy(part: slice) -> None:
        codes[part] = words[part].transpose(0, 2, 3, 1)

    parts = (slice(at, at + _STRIPS_PER_COPY) for at in range(0, S, _STRIPS_PER_COPY))
    list(run_all(copy, parts))
    if fmt.scale is None:
        return codes.view(fmt.code_dtype), None
    end = layout.scale_offset + layout.groups * layout.scale_bytes_per_group
    scales = strips[:, layout.scale_offset : end].reshape(S, -1, 2, PANEL_ROWS)
    scales = np.ascontiguousarray(scales.transpose(0, 2, 3, 1)).view(fmt.scale.dtype)
    return codes.view(fmt.code_dtype), scales


def _matrix(codes: Array, scales: Array | None, rows: int) -> Matrix:
    """Axes before the last are rows; those past `rows` are padding."""
    return Matrix(
        codes.reshape(-1, codes.shape[-1])[:rows],
        None if scales is None else scales.reshape(-1, scales.shape[-1])[:rows],
    )
