"""Strips back into rows: what `pack` did, undone, bit for bit.

Packing only moves 32-bit words, so the bytes of a checkpoint are all still there. Whoever wants an
expert in its checkpoint's layout (prefill of whole layers on a GPU) gets it from memory, and no
file is read twice.
"""

from __future__ import annotations

import numpy as np

from hybrid_moe.cpu_kernels.panels import PANEL_ROWS, StripLayout
from hybrid_moe.formats import Array, WeightFormat
from hybrid_moe.tensors import Matrix


def unpack_gate_up(
    strips: Array, layout: StripLayout, fmt: WeightFormat, rows: int
) -> tuple[Matrix, Matrix]:
    """The gate and up matrices in strips uint8 [S, layout.nbytes], without biases."""
    codes, scales = _panels(strips, layout, fmt)
    gate, up = (
        _matrix(codes[:, panel], None if scales is None else scales[:, panel], rows)
        for panel in range(2)
    )
    return gate, up


def unpack_rows(strips: Array, layout: StripLayout, fmt: WeightFormat, rows: int) -> Matrix:
    """The matrix in strips uint8 [S, layout.nbytes], without its bias."""
    return _matrix(*_panels(strips, layout, fmt), rows)


def _panels(strips: Array, layout: StripLayout, fmt: WeightFormat) -> tuple[Array, Array | None]:
    """Codes [S, 2, 16, units] and scales [S, 2, 16, K/group]; axis 1 is the panel."""
    S = len(strips)
    words = strips[:, : layout.scale_offset].view(np.uint32)
    codes = words.reshape(S, layout.words, 2, PANEL_ROWS).transpose(0, 2, 3, 1)
    codes = np.ascontiguousarray(codes).view(fmt.code_dtype)
    if fmt.scale is None:
        return codes, None
    end = layout.scale_offset + layout.groups * layout.scale_bytes_per_group
    scales = strips[:, layout.scale_offset : end].reshape(S, -1, 2, PANEL_ROWS)
    return codes, np.ascontiguousarray(scales.transpose(0, 2, 3, 1)).view(fmt.scale.dtype)


def _matrix(codes: Array, scales: Array | None, rows: int) -> Matrix:
    """Axes before the last are rows; those past `rows` are padding."""
    return Matrix(
        codes.reshape(-1, codes.shape[-1])[:rows],
        None if scales is None else scales.reshape(-1, scales.shape[-1])[:rows],
    )
