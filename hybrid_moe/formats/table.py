"""Weight formats as data.

A `WeightFormat` is one row of `FORMATS`. From the row come the reference dequantizer, the
quantizer, the sizes that the packer and the planner use, and (through `cpu_kernels`) the decode
step that the kernel generator emits. This module is at the bottom of the house: it imports
nothing of the project.

Sources: OCP Microscaling Formats (MX) v1.0 for E2M1 and E8M0; ggml's Q8_0 (`block_q8_0` in
ggml-common.h, `quantize_row_q8_0_ref` in ggml-quants.c) for INT8. The tests hold every table
against `ml_dtypes`, or the encoder against these sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
F32: TypeAlias = npt.NDArray[np.float32]

UE8M0_NAN = 255
"""The one E8M0 byte that is no power of two. A checkpoint that holds it is refused."""
FP16_INFINITE = np.uint16(0x7C00)
"""The exponent bits of an fp16 that is NaN or infinite."""
INT8_MOST = 127
"""Largest code: codes are symmetric. -128 is no code that the encoder makes, but is decoded."""

E2M1_VALUES: tuple[float, ...] = (
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0,
    -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
)  # fmt: skip
"""Value of each 4-bit code: sign, two exponent bits (bias 1), one mantissa bit."""


@dataclass(frozen=True)
class ScaleType:
    """How one stored scale becomes a factor.

    Attributes:
        name: name used in messages.
        dtype: NumPy dtype of a stored scale.
        decode: stored scales -> float32 factors, same shape.
        invalid: stored scales -> mask of those that have no finite factor.
    """

    name: str
    dtype: np.dtype[Any]
    decode: Callable[[Array], F32]
    invalid: Callable[[Array], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class WeightFormat:
    """One way to store a weight matrix of N output rows and K inputs.

    Attributes:
        name: the `method=` that selects it.
        bits: bits of one code. Codes of a row are contiguous along K, low bits first.
        code_dtype: dtype of `codes`; a row has K * bits / (8 * itemsize) of them.
        group: inputs (along K) that share one scale; 0 where the format has no scales.
        scale: type of a scale, None where the format has no scales.
        decode_codes: codes [..., units] -> float32 [..., K], without scales.
        encode: float32 [N, K] -> (codes, scales or None), round to nearest.
    """

    name: str
    bits: int
    code_dtype: np.dtype[Any]
    group: int
    scale: ScaleType | None
    decode_codes: Callable[[Array], F32]
    encode: Callable[[F32], tuple[Array, Array | None]]

    @property
    def k_multiple(self) -> int:
        """K must be a multiple of this: a panel holds whole groups, activations groups of 32."""
        return max(32, self.group)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        if self.scale is None:
            return float(self.bits)
        return self.bits + 8 * self.scale.dtype.itemsize / self.group

    def code_shape(self, N: int, K: int) -> tuple[int, int]:
        """Shape of `codes` for an N x K matrix."""
        return N, K * self.bits // (8 * self.code_dtype.itemsize)

    def scale_shape(self, N: int, K: int) -> tuple[int, int] | None:
        """Shape of `scales` for an N x K matrix, None where the format has none."""
        return None if self.scale is None else (N, K // self.group)

    def nbytes(self, N: int, K: int) -> int:
        """Bytes of an N x K matrix as a checkpoint stores it."""
        return round(N * K * self.bits_per_weight / 8)

    def dequantize(self, codes: Array, scales: Array | None) -> F32:
        """Reference dequantizer: codes [N, units], scales [N, K/group] -> float32 [N, K]."""
        values = self.decode_codes(codes)
        if self.scale is None:
            return values
        assert scales is not None
        grouped = values.reshape(*values.shape[:-1], -1, self.group)
        # in float64: 6 * 2^127 overflows float32 on the way to a finite product otherwise
        factors = self.scale.decode(scales).astype(np.float64)[..., None]
        with np.errstate(over="ignore"):
            dequantized: F32 = (grouped * factors).astype(np.float32).reshape(values.shape)
        return dequantized


def ue8m0_to_float(codes: Array) -> F32:
    """E8M0 bytes -> 2^(s - 127) in float32; 0 is 2^-127 (a subnormal), 255 is NaN."""
    s = codes.view(np.uint8) if codes.dtype.itemsize == 1 else codes.astype(np.uint8)
    bits = s.astype(np.uint32) << np.uint32(23)
    bits = np.where(s == 0, np.uint32(0x0040_0000), bits)
    bits = np.where(s == UE8M0_NAN, np.uint32(0x7FC0_0000), bits)
    factors: F32 = bits.view(np.float32)
    return factors


def unpack_nibbles(codes: Array) -> npt.NDArray[np.uint8]:
    """uint8 [..., K/2] -> 4-bit codes as uint8 [..., K]; the low nibble is the even input."""
    low, high = codes & np.uint8(15), codes >> np.uint8(4)
    nibbles: npt.NDArray[np.uint8] = np.stack([low, high], axis=-1)
    return nibbles.reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def bf16_to_f32(bits: Array) -> F32:
    """bfloat16 bit patterns (uint16) -> float32, exact."""
    values: F32 = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def f32_to_bf16(x: F32) -> npt.NDArray[np.uint16]:
    """float32 -> bfloat16 bit patterns, round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    nan = np.isnan(bits.view(np.float32))
    result: npt.NDArray[np.uint16] = np.where(nan, quiet_nan, rounded).astype(np.uint16)
    return result


