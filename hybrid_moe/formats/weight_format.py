"""What a weight format is: how codes are stored, which arrays go with them, what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hybrid_moe.formats.numbers import E4M3_VALUES, F32, F64, Array, ScaleType, bf16_to_f32

GROUP = 32
"""Inputs per step of a kernel, and the group of activations."""

PLANES = ("codes", "high", "scales", "minima", "factors")
"""Names of the arrays of a matrix, as `formats.tensors.Matrix` has them."""

Planes = Mapping[str, Array]
"""By name: an array [rows, elements of a row] each."""


@dataclass(frozen=True)
class CodeType:
    """The codes of a format.

    Attributes:
        name: of the type.
        bits: bits in the plane `codes`: 2, 4, 8 or 16; low bits first along K.
        values: value of each code, `high` bits included; None for types that are numbers
            themselves (signed bytes, E4M3, bf16).
        step: of which all values are multiples, so that kernels may compute with whole numbers.
        high_bits: bits of a code that lie in the plane `high`: 0, 1 or 2.
        decode: plane `codes` -> float32 values, where `values` is None.
    """

    name: str
    bits: int
    values: tuple[float, ...] | None = None
    step: float = 1.0
    high_bits: int = 0
    decode: Callable[[Array], F32] | None = None

    @property
    def integers(self) -> tuple[int, ...]:
        """`values` in units of `step`."""
        assert self.values is not None, self.name
        return tuple(int(value / self.step) for value in self.values)


def unpack_bits(packed: Array, bits: int) -> npt.NDArray[np.uint8]:
    """Integers [..., n] -> the codes of `bits` bits in their bytes, low first: uint8 [..., m]."""
    raw = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return raw
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    codes: npt.NDArray[np.uint8] = (raw[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*raw.shape[:-1], raw.shape[-1] * per_byte)


def pack_bits(codes: Array, bits: int) -> npt.NDArray[np.uint8]:
    """The inverse: uint8 [..., m] below 2^bits -> uint8 [..., m * bits / 8]."""
    per_byte = 8 // bits
    grouped = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(grouped << shifts, axis=-1)
    return packed.astype(np.uint8)


def quads(bits: int) -> npt.NDArray[np.int64]:
    """int64 [8, 4]: the inputs of each quad of a group, four codes that a kernel takes out of a
    32-bit word at once, one into each byte: those at the same place of their bytes."""
    inputs = np.arange(GROUP).reshape(-1, 4, 8 // bits)  # [word, byte, place]
    by_quad: npt.NDArray[np.int64] = inputs.transpose(0, 2, 1).reshape(8, 4)
    return by_quad


def unpack_high(high: Array, code: CodeType) -> npt.NDArray[np.uint8]:
    """The plane `high`, uint32 [..., n] -> upper bits of each code, uint8 [..., 32 n / bits].

    In byte b of a group's words, low bits first, lie those of byte b of quad 0, of quad 1, ...: a
    kernel gets what it adds to a quad by one shift and one mask of a word.
    """
    words = np.ascontiguousarray(high).view(np.uint8)
    groups = words.reshape(*high.shape[:-1], -1, code.high_bits, 4)
    by_quad = unpack_bits(np.moveaxis(groups, -2, -1), code.high_bits)  # [..., group, byte, quad]
    found = np.empty((*by_quad.shape[:-2], GROUP), np.uint8)
    found[..., quads(code.bits)] = np.moveaxis(by_quad, -1, -2)
    return found.reshape(*high.shape[:-1], -1)


def pack_high(upper: Array, code: CodeType) -> npt.NDArray[np.uint32]:
    """The inverse: upper bits of each code, uint8 [..., K] -> the plane `high`."""
    groups = upper.reshape(*upper.shape[:-1], -1, GROUP)[..., quads(code.bits)]
    by_byte = pack_bits(np.moveaxis(groups, -1, -2), code.high_bits)  # [..., group, byte, word]
    words = np.ascontiguousarray(np.moveaxis(by_byte, -1, -2)).view(np.uint32)
    return words.reshape(*upper.shape[:-1], -1)


@dataclass(frozen=True)
class Plane:
    """One array of a matrix.

    Attributes:
        name: one of `PLANES`.
        dtype: of an element.
        per: inputs, along K, that `count` elements describe; 0: all of a row.
        count: elements for so many inputs.
        rows: output rows that share them. The last block of rows, or of inputs, may be short.
    """

    name: str
    dtype: np.dtype[Any]
    per: int
    count: int = 1
    rows: int = 1

    def shape(self, N: int, K: int) -> tuple[int, int]:
        """Of the array for an N x K matrix."""
        return -(-N // self.rows), self.count * (-(-K // self.per) if self.per else 1)


Factors = Callable[[Planes], tuple[F64, F64 | None]]
"""Planes -> (s, offset or None), float64 [rows / Plane.rows, K / group]: the weights of a group are
value * s + offset."""


@dataclass(frozen=True, eq=False)
class WeightFormat:
    """One way to store a weight matrix of N output rows and K inputs.

    Attributes:
        name: unique.
        code: type of the codes.
        code_plane: the array `codes`.
        group: inputs, along K, that share one factor; 0: all of a row, or there are no scales.
        scale: type of a stored scale, None where the format has none.
        scale_plane: the array `scales`; None likewise.
        more: further planes.
        scaling: what the factors are made of: key of the kernels' table of scalings.
        factors: the same in NumPy; None: `scale.decode` of the plane.
        encode: float32 [N, K] -> (codes, scales or None), round to nearest.
        multiple: K must be a multiple of this.
    """

    name: str
    code: CodeType
    code_plane: Plane
    group: int
    scale: ScaleType | None
    scale_plane: Plane | None
    more: tuple[Plane, ...]
    scaling: str
    factors: Factors | None
    encode: Callable[[F32], tuple[Array, Array | None]]
    multiple: int = GROUP

    @property
    def bits(self) -> int:
        """Bits of one code in the plane `codes`."""
        return self.code.bits

    @property
    def code_dtype(self) -> np.dtype[Any]:
        """Dtype of the plane `codes`."""
        return self.code_plane.dtype

    @property
    def k_multiple(self) -> int:
        """K must be a multiple of this: a strip holds whole groups, activations groups of 32."""
        return self.multiple

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        """All its planes, in the order of `PLANES`."""
        planes = [self.code_plane, *self.more]
        if self.scale_plane is not None:
            planes.append(self.scale_plane)
        return tuple(sorted(planes, key=lambda plane: PLANES.index(plane.name)))

    def plane(self, name: str) -> Plane | None:
        """The plane of that name, if the format has it."""
        return next((plane for plane in self.planes if plane.name == name), None)

    @property
    def scale_rows(self) -> int:
        """Output rows that share their scales."""
        return 1 if self.scale_plane is None else self.scale_plane.rows

    def bits_per_weight_of(self, K: int) -> float:
        """Stored bits per weight of rows of K inputs, scales included."""
        return sum(
            8 * plane.dtype.itemsize * plane.shape(1, K)[1] / (plane.rows * K)
            for plane in self.planes
        )

    @property
    def bits_per_weight(self) -> float:
        """The same of long rows, 4096 inputs."""
        return self.bits_per_weight_of(4096)

    def code_shape(self, N: int, K: int) -> tuple[int, int]:
        """Shape of `codes` for an N x K matrix."""
        return self.code_plane.shape(N, K)

    def scale_shape(self, N: int, K: int) -> tuple[int, int] | None:
        """Shape of `scales` for an N x K matrix, None where the format has none."""
        return None if self.scale_plane is None else self.scale_plane.shape(N, K)

    def nbytes(self, N: int, K: int) -> int:
        """Bytes of an N x K matrix as a checkpoint stores it."""
        shapes = [(plane.shape(N, K), plane.dtype.itemsize) for plane in self.planes]
        return sum(rows * elements * itemsize for (rows, elements), itemsize in shapes)

    def decode_codes(self, codes: Array, high: Array | None = None) -> F32:
        """Codes [..., units] -> float32 [..., K], without scales."""
        if self.code.decode is not None:
            return self.code.decode(codes)
        index = unpack_bits(codes, self.code.bits)
        if self.code.high_bits:
            assert high is not None
            index = index | (unpack_high(high, self.code) << np.uint8(self.code.bits))
        values: F32 = np.asarray(self.code.values, np.float32)[index]
        return values

    def dequantize(
        self,
        codes: Array,
        scales: Array | None = None,
        *,
        high: Array | None = None,
        minima: Array | None = None,
        factors: Array | None = None,
    ) -> F32:
        """Reference dequantizer: the planes of an N x K matrix -> float32 [N, K]."""
        values = self.decode_codes(codes, high)
        if self.scale is None:
            return values
        weights = self._scaled(values, scales, minima, factors)
        with np.errstate(over="ignore"):
            return weights.astype(np.float32)

    def exact(self, planes: Planes) -> F64:
        """The same in float64, before the one rounding: of a product that float64 holds, and where
        weights have an offset, of a sum."""
        values = self.decode_codes(planes["codes"], planes.get("high"))
        if self.scale is None:
            return values.astype(np.float64)
        return self._scaled(values, planes["scales"], planes.get("minima"), planes.get("factors"))

    def _scaled(
        self, values: F32, scales: Array | None, minima: Array | None, factors: Array | None
    ) -> F64:
        assert self.scale is not None
        assert scales is not None
        planes = {"scales": scales, "minima": minima, "factors": factors}
        if self.factors is None:
            s, offset = self.scale.decode(scales).astype(np.float64), None
        else:
            s, offset = self.factors({n: p for n, p in planes.items() if p is not None})
        N, K = values.shape

        def spread(of_groups: F64) -> F64:
            """To every weight: [N, K]."""
            wide = np.repeat(of_groups, self.group or K, axis=1)[:, :K]
            return np.repeat(wide, self.scale_rows, axis=0)[:N]

        # in float64: 6 * 2^127 overflows float32 on the way to a finite product otherwise
        weights = values.astype(np.float64) * spread(s)
        if offset is not None:
            weights += spread(offset)
        return weights


class LayerFormats(NamedTuple):
    """How the experts of a layer are stored, or held.

    Attributes:
        gate_up: format of the gate and up projections, which a strip has side by side.
        down: of the down projection.
    """

    gate_up: WeightFormat
    down: WeightFormat

    @property
    def name(self) -> str:
        """One name where they are the same, else both."""
        if self.gate_up is self.down:
            return self.gate_up.name
        return f"{self.gate_up.name} (gate, up) and {self.down.name} (down)"

    @property
    def each(self) -> tuple[WeightFormat, ...]:
        """The different ones."""
        return (self.gate_up,) if self.gate_up is self.down else tuple(self)


def layer_formats(fmt: WeightFormat | LayerFormats) -> LayerFormats:
    """One format for all projections, or those of each."""
    return fmt if isinstance(fmt, LayerFormats) else LayerFormats(fmt, fmt)


def no_encoder(name: str, why: str) -> Callable[[F32], tuple[Array, Array | None]]:
    """The encoder of a format that is read, and not made."""

    def encode(w: F32) -> tuple[Array, Array | None]:
        raise ValueError(f"weights are not quantized to {name}: {why}")

    return encode


def code_plane(code: CodeType, dtype: Any = np.uint8) -> Plane:
    """The plane of codes, `dtype` elements."""
    kind = np.dtype(dtype)
    return Plane("codes", kind, GROUP, GROUP * code.bits // (8 * kind.itemsize))


def high_plane(code: CodeType) -> Plane:
    """The plane of upper bits: one 32-bit word in a group for each bit of a code, see
    `unpack_high`."""
    return Plane("high", np.dtype(np.uint32), GROUP, code.high_bits)


INT8_CODE = CodeType("int8", 8, decode=lambda codes: codes.view(np.int8).astype(np.float32))
E4M3_CODE = CodeType("e4m3", 8, decode=lambda codes: E4M3_VALUES[codes])
BF16_CODE = CodeType("bf16", 16, decode=bf16_to_f32)
