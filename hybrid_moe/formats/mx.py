"""Microscaling formats and their relatives: MXFP4, MXFP8, NVFP4.

Sources: OCP Microscaling Formats (MX) v1.0 for E2M1, E4M3 and E8M0; NVIDIA ModelOpt's NVFP4
(`weight`, `weight_scale` E4M3 for 16 inputs, `weight_scale_2` float32 for the tensor).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hybrid_moe.formats.numbers import (
    E4M3,
    E4M3_MOST,
    F32,
    F64,
    UE8M0,
    Array,
    f32_to_e4m3,
    ue8m0_to_float,
)
from hybrid_moe.formats.weight_format import (
    E4M3_CODE,
    CodeType,
    Plane,
    Planes,
    WeightFormat,
    code_plane,
    no_encoder,
    pack_bits,
)

E2M1_VALUES: tuple[float, ...] = (
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0,
    -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
)  # fmt: skip
"""Value of each 4-bit code: sign, two exponent bits (bias 1), one mantissa bit."""
E2M1_CODE = CodeType("e2m1", 4, values=E2M1_VALUES, step=0.5)


def groups_of(w: F32, name: str, size: int) -> tuple[F32, F32]:
    """Weights [N, K] in groups [N, K / size, size], and their largest magnitudes [N, K / size],
    for the format of that name.

    Raises:
        ValueError: no whole groups, NaN or infinity.
    """
    N, K = w.shape
    if K % size:
        raise ValueError(f"rows of {K} weights are no multiple of {name}'s group of {size}")
    groups = np.asarray(w, np.float32).reshape(N, K // size, size)
    maxima = np.abs(groups).max(axis=-1)
    if not np.isfinite(maxima).all():
        raise ValueError(f"a weight is NaN or infinite, which {name} cannot hold")
    return groups, maxima


def sum_of_squares(errors: F32) -> F32:
    """Of groups [..., size] -> [...], in an order that is the same everywhere: each 32nd element in
    turn, then halves of the 32 sums."""
    sums: F32 = np.square(errors).reshape(*errors.shape[:-1], -1, 32).sum(axis=-2, dtype=np.float32)
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def _encode_mxfp4(w: F32) -> tuple[Array, Array | None]:
    """MX v1.0, section 6.3: shared exponent floor(log2(max)) - 2, elements to nearest even.

    Of that exponent and the next one the closer fit (least squared error) is kept for each group:
    the standard's exponent saturates maxima in (6, 8) * 2^e to 6, which costs accuracy that the
    format need not lose; every result is still a valid MX block.
    """
    groups, maxima = groups_of(w, "MXFP4", 32)
    _, exponents = np.frexp(maxima)  # max = m * 2^exponent, m in [0.5, 1)
    scales = np.clip(exponents - 1 - 2 + 127, 0, 253).astype(np.uint8)
    # Scaling by a power of two is exact in float32 wherever a code other than 0 can result.
    magnitudes = np.abs(groups) * ue8m0_to_float(np.uint8(254) - scales)[..., None]  # in [0, 8)
    codes, errors = _round_e2m1(magnitudes)
    wider_codes, wider_errors = _round_e2m1(magnitudes * np.float32(0.5))
    wider = 4 * wider_errors < errors  # in units of the square of the narrower scale
    codes = np.where(wider[..., None], wider_codes, codes)
    codes = (codes | (np.signbit(groups).view(np.uint8) << np.uint8(3))).reshape(w.shape)
    return pack_bits(codes, 4), scales + wider


def _round_e2m1(magnitudes: F32) -> tuple[npt.NDArray[np.uint8], F32]:
    """Nearest codes (ties to even) of `magnitudes` [..., 32], and the squared errors [...]."""
    values = np.asarray(E2M1_VALUES[:8], np.float32)
    codes = np.zeros(magnitudes.shape, np.uint8)
    for code, midpoint in enumerate((values[1:] + values[:-1]) / 2):
        # a tie goes to the even one of `code` and `code + 1`
        codes += (magnitudes >= midpoint) if code % 2 else (magnitudes > midpoint)
    return codes, sum_of_squares(values[codes] - magnitudes)


def _encode_mxfp8(w: F32) -> tuple[Array, Array | None]:
    """MX v1.0, section 6.3: shared exponent floor(log2(max)) - 8; one more where elements would
    exceed 448, so that none saturates."""
    groups, maxima = groups_of(w, "MXFP8", 32)
    mantissas, exponents = np.frexp(maxima)
    wider = mantissas > E4M3_MOST / 512
    scales = np.clip(exponents - 1 - 8 + wider + 127, 0, 254).astype(np.uint8)
    scaled = np.ldexp(groups.astype(np.float64), 127 - scales.astype(np.int64)[..., None])
    return f32_to_e4m3(scaled.astype(np.float32)).reshape(w.shape), scales


def _nvfp4_factors(planes: Planes) -> tuple[F64, F64 | None]:
    """E4M3 scales [N, K / 16] times float32 factors [N, 1]."""
    return E4M3.decode(planes["scales"]).astype(np.float64) * planes["factors"], None


MXFP4 = WeightFormat(
    name="MXFP4",
    code=E2M1_CODE,
    code_plane=code_plane(E2M1_CODE),
    group=32,
    scale=UE8M0,
    scale_plane=Plane("scales", UE8M0.dtype, 32),
    more=(),
    scaling="ue8m0",
    factors=None,
    encode=_encode_mxfp4,
)

MXFP8 = WeightFormat(
    name="MXFP8",
    code=E4M3_CODE,
    code_plane=code_plane(E4M3_CODE),
    group=32,
    scale=UE8M0,
    scale_plane=Plane("scales", UE8M0.dtype, 32),
    more=(),
    scaling="ue8m0",
    factors=None,
    encode=_encode_mxfp8,
)

NVFP4 = WeightFormat(
    name="NVFP4",
    code=E2M1_CODE,
    code_plane=code_plane(E2M1_CODE),
    group=16,
    scale=E4M3,
    scale_plane=Plane("scales", E4M3.dtype, 16),
    more=(Plane("factors", np.dtype(np.float32), 0),),
    scaling="e4m3 * row",
    factors=_nvfp4_factors,
    encode=no_encoder("NVFP4", "its scales are a calibration's (ModelOpt); MXFP4 is made here"),
)
"""The factor of a row is the tensor's `weight_scale_2`, the same for all rows: kept as it is."""