def _decode_e2m1(codes: Array) -> F32:
    return np.asarray(E2M1_VALUES, np.float32)[unpack_nibbles(codes)]


def _groups_of_32(w: F32, name: str) -> tuple[F32, F32]:
    """Weights [N, K] in groups [N, K / 32, 32], and their largest magnitudes [N, K / 32], for the
    format of that name.

    Raises:
        ValueError: no whole groups, NaN or infinity.
    """
    N, K = w.shape
    if K % 32:
        raise ValueError(f"rows of {K} weights are no multiple of {name}'s group of 32")
    groups = np.asarray(w, np.float32).reshape(N, K // 32, 32)
    maxima = np.abs(groups).max(axis=-1)
    if not np.isfinite(maxima).all():
        raise ValueError(f"a weight is NaN or infinite, which {name} cannot hold")
    return groups, maxima


def _encode_mxfp4(w: F32) -> tuple[Array, Array | None]:
    """MX v1.0, section 6.3: shared exponent floor(log2(max)) - 2, elements to nearest even.

    Of that exponent and the next one the closer fit (least squared error) is kept for each group:
    the standard's exponent saturates maxima in (6, 8) * 2^e to 6, which costs accuracy that the
    format need not lose; every result is still a valid MX block.
    """
    groups, maxima = _groups_of_32(w, "MXFP4")
    _, exponents = np.frexp(maxima)  # max = m * 2^exponent, m in [0.5, 1)
    scales = np.clip(exponents - 1 - 2 + 127, 0, 253).astype(np.uint8)
    # Scaling by a power of two is exact in float32 wherever a code other than 0 can result.
    magnitudes = np.abs(groups) * ue8m0_to_float(np.uint8(254) - scales)[..., None]  # in [0, 8)
    codes, errors = _round_e2m1(magnitudes)
    wider_codes, wider_errors = _round_e2m1(magnitudes * np.float32(0.5))
    wider = 4 * wider_errors < errors  # in units of the square of the narrower scale
    codes = np.where(wider[..., None], wider_codes, codes)
    codes = (codes | (np.signbit(groups).view(np.uint8) << np.uint8(3))).reshape(w.shape)
    return codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4)), scales + wider


