"""Zero points are taken off whole sums: exact at the ends of all ranges, on every tier."""

from __future__ import annotations

import numpy as np
import pytest

from hybrid_moe.cpu_kernels.dsl.tiers import TIERS
from hybrid_moe.cpu_kernels.kernels.dot import DOT_ARITY
from hybrid_moe.cpu_kernels.kernels.library import kernel_set
from hybrid_moe.cpu_kernels.strips.pack import pack_rows
from hybrid_moe.formats.strips import STRIP_ROWS, strip_layout
from hybrid_moe.formats.table import FORMATS
from hybrid_moe.formats.tensors import Matrix
from tests.cpu_kernels.cases import Array, from_bf16, to_bf16
from tests.cpu_kernels.emulation import QUICK
from tests.cpu_kernels.toolbox import aligned, callable_at

FMT = FORMATS["INT4_G32_FP16_Z1"]
K = 64


def _products(name: str, codes: Array, zeros: Array, x: Array) -> Array:
    """Nibbles [64, K], zero points [64, 2], bf16 bits [K] -> the dot kernel's sums, float32 [64];
    scales are 1 and, of the second group, 0.5."""
    kernels, layout = kernel_set(FMT.name, QUICK[name]), strip_layout(FMT, K)
    packed = codes[:, ::2] | (codes[:, 1::2] << 4)
    scales = np.tile(np.array([1, 0.5], np.float16), (STRIP_ROWS, 1))
    minima = zeros[:, :1] | (zeros[:, 1:] << 4)
    strip = aligned((layout.nbytes,), np.uint8)
    matrix = Matrix(packed.astype(np.uint8), scales, minima=minima.astype(np.uint8))
    pack_rows(strip.ctypes.data, range(1), layout, matrix, STRIP_ROWS)
    size = kernels.encoding.group_bytes
    row, sums = aligned((2 * size + 4096,), np.uint8), aligned((32, STRIP_ROWS), np.float32)
    callable_at(kernels.encode, 7)(x, 2 * K, row, 2 * size, 1, 2, size)
    callable_at(kernels.direct.kernels[1], DOT_ARITY)(strip, strip, row, 1, sums, 0, 2)
    return sums[0]


@pytest.mark.parametrize("name", TIERS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_exact(name: str, sign: int) -> None:
    """n = 0 or 15 and z = 0 or 15 against activations of one sign, as large as 16320 steps: sums up
    to 32 * 16 * 16320 = 8,355,840, each a float32."""
    ends = np.array([0, 15])
    n, z = (np.resize(a, STRIP_ROWS) for a in (np.repeat(ends, 2), ends))
    codes, zeros = np.repeat(n[:, None], K, 1), np.repeat(z[:, None], 2, 1)
    x = to_bf16(np.full(K, sign * 255 / 128))
    weights = (n - z - 1)[:, None] * np.repeat([1, 0.5], 32)
    assert weights.min() == -16
    exact = weights @ from_bf16(x)
    assert np.array_equal(_products(name, codes, zeros, x), exact)


@pytest.mark.parametrize("name", TIERS)
def test_codes_that_are_the_zero_point_give_nothing(name: str) -> None:
    """Exactly 0, whatever the activations are."""
    z = np.resize(np.arange(15), (STRIP_ROWS, 2))
    codes = np.repeat(z + 1, 32, axis=1)
    x = to_bf16(np.random.default_rng(6).standard_normal(K) * 1e3)
    assert not _products(name, codes, z, x).any()
