"""Activations of 8 bits, as dot kernels read them."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.kernels import encode
from hybrid_moe.cpu_kernels.kernels.format_kernels import format_kernels
from hybrid_moe.cpu_kernels.kernels.library import KernelSet, kernel_set
from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.table import FORMATS
from hybrid_moe.formats.weight_format import WeightFormat, quads
from tests.cpu_kernels.cases import Array, from_bf16, to_bf16
from tests.cpu_kernels.emulation import RUNNABLE
from tests.cpu_kernels.toolbox import aligned, callable_at
from tests.reference import INT8_ACTIVATION_ERROR

TIERS = ("portable", "avx2", "avx512_vbmi")
"""Encoding is generic but for biases and reductions: narrow, wide and widest registers."""
Cases = pytest.mark.parametrize(
    ("fmt", "name"),
    [(fmt, name) for fmt in (INT8, MXFP4) for name in TIERS],
    ids=lambda value: value if isinstance(value, str) else value.name,
)


@functools.lru_cache(maxsize=8)
def _kernels(fmt_name: str, name: str) -> KernelSet:
    return kernel_set(fmt_name, RUNNABLE[name], 8)


def _encode(fmt: WeightFormat, name: str, x: Array) -> tuple[Array, Array]:
    """bf16 bits [T, K] -> (q int64 [T, groups, 32] in the order of inputs, step of q float64)."""
    kernels = _kernels(fmt.name, name)
    T, groups = len(x), x.shape[1] // 32
    size = kernels.encoding.group_bytes
    rows = aligned((T, groups, size), np.uint8, fill=0xFF)
    encode_rows = callable_at(kernels.encode, 7)
    encode_rows(np.ascontiguousarray(x), 2 * x.shape[1], rows, groups * size, T, groups, size)
    at = encode.FIXED8_GROUP
    stored = rows[..., at.low : at.low + 32].view(np.int8).astype(np.int64)
    q = np.empty_like(stored)
    q[..., quads(fmt.bits).ravel()] = stored
    factors = np.ascontiguousarray(rows[..., at.factor : at.factor + 4]).view(np.float32)[..., 0]
    return q, factors.astype(np.float64) * (2 if fmt is MXFP4 else 1)  # its weights are doubled


@Cases
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0, 3, 12, 40]))
def test_half_a_step_at_most(fmt: WeightFormat, name: str, seed: int, spread: int) -> None:
    """For maxima from 2^-99 to the largest bf16; the maximum itself becomes 127 or -127."""
    rng = np.random.default_rng(seed)
    exponents = int(rng.integers(-50, 80)) + rng.integers(-spread, spread + 1, (3, 96))
    x = to_bf16(np.ldexp(rng.standard_normal((3, 96)), exponents))
    q, steps = _encode(fmt, name, x)
    exact = from_bf16(x).reshape(3, 3, 32)
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    assert (np.abs(q * steps[..., None] - exact) <= INT8_ACTIVATION_ERROR * largest).all()
    assert (np.abs(q).max(axis=-1) == 127).all()


@Cases
def test_special_groups(fmt: WeightFormat, name: str) -> None:
    x = np.zeros((7, 32), np.uint16)
    x[1] = 0x8000  # -0
    x[2] = 0x0001  # the smallest subnormal: far below 2^-100
    x[3] = 0x7F7F  # the largest number
    x[4, 5], x[5, 31], x[6, 0] = 0x7FC0, 0x7F80, 0xFF80
    q, steps = _encode(fmt, name, x)
    assert (q[:3] == 0).all() and np.isfinite(steps[:4]).all()
    assert (q[3] == 127).all()
    assert np.abs(127 * steps[3, 0] - from_bf16(x[3, :1])) <= 2.0**-22 * from_bf16(x[3, :1])
    assert np.isnan(steps[4:]).all()


@Cases
def test_small_maxima_lose_what_is_below_a_step(fmt: WeightFormat, name: str) -> None:
    """2^-100 / 127 is the least step."""
    x = to_bf16(np.ldexp(np.linspace(-1, 1, 32), np.array([[-99], [-100], [-103], [-120]])))
    q, steps = _encode(fmt, name, x)
    exact = from_bf16(x).reshape(4, 1, 32)
    least = 2.0**-100 * INT8_ACTIVATION_ERROR
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    error = np.abs(q * steps[..., None] - exact)
    assert (error <= np.maximum(INT8_ACTIVATION_ERROR * largest, least)).all()
    assert np.abs(q).max(axis=-1).ravel().tolist() == [127, 127, 16, 0]


@pytest.mark.parametrize("name", ["INT8", "INT4_G128_FP16_Z1", "Q2_K", "NVFP4"])
def test_groups_are_whole_vectors(name: str) -> None:
    """A tile is copied 16 bytes at a time; one plane needs little more than half of two."""
    wide, narrow = (format_kernels(FORMATS[name], bits).encoding.group_bytes for bits in (16, 8))
    assert narrow % 16 == 0 and narrow <= 0.67 * wide
