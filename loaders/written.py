"""How `convert` writes the tensors of each format, as a table.

Names and packings are those of the libraries that read them: DeepSeek's and Transformers' block FP8
(`weight_scale_inv`), compressed-tensors' integers (`weight_packed`, eight codes in a word of 32
bits), gpt-oss's and DeepSeek-V4's MXFP4. INT8 with scales for 32 inputs is our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from hybrid_moe.formats.float8 import FP8, FP8_PERCHANNEL
from hybrid_moe.formats.integers import INT4_ROW, INT8, INT8_ROW, RAW_INT4
from hybrid_moe.formats.mx import MXFP4, MXFP8
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.table import METHODS, format_named
from hybrid_moe.formats.tensors import ExpertTensors, Matrix
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.loaders.layer_source import LayerSource
from hybrid_moe.loaders.naming import (
    DEEPSEEK_V4,
    FUSED,
    GPT_OSS_MXFP4,
    PER_EXPERT,
    NamingScheme,
)
from hybrid_moe.loaders.writer import PlannedTensor

_FUSED_FORMATS = (MXFP4, INT8)
"""Formats that are written in gpt-oss's layout, all experts in one tensor."""
_WORD_BYTES = 4


@dataclass(frozen=True)
class Written:
    """How one format is written.

    Attributes:
        format: it.
        codes: suffix and safetensors dtype of the codes; the scheme's first suffix for None.
        scales: likewise.
        with_shape: a tensor `weight_shape` says N and K.
    """

    format: WeightFormat
    codes: tuple[str | None, str]
    scales: tuple[str | None, str]
    with_shape: bool = False


def _packed(fmt: WeightFormat, scale_dtype: str) -> Written:
    return Written(fmt, (".weight_packed", "I32"), (".weight_scale", scale_dtype), with_shape=True)


_WRITTEN: Mapping[str, Written] = MappingProxyType(
    {
        row.format.name: row
        for row in (
            Written(MXFP4, (None, ""), (None, "")),  # the dtypes are the scheme's
            Written(INT8, (None, "I8"), (None, "F16")),
            Written(FP8, (None, "F8_E4M3"), (".weight_scale_inv", "F32")),
            Written(FP8_PERCHANNEL, (None, "F8_E4M3"), (".weight_scale", "F32")),
            Written(MXFP8, (None, "F8_E4M3"), (".weight_scale_inv", "U8")),
            Written(INT8_ROW, (None, "I8"), (".weight_scale", "F32")),
            _packed(INT4_ROW, "F32"),
            *(_packed(fmt, "BF16") for fmt in RAW_INT4),
        )
    }
)


def written_format(method: str, group_size: int | None = None) -> WeightFormat:
    """The format that experts are converted to.

    Args:
        method: as users name it.
        group_size: inputs that share a scale, where the method leaves a choice.

    Raises:
        ValueError: no such method, none that is written, or no such group.
    """
    fmt = format_named(method)
    if fmt.name not in _WRITTEN:
        raise ValueError(
            f"experts are converted to the methods {', '.join(written_methods())}, "
            f"not to {fmt.name}"
        )
    choices = RAW_INT4 if fmt in RAW_INT4 else (fmt,)
    chosen = [f for f in choices if group_size in (None, f.group)]
    if not chosen:
        sizes = " or ".join(str(f.group) for f in choices if f.group) or "whole rows"
        raise ValueError(f"{method} has groups of {sizes}, not of {group_size}")
    return chosen[0]


def written_methods() -> tuple[str, ...]:
    """Names of the methods that can be asked for."""
    return tuple(m.name for m in METHODS.values() if m.made and m.made.name in _WRITTEN)


def written_scheme(layer: LayerSource, fmt: WeightFormat) -> NamingScheme:
    """The scheme in which a layer's experts are written: one whose name leaves no layout open."""
    if layer.scheme is not FUSED:
        return layer.scheme
    fused = layer.interleaved and fmt in _FUSED_FORMATS
    return GPT_OSS_MXFP4 if fused else PER_EXPERT


def splits_biases(layer: LayerSource, fmt: WeightFormat) -> bool:
    """Whether biases of all experts become one for each, as their weights do."""
    return layer.has_bias and layer.scheme.fused and not written_scheme(layer, fmt).fused


