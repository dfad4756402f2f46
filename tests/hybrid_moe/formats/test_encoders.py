"""Every quantizer of the table: nearest codes, the best of its steps, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from hybrid_moe.formats.integers import INT4_ROW_STEPS, INT4_STEPS
from hybrid_moe.formats.numbers import E4M3_VALUES
from hybrid_moe.formats.table import BF16, FORMATS, METHODS
from hybrid_moe.formats.weight_format import WeightFormat, unpack_bits

MADE = sorted({m.made.name for m in METHODS.values() if m.made} - {BF16.name})
"""Formats that weights are quantized to."""
K = 256

every_made = pytest.mark.parametrize("fmt", [FORMATS[name] for name in MADE], ids=MADE)


def ordinary() -> np.ndarray:
    """Normal weights, rows with outliers, a row of a few values, and ties: float32 [48, K]. Steps
    are normal numbers of every scale's type."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((48, K))
    w[8:16] = rng.standard_t(2, (8, K))
    w[16:24] *= 2.0 ** rng.integers(-6, 4, (8, K))
    w[24] = rng.choice([0.0, -0.0, 1.0, -8.0], K)
    w[25:32] = rng.integers(-16, 17, (7, K)) / 2  # halves of a step of 1
    w[32:, : K // 2] = 0
    return np.where(np.abs(w) < 2.0**-10, 0, w).astype(np.float32)


def per_weight(fmt: WeightFormat, scales: np.ndarray) -> np.ndarray:
    """The factor of each weight, float64 [N, K]."""
    assert fmt.scale is not None
    s = fmt.scale.decode(scales).astype(np.float64)
    return np.repeat(s, fmt.group or K, axis=1)[:, :K].repeat(fmt.scale_rows, axis=0)


def values_of(fmt: WeightFormat) -> np.ndarray:
    """What its codes may be: those that the quantizer makes."""
    if fmt.code.values is not None:
        return np.unique(np.asarray(fmt.code.values, np.float64))
    if fmt.code.name == "int8":
        return np.arange(-127, 128, dtype=np.float64)
    return np.unique(E4M3_VALUES[np.isfinite(E4M3_VALUES)].astype(np.float64))


@every_made
def test_codes_are_the_nearest(fmt: WeightFormat) -> None:
    """Of all values that a code may have. Where w / s comes out as q' instead of q, by up to e, the
    nearest of q' is at most 2e farther from q than the nearest of q: e is a rounding to float32 of
    up to 448; and with Q8_0's step, which is used before it is rounded to fp16, 2^-11 of 127."""
    w = ordinary()
    codes, scales = fmt.encode(w)
    assert scales is not None
    assert (codes.shape, codes.dtype) == (fmt.code_shape(*w.shape), fmt.code_dtype)
    assert scales.shape == fmt.scale_shape(*w.shape) and scales.dtype == fmt.scale.dtype  # type: ignore[union-attr]
    factor = per_weight(fmt, scales)[: len(w)]
    values = values_of(fmt)
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = np.nan_to_num(w / factor)
    upper = np.searchsorted(values, quotient).clip(1, len(values) - 1)
    nearest = np.minimum(abs(values[upper] - quotient), abs(values[upper - 1] - quotient))
    distance = abs(fmt.decode_codes(codes).astype(np.float64) - quotient)
    off = 127 * 2.0**-11 if fmt.name == "INT8" else 448 * 2.0**-24
    assert (distance <= nearest + 2 * off)[factor > 0].all()


@pytest.mark.parametrize("name", [name for name in MADE if name.startswith("INT4")])
def test_int4_has_the_step_of_least_error(name: str) -> None:
    fmt, w = FORMATS[name], ordinary()
    assert fmt.scale is not None
    codes, scales = fmt.encode(w)
    nibbles = unpack_bits(codes, 4).astype(np.float64) - 8
    groups = w.astype(np.float64).reshape(len(w), -1, fmt.group or K)
    maxima = np.abs(groups).max(-1)

    def error(s: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.square(groups - s[..., None] * whole.reshape(groups.shape)).sum(-1)

    chosen = error(fmt.scale.decode(scales).astype(np.float64), nibbles)
    tried = []
    for divisor in INT4_STEPS if fmt.group else INT4_ROW_STEPS:
        s = maxima / divisor
        with np.errstate(divide="ignore", invalid="ignore"):
            whole = np.nan_to_num(np.rint(groups / s[..., None])).clip(-8, 7)
        tried.append(error(s, whole))
    # scales are rounded by 2^-9 at most (bf16), which moves an error of e by no more than about
    # 2^-8 of the group's length times the root of e
    length = np.square(groups).sum(-1)
    least = np.min(tried, axis=0)
    assert (np.sqrt(chosen) <= np.sqrt(least) + 2.0**-8 * np.sqrt(length)).all()


@every_made
def test_a_matrix_of_zeros_stays_one(fmt: WeightFormat) -> None:
    assert not fmt.dequantize(*fmt.encode(np.zeros((3, K), np.float32))).any()


@every_made
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_no_format_can_hold_is_refused(fmt: WeightFormat, value: float) -> None:
    w = np.zeros((2, K), np.float32)
    w[1, 40] = value
    with pytest.raises(ValueError, match=r"NaN or infinite, which .* cannot hold"):
        fmt.encode(w)


READ_ONLY = [f.name for f in FORMATS.values() if f.plane("minima") or f.plane("factors")]


@pytest.mark.parametrize("name", READ_ONLY)
def test_formats_that_are_only_read(name: str) -> None:
    fmt = FORMATS[name]
    with pytest.raises(ValueError, match=f"weights are not quantized to {name}"):
        fmt.encode(np.zeros((1, K), np.float32))
