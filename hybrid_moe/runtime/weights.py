"""Expert weights that come as stacked torch tensors rather than from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.tensors import CheckpointError, ExpertTensors, Matrix, check_matrix
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat
from hybrid_moe.runtime.arguments import LayerShape

PROJECTIONS = ("gate", "up", "down")
_CODES = {
    "e2m1": ("torch.uint8", "torch.int8"),
    "int4": ("torch.uint8", "torch.int8"),
    "int8": ("torch.int8",),
    "e4m3": ("torch.float8_e4m3fn", "torch.uint8"),
}
_SCALES = {
    "ue8m0": ("torch.uint8", "torch.float8_e8m0fnu"),
    "fp16": ("torch.float16",),
    "bf16": ("torch.bfloat16",),
    "float32": ("torch.float32",),
}
"""Dtypes of codes and of scales, by name: torch before 2.7 lacks one."""
FLOAT_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def code_types(fmt: WeightFormat) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Dtypes of codes and of scales that are taken as they are; none of formats with more arrays
    than these two."""
    if fmt.scale is None or any(plane.name not in ("codes", "scales") for plane in fmt.planes):
        return (), ()
    return _CODES[fmt.code.name], _SCALES[fmt.scale.name]


@dataclass(frozen=True)
class Stacked:
    """One projection of all experts.

    Attributes:
        weight: float [E, N, K], to be quantised; or codes of the method's format, see `code_types`
            and `WeightFormat.code_shape`.
        scale: with codes: theirs, see `WeightFormat.scale_shape`; else None.
        bias: float [E, N] or None.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def check_stacked(
    projections: dict[str, Stacked],
    shape: LayerShape,
    formats: LayerFormats,
    mapping: torch.Tensor,
) -> None:
    """Raise unless the tensors are experts of `shape` and hold every expert of `mapping`.

    Raises:
        TypeError: not a tensor, or a dtype that is neither float nor codes of `formats`.
        ValueError: a shape; the message says tensor, found and expected shape.
    """
    H, I = shape.hidden_size, shape.moe_intermediate_size
    experts = None
    for name in PROJECTIONS:
        given, fmt = projections[name], formats.down if name == "down" else formats.gate_up
        N, K = (H, I) if name == "down" else (I, H)
        for part, tensor in (("proj", given.weight), ("scale", given.scale), ("bias", given.bias)):
            if tensor is None and part != "proj":
                continue
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name}_{part} must be a tensor, not {type(tensor).__name__}")
            if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
                raise TypeError(f"{name}_{part} must be a dense tensor, not sparse or meta")
            if part == "bias" and tensor.dtype not in FLOAT_TYPES:
                raise TypeError(f"{name}_bias has dtype {tensor.dtype}, must be a float type")
        weight = given.weight
        codes_as, scales_as = code_types(fmt)
        coded = str(weight.dtype) in codes_as
        if not coded and weight.dtype not in FLOAT_TYPES:
            raise TypeError(
                f"{name}_proj has dtype {weight.dtype}, must be a float type"
                + (f" or {_names(codes_as)} {fmt.name} codes" if codes_as else "")
            )
        if coded != (given.scale is not None):
            raise ValueError(
                f"{name}_scale is {'missing' if coded else 'given'}, but {name}_proj is "
                f"{weight.dtype}: {fmt.name} codes come with scales, floats without"
            )
        if coded and given.scale is not None and str(given.scale.dtype) not in scales_as:
            raise TypeError(
                f"{name}_scale has dtype {given.scale.dtype}, must be {_names(scales_as)}"
            )
        if weight.dim() != 3:
            raise ValueError(
                f"{name}_proj has shape {tuple(weight.shape)}, must have three dimensions: "
                "experts, outputs, inputs"
            )
        experts = experts or int(weight.shape[0])
        rows, units = fmt.code_shape(N, K) if coded else (N, K)
        expected = {"proj": (experts, rows, units), "bias": (experts, N)}
        if coded:
            expected["scale"] = (experts, *(fmt.scale_shape(N, K) or ()))
        for part, tensor in (("proj", weight), ("scale", given.scale), ("bias", given.bias)):
            if tensor is not None and tuple(tensor.shape) != expected[part]:
                raise ValueError(
                    f"{name}_{part} has shape {tuple(tensor.shape)}, must be {expected[part]} for "
                    f"hidden_size {H} and moe_intermediate_size {I}"
                )
    assert experts is not None
    if int(mapping.max()) >= experts:
        at = int((mapping >= experts).nonzero()[0])
        raise ValueError(
            f"physical_to_logical_map_cpu[{at}] is {int(mapping[at])}, but the tensors hold "
            f"{experts} experts"
        )


def expert_of(
    projections: dict[str, Stacked], expert: int, shape: LayerShape, formats: LayerFormats
) -> ExpertTensors:
    """The matrices of one expert in `formats`.

    Raises:
        CheckpointError: a weight or bias is not finite, or a scale is invalid.
    """
    matrices = {}
    for name in PROJECTIONS:
        given, where = projections[name], f"{name}_proj[{expert}]"
        fmt = formats.down if name == "down" else formats.gate_up
        codes, scales = _codes(given, expert, fmt, where)
        bias = None
        if given.bias is not None:
            bias = given.bias[expert].detach().to("cpu", torch.float32).numpy()
            if not np.isfinite(bias).all():
                raise CheckpointError(f"{name}_bias[{expert}]: holds a NaN or an infinity")
        matrix = Matrix(codes, scales, bias, where, scale_rows=fmt.scale_rows)
        H, I = shape.hidden_size, shape.moe_intermediate_size
        check_matrix(matrix, fmt, *((H, I) if name == "down" else (I, H)))
        matrices[name] = matrix
    return ExpertTensors(**matrices)


def _names(dtypes: Sequence[str]) -> str:
    return " or ".join(dtype.removeprefix("torch.") for dtype in dtypes)


def _codes(
    given: Stacked, expert: int, fmt: WeightFormat, where: str
) -> tuple[Array, Array | None]:
    weight = given.weight[expert].detach().cpu()
    if given.scale is not None and fmt.scale is not None:
        scale = given.scale[expert].detach().cpu().contiguous().view(torch.uint8)
        codes = weight.view(torch.uint8).numpy().view(fmt.code_dtype)
        return codes, scale.numpy().view(fmt.scale.dtype)
    values = weight.to(torch.float32).contiguous().numpy()
    if not np.isfinite(values).all():
        raise CheckpointError(f"{where}: holds a NaN or an infinity")
    return fmt.encode(values)