@dataclass(frozen=True)
class _Names:
    """Keys and dtypes under which one matrix is written."""

    codes: tuple[str, str]
    scales: tuple[str, str]
    shape: str
    bias: str


def _names(layer: LayerSource, fmt: WeightFormat, expert: int, projection: str) -> _Names:
    scheme, row = written_scheme(layer, fmt), _WRITTEN[fmt.name]
    stem = scheme.stem(layer.prefix, layer.layer, expert) + projection
    (code_suffix, code_dtype), (scale_suffix, scale_dtype) = row.codes, row.scales
    if fmt is MXFP4:
        code_dtype, scale_dtype = scheme.mxfp4_dtypes
    if scheme is DEEPSEEK_V4 and scale_suffix == ".weight_scale_inv":
        scale_suffix = None  # it has a name of its own for them
    return _Names(
        (stem + (code_suffix or scheme.weights[0]), code_dtype),
        (stem + (scale_suffix or scheme.scales[0]), scale_dtype),
        stem + ".weight_shape" if row.with_shape else "",
        stem + scheme.bias,
    )


def planned_tensors(layer: LayerSource, fmt: WeightFormat) -> list[PlannedTensor]:
    """What is written for a layer's experts."""
    scheme = written_scheme(layer, fmt)
    H, I = layer.hidden, layer.intermediate
    planned: list[PlannedTensor] = []
    projections = [(scheme.gate, I, H), (scheme.up, I, H), (scheme.down, H, I)]
    if scheme.fused:
        projections = [(scheme.gate, 2 * I, H), (scheme.down, H, I)]
    for expert in range(1 if scheme.fused else layer.num_experts):
        for projection, N, K in projections:
            names = _names(layer, fmt, expert, projection)
            codes, scales = fmt.code_shape(N, K), fmt.scale_shape(N, K)
            assert scales is not None
            if scheme.fused:  # gpt-oss: [E, N, K/32, 16] (INT8: 32) and [E, N, K/32]
                blocks = (layer.num_experts, *scales, codes[1] // scales[1])
                planned.append(PlannedTensor(*names.codes, blocks))
                planned.append(PlannedTensor(*names.scales, blocks[:-1]))
                continue
            if names.codes[1] == "I32":
                codes = (N, codes[1] // _WORD_BYTES)
            planned.append(PlannedTensor(*names.codes, codes))
            planned.append(PlannedTensor(*names.scales, scales))
            if names.shape:
                planned.append(PlannedTensor(names.shape, "I64", (2,)))
            if splits_biases(layer, fmt):
                planned.append(PlannedTensor(names.bias, "F32", (N,)))
    return planned


def expert_pieces(
    layer: LayerSource, fmt: WeightFormat, expert: int, tensors: ExpertTensors
) -> list[tuple[str, Array, int]]:
    """What is written for one expert: key, values, and where in the tensor they begin (bytes)."""
    scheme = written_scheme(layer, fmt)
    pieces: list[tuple[str, Array, int]] = []
    matrices = [(scheme.gate, tensors.gate), (scheme.up, tensors.up), (scheme.down, tensors.down)]
    if scheme.fused:
        gate_up = _interleave(tensors.gate, tensors.up)
        matrices = [(scheme.gate, gate_up), (scheme.down, tensors.down)]
    for projection, matrix in matrices:
        assert matrix.scales is not None  # every format here has scales
        names = _names(layer, fmt, expert, projection)
        if splits_biases(layer, fmt):
            assert matrix.bias is not None
            pieces.append((names.bias, np.ascontiguousarray(matrix.bias), 0))
        if names.shape:
            K = matrix.codes.shape[1] * 8 // fmt.bits
            pieces.append((names.shape, np.array([len(matrix.codes), K], np.int64), 0))
        for (key, _), data in ((names.codes, matrix.codes), (names.scales, matrix.scales)):
            pieces.append((key, data, expert * data.nbytes if scheme.fused else 0))
    return pieces


def _interleave(gate: Matrix, up: Matrix) -> Matrix:
    """Rows of gate and up in turn, as gpt-oss stores them."""
    assert gate.scales is not None and up.scales is not None
    codes = np.stack([gate.codes, up.codes], axis=1).reshape(-1, gate.codes.shape[1])
    scales = np.stack([gate.scales, up.scales], axis=1).reshape(-1, gate.scales.shape[1])
    return Matrix(codes, scales)
