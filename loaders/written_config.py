"""The `quantization_config` that other libraries need to read what `convert` writes.

Sources: Transformers' `FineGrainedFP8Config` and `Mxfp4Config`; compressed-tensors'
`QuantizationConfig` (`pack-quantized`, `int-quantized`, `float-quantized`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hybrid_moe.formats.float8 import BLOCK, FP8, FP8_PERCHANNEL
from hybrid_moe.formats.integers import INT4_ROW, INT8_ROW, RAW_INT4
from hybrid_moe.formats.mx import MXFP4, MXFP8
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.loaders.header import TensorInfo
from hybrid_moe.loaders.naming import DEEPSEEK_V4, GPT_OSS_MXFP4, NamingScheme

KEY = "quantization_config"
_WEIGHT = ".weight"


def quantization_config(
    fmt: WeightFormat, schemes: Iterable[NamingScheme], kept: Sequence[TensorInfo]
) -> dict[str, Any] | None:
    """What says that experts are in `fmt`, and nothing else is; None where no library but this one
    reads it, under these names.

    Args:
        fmt: of the experts.
        schemes: in which they are written.
        kept: the tensors beside them.
    """
    names, fp8 = set(schemes), _block_fp8(kept)
    if fmt is MXFP4 and names == {GPT_OSS_MXFP4}:
        return {"quant_method": "mxfp4", "modules_to_not_convert": _modules(kept)}
    if fmt is MXFP4 and names == {DEEPSEEK_V4}:
        return {**fp8, "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
    if fmt is FP8:
        return fp8
    if fmt is MXFP8:
        return {**fp8, "weight_block_size": [1, fmt.group], "scale_fmt": "ue8m0"}
    if fmt is FP8_PERCHANNEL:
        return _compressed("float-quantized", _weights(8, "float", 0), kept)
    if fmt is INT8_ROW:
        return _compressed("int-quantized", _weights(8, "int", 0), kept)
    if fmt is INT4_ROW or fmt in RAW_INT4:
        return _compressed("pack-quantized", _weights(4, "int", fmt.group), kept)
    return None


def _modules(kept: Sequence[TensorInfo]) -> list[str]:
    """Names of the modules that stay as they are: those with a matrix."""
    return [
        tensor.key.removesuffix(_WEIGHT)
        for tensor in kept
        if tensor.key.endswith(_WEIGHT) and len(tensor.shape) == 2
    ]


def _block_fp8(kept: Sequence[TensorInfo]) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": _modules(kept),
    }


def _weights(bits: int, kind: str, group: int) -> dict[str, Any]:
    """Of a group of modules; a scale for each row where `group` is 0."""
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
    }


def _compressed(
    layout: str, weights: Mapping[str, Any], kept: Sequence[TensorInfo]
) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": dict(weights)}},
        "ignore": _modules(kept),
    }
