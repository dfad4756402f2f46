"""The tensors of a matrix as a file has them -> the planes of its format; no value changes.

Files order bits, axes and types of scales in their own ways. What they store is handed on without
loss: a scale in another type than the format's is converted only where that is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybrid_moe.formats.numbers import (
    BF16_SCALE,
    E4M3,
    F32,
    FP16,
    FP32,
    UE8M0,
    Array,
    ScaleType,
    bf16_to_f32,
    f32_to_bf16,
    ue8m0_to_float,
)
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.stored import Stored

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Columns of the nibbles of AWQ's words, low first."""
_MIDDLE = {1: 0x7777_7777, 0: 0x8888_8888}
"""Words of zero points of symmetric matrices, by what the format adds to them."""


@dataclass(frozen=True)
class RawMatrix:
    """The tensors of one matrix as they are read.

    Attributes:
        codes, scales, zeros: output rows first, or inputs first, as the packing says.
        factor: float32 [] or [1], of the whole matrix.
        order: int32 [K], the group of each input.
        scale_dtype: safetensors dtype of the scales.
        where, scales_where: tensor and file of the codes and of the scales, for messages.
    """

    codes: Array
    scales: Array | None
    zeros: Array | None
    factor: Array | None
    order: Array | None
    scale_dtype: str
    where: str
    scales_where: str


def planes_of(raw: RawMatrix, stored: Stored, zeros_offset: int) -> dict[str, Array]:
    """The planes of a matrix by name, see `WeightFormat.planes`.

    Args:
        raw: its tensors.
        stored: how they are stored.
        zeros_offset: what GPTQ's symmetric zero points lack, see `Quantization`.

    Raises:
        CheckpointError: groups are scattered, a scale has no exact value in the format's type, or
            zero points are not those of a symmetric matrix.
    """
    fmt = stored.format
    planes: dict[str, Array] = {"codes": _codes(raw, stored)}
    N = len(planes["codes"])
    if raw.order is not None:
        _check_order(raw, fmt.group)
    if raw.scales is not None and fmt.scale is not None:
        scales = raw.scales.T if stored.inputs_first else raw.scales
        scales = _scales(raw, scales, fmt.scale)
        if fmt.group == 0 and fmt.scale_rows == 1:
            scales = np.broadcast_to(scales.reshape(-1, 1), (N, 1))
        if scales.strides[-1] != scales.itemsize:
            scales = scales.copy(order="C")  # also where the last axis has one element
        planes["scales"] = scales
    if raw.zeros is not None:
        if fmt.plane("minima") is None:
            _check_middle(raw, zeros_offset)
        else:
            planes["minima"] = _zero_points(raw.zeros, stored)
    if raw.factor is not None and fmt.plane("factors") is not None:
        planes["factors"] = np.full((N, 1), raw.factor.reshape(-1)[0], np.float32)
    return planes


def _codes(raw: RawMatrix, stored: Stored) -> Array:
    codes = raw.codes
    if stored.packing == "gptq":
        from hybrid_moe.loaders.bit_order import transpose_words

        return transpose_words(codes.view(np.uint32)).view(np.uint8)
    if stored.packing == "awq":
        from hybrid_moe.loaders.bit_order import transpose_nibbles

        return transpose_nibbles(codes.view(np.uint32), AWQ_ORDER)
    if not stored.exact:
        return codes
    return codes.view(stored.format.code_dtype)


def _zero_points(zeros: Array, stored: Stored) -> Array:
    from hybrid_moe.loaders.bit_order import transpose_nibbles, unpack_rows

    words = zeros.view(np.uint32)
    if stored.packing == "compressed-tensors":
        return unpack_rows(words)
    order = AWQ_ORDER if stored.packing == "awq" else tuple(range(8))
    return transpose_nibbles(words, order)


def _scales(raw: RawMatrix, scales: Array, kind: ScaleType) -> Array:
    """Scales in the format's type."""
    stored = raw.scale_dtype
    if kind in (UE8M0, E4M3):
        return scales
    if (stored, kind) in (("F32", FP32), ("BF16", BF16_SCALE), ("F16", FP16)):
        return scales
    values = _float32(scales, stored)
    if kind is FP32:
        return values
    with np.errstate(over="ignore"):
        narrow: Array = f32_to_bf16(values) if kind is BF16_SCALE else values.astype(np.float16)
    changed = (kind.decode(narrow) != values) & np.isfinite(values)
    if changed.any():
        raise CheckpointError(
            f"{raw.scales_where}: a {stored} scale is {values[changed][0]:.9g}, which {kind.name} "
            "does not hold exactly: matrices of this kind are read where their scales are "
            f"{kind.name}"
        )
    return narrow


def _float32(scales: Array, stored: str) -> F32:
    if stored == "BF16":
        return bf16_to_f32(scales)
    if stored in ("F8_E8M0", "U8"):
        return ue8m0_to_float(np.ascontiguousarray(scales))
    return scales.astype(np.float32)


def _check_order(raw: RawMatrix, group: int) -> None:
    """Raise unless groups are those of inputs one after the other."""
    assert raw.order is not None
    expected = np.arange(len(raw.order)) // group if group else np.zeros(len(raw.order))
    if not np.array_equal(raw.order, expected):
        raise CheckpointError(
            f"{raw.where}: its g_idx scatters the groups over the inputs (desc_act, act-order), "
            "which is not read"
        )


def _check_middle(raw: RawMatrix, zeros_offset: int) -> None:
    """Raise unless all zero points are those of a symmetric matrix."""
    assert raw.zeros is not None
    if (raw.zeros.view(np.uint32) != _MIDDLE[zeros_offset]).any():
        raise CheckpointError(
            f"{raw.where}: config.json says that it is symmetric, but some of its zero points are "
            f"not {8 - zeros_offset}"
        )
