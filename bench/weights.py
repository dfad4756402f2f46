"""Random weights of every method: planes of valid bits, the same for every caller.

NumPy and `hybrid_moe.formats` only, which is NumPy too: a peer's worker runs in an environment that
may have nothing else of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from problem import SOURCES, Array, Shape, bf16_bits

from hybrid_moe.formats.numbers import f32_to_e4m3
from hybrid_moe.formats.table import FORMATS
from hybrid_moe.formats.weight_format import Plane, WeightFormat

FORMAT_OF: Mapping[str, str] = MappingProxyType(
    {
        "RAWINT4": "INT4_G32_BF16",
        "GPTQ_INT4": "INT4_G128_FP16",
        "AWQ": "INT4_G128_FP16_Z0",
        "AMXINT4": "INT4_ROW_FLOAT32",
        "AMXINT8": "INT8_ROW_FLOAT32",
        "Q8_0": "INT8",
        "Q4_0": "INT4_G32_FP16",
    }
)
"""Names under which a format is measured, where they are not its own: a method that stands for
several has the one that most checkpoints are in."""


INT8_ACTIVATIONS = "+int8"
"""Ends the name of a method whose activations are to be rounded to 8 bits."""


def activation_bits(method: str) -> int:
    """Bits of our activations under a method."""
    return 8 if method.endswith(INT8_ACTIVATIONS) else 16


def stored_method(method: str) -> str:
    """The method without what it says of activations: how the weights are stored."""
    return method.removesuffix(INT8_ACTIVATIONS)


def format_of(method: str) -> WeightFormat:
    """The format that a method of the benchmarks means.

    Raises:
        ValueError: there is none of that name.
    """
    method = stored_method(method)
    name = FORMAT_OF.get(method, method)
    if name not in FORMATS:
        known = ", ".join(dict.fromkeys((*FORMAT_OF, *FORMATS)))
        raise ValueError(f"no random weights of {method}: there are {known}")
    return FORMATS[name]


@dataclass(frozen=True)
class Codes:
    """A random matrix: the planes of its format, see `formats.weight_format`."""

    fmt: WeightFormat
    planes: Mapping[str, Array]

    @property
    def codes(self) -> Array:
        return self.planes["codes"]

    @property
    def scales(self) -> Array | None:
        return self.planes.get("scales")

    def rows(self, count: int) -> Codes:
        """The first `count` rows; a multiple of 128, or all."""
        cut = {p.name: self.planes[p.name][: -(-count // p.rows)] for p in self.fmt.planes}
        return Codes(self.fmt, cut)

    def dequantize(self) -> Array:
        """float64 [N, K]."""
        values: Array = self.fmt.dequantize(**self.planes).astype(np.float64)
        return values


def _bytes(rng: np.random.Generator, shape: tuple[int, ...], itemsize: int = 1) -> Array:
    count = int(np.prod(shape)) * itemsize
    return np.frombuffer(rng.bytes(count), np.uint8).reshape(*shape[:-1], -1)


def _codes(rng: np.random.Generator, fmt: WeightFormat, shape: tuple[int, int]) -> Array:
    raw = _bytes(rng, shape, fmt.code_dtype.itemsize)
    if fmt.code.name == "bf16":
        return bf16_bits(rng.standard_normal(shape, dtype=np.float32) / 50)
    if fmt.code.name == "int8":
        return np.maximum(raw.view(np.int8), -127)
    if fmt.code.name == "e4m3":  # exponents of 4 to 11 out of 15: no NaN, magnitudes of 1/8 to 30
        return (raw & 0x87) | ((((raw >> 3) & 7) + 4) << 3)
    return raw.view(fmt.code_dtype)


def _largest(fmt: WeightFormat) -> float:
    """Of the codes above."""
    if fmt.code.values is not None:
        return max(map(abs, fmt.code.values))
    return {"int8": 127.0, "e4m3": 30.0}[fmt.code.name]


def _numbers(
    rng: np.random.Generator, fmt: WeightFormat, plane: Plane, shape: tuple[int, int]
) -> Array:
    """Scales, minima and factors: positive numbers that bring weights to about 1/50."""
    size = 1 / (25 * _largest(fmt))
    if fmt.scaling == "e4m3 * row":
        size /= 128
    elif plane.name == "factors":  # of a superblock, times sub-scales
        size /= 16 if fmt.scaling == "q2_k" else 32
    if plane.name == "minima" and plane.dtype.kind == "f":
        size *= -_largest(fmt) / 2
    values = (size * rng.uniform(0.5, 1.5, shape)).astype(np.float32)
    if plane.name == "factors" and plane.count == 2:  # so that minima take away the mean
        values[:, 1::2] *= _largest(fmt) / 2
    return values.astype(plane.dtype) if plane.dtype.kind == "f" else bf16_bits(values)


def random_planes(fmt: WeightFormat, rng: np.random.Generator, N: int, K: int) -> Codes:
    """N x K weights of about 1/50: every code occurs, and every sub-scale."""
    planes: dict[str, Array] = {}
    for plane in fmt.planes:
        shape = plane.shape(N, K)
        scale = fmt.scale.name if fmt.scale is not None and plane.name == "scales" else ""
        if plane.name == "codes":
            planes[plane.name] = _codes(rng, fmt, shape)
        elif scale == "ue8m0":
            exponent = 126 - int(np.log2(25 * _largest(fmt)))
            planes[plane.name] = rng.integers(exponent, exponent + 3, shape, dtype=np.uint8)
        elif scale == "e4m3":
            planes[plane.name] = f32_to_e4m3(rng.uniform(16, 240, shape).astype(np.float32))
        elif plane.dtype.kind == "f" or scale == "bf16":
            planes[plane.name] = _numbers(rng, fmt, plane, shape)
        else:  # upper bits, zero points, sub-scales of superblocks: any bits
            planes[plane.name] = _bytes(rng, shape, plane.dtype.itemsize).view(plane.dtype)
    return Codes(fmt, planes)


def random_experts(shape: Shape, method: str) -> list[dict[str, Codes]]:
    """`SOURCES` experts, the same for every caller.

    Raises:
        ValueError: no such method.
    """
    fmt, rng = format_of(method), np.random.default_rng(11)
    return [
        {name: random_planes(fmt, rng, *size) for name, size in shape.matrices.items()}
        for _ in range(SOURCES)
    ]