def _round_e2m1(magnitudes: F32) -> tuple[npt.NDArray[np.uint8], F32]:
    """Nearest codes (ties to even) of `magnitudes` [..., 32], and the squared errors [...]."""
    values = np.asarray(E2M1_VALUES[:8], np.float32)
    codes = np.zeros(magnitudes.shape, np.uint8)
    for code, midpoint in enumerate((values[1:] + values[:-1]) / 2):
        # a tie goes to the even one of `code` and `code + 1`
        codes += (magnitudes >= midpoint) if code % 2 else (magnitudes > midpoint)
    return codes, np.square(values[codes] - magnitudes).sum(axis=-1)


def _encode_int8(w: F32) -> tuple[Array, Array | None]:
    """ggml's Q8_0, bit for bit: d = max / 127 in float32, codes round(x * (1 / d)) with ties away
    from zero, and d stored as fp16.

    Maxima below about 127 * 2^-25 have a d of zero in fp16, so their group becomes zeros; those of
    about 127 * 2^-14 have fewer bits in d. Where 1 / d is infinite too (max below 2^-121), ggml's
    codes are undefined, and these are 0.
    """
    groups, maxima = _groups_of_32(w, "INT8")
    steps = maxima / np.float32(INT8_MOST)
    with np.errstate(over="ignore", divide="ignore"):
        scales = steps.astype(np.float16)
        inverse = np.float32(1) / steps
    if not np.isfinite(scales).all():
        raise ValueError(
            f"a weight has magnitude {maxima.max():.4g}, beyond what fp16 scales of INT8 reach "
            f'(127 * 65504 = 8.3e6): keep such a matrix in "BF16"'
        )
    inverse[np.isinf(inverse)] = 0
    scaled = groups * inverse[..., None]
    magnitudes = np.abs(scaled)
    whole = np.floor(magnitudes)
    whole += magnitudes - whole >= np.float32(0.5)
    codes = np.copysign(whole, scaled, out=whole).astype(np.int8)
    return codes.reshape(w.shape), scales


UE8M0 = ScaleType("ue8m0", np.dtype(np.uint8), ue8m0_to_float, lambda s: s == UE8M0_NAN)
FP16 = ScaleType(
    "fp16",
    np.dtype(np.float16),
    lambda s: s.astype(np.float32),
    lambda s: (s.view(np.uint16) & FP16_INFINITE) == FP16_INFINITE,
)

MXFP4 = WeightFormat(
    name="MXFP4",
    bits=4,
    code_dtype=np.dtype(np.uint8),
    group=32,
    scale=UE8M0,
    decode_codes=_decode_e2m1,
    encode=_encode_mxfp4,
)

BF16 = WeightFormat(
    name="BF16",
    bits=16,
    code_dtype=np.dtype(np.uint16),
    group=0,
    scale=None,
    decode_codes=bf16_to_f32,
    encode=lambda w: (f32_to_bf16(w), None),
)

INT8 = WeightFormat(
    name="INT8",
    bits=8,
    code_dtype=np.dtype(np.int8),
    group=32,
    scale=FP16,
    decode_codes=lambda codes: codes.astype(np.float32),
    encode=_encode_int8,
)

FORMATS: Mapping[str, WeightFormat] = MappingProxyType({f.name: f for f in (MXFP4, INT8, BF16)})
"""Every format by its `method` name. A new format is a new row here and a row in the tests."""


def format_named(method: str) -> WeightFormat:
    """The format that `method` names, in any case.

    Raises:
        ValueError: no format has that name; the message lists those that exist.
    """
    fmt = FORMATS.get(str(method).upper())
    if fmt is None:
        raise ValueError(
            f"unknown method {method!r}: available methods are {', '.join(sorted(FORMATS))}"
        )
    return fmt


AS_STORED = "STORED"
"""Stands for no method where a name is needed: every layer stays in the format that its checkpoint
stores, which need not be the same for all."""


def chosen_format(method: str | None) -> WeightFormat | None:
    """The format that `method` names; None for None or "STORED", which leave it to the checkpoint.

    Raises:
        ValueError: as `format_named`.
    """
    if method is None or str(method).upper() == AS_STORED:
        return None
    return format_named(method)
