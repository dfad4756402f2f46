"""Quantizers of large matrices, compiled by numba at their first call: importing this module
imports numba.

Each gives the bits of its format's `encode`, which says what is computed and why: float32, in the
same order. What takes NumPy no time, the steps of groups, is taken from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import numba
import numpy as np

from hybrid_moe.formats.integers import GPTQ_SYMMETRIC, INT4_ROW, RAW_INT4, int4_steps
from hybrid_moe.formats.mx import E2M1_VALUES, MXFP4, groups_of
from hybrid_moe.formats.numbers import F32, Array
from hybrid_moe.formats.weight_format import WeightFormat

_Loop = TypeVar("_Loop", bound=Callable[..., Any])
Encoder = Callable[[F32], tuple[Array, Array]]
_MAGNITUDES = np.asarray(E2M1_VALUES[:8], np.float32)


def _compiled(function: _Loop) -> _Loop:
    """Compiled without the interpreter's lock; x / 0 is what NumPy makes of it."""
    compiled: _Loop = numba.njit(nogil=True, error_model="numpy")(function)
    return compiled


@_compiled
def _e2m1(x: Any) -> Any:
    """Nearest code of a magnitude, ties to even."""
    below = np.uint8(x > np.float32(0.25)) + np.uint8(x >= np.float32(0.75))
    middle = np.uint8(x > np.float32(1.25)) + np.uint8(x >= np.float32(1.75))
    above = np.uint8(x > np.float32(2.5)) + np.uint8(x >= np.float32(3.5))
    return np.uint8(below + middle + above + np.uint8(x > np.float32(5.0)))


@_compiled
def _sum_of_32(t: F32) -> Any:
    """Halves of 32 numbers, which it overwrites; as `formats.mx.sum_of_squares`."""
    for i in range(16):
        t[i] += t[i + 16]
    for i in range(8):
        t[i] += t[i + 8]
    for i in range(4):
        t[i] += t[i + 4]
    return (t[0] + t[2]) + (t[1] + t[3])


@_compiled
def _mxfp4(w: F32, values: F32, codes: Array, scales: Array) -> None:
    """float32 [groups, 32] -> bytes [groups, 16], E8M0 [groups]."""
    power, x = np.empty(1, np.uint32), np.empty(32, np.float32)
    narrow, wide = np.empty(32, np.uint8), np.empty(32, np.uint8)
    errors, wide_errors = np.empty(32, np.float32), np.empty(32, np.float32)
    largest = np.empty(1, np.float32)
    for g in range(w.shape[0]):
        group = w[g]
        most = np.float32(0)
        for i in range(32):
            most = max(most, abs(group[i]))
        largest[0] = most
        exponent = np.int64(largest.view(np.uint32)[0] >> np.uint32(23))
        scale = min(max(exponent - 2, 0), 253) if most > 0 else 124
        power[0] = np.uint32((254 - scale) << 23)
        factor = power.view(np.float32)[0]
        for i in range(32):
            x[i] = abs(group[i]) * factor
        for i in range(32):
            narrow[i] = _e2m1(x[i])
            wide[i] = _e2m1(x[i] * np.float32(0.5))
        for i in range(32):
            error = values[narrow[i]] - x[i]
            errors[i] = error * error
            error = values[wide[i]] - x[i] * np.float32(0.5)
            wide_errors[i] = error * error
        wider = np.float32(4) * _sum_of_32(wide_errors) < _sum_of_32(errors)
        best = wide if wider else narrow
        signs = group.view(np.uint32)
        for i in range(16):
            low = best[2 * i] | np.uint8((signs[2 * i] >> np.uint32(31)) << np.uint32(3))
            high = best[2 * i + 1] | np.uint8((signs[2 * i + 1] >> np.uint32(31)) << np.uint32(3))
            codes[g, i] = low | np.uint8(high << np.uint8(4))
        scales[g] = np.uint8(scale + wider)


@_compiled
def _int4(w: F32, steps: F32, codes: Array, chosen: Array) -> None:
    """float32 [groups, size] and steps [tried, groups] -> bytes [groups, size / 2] and the index of
    the best step [groups]."""
    size = w.shape[1]
    lanes, whole = np.empty(32, np.float32), np.empty((2, size), np.int8)
    for g in range(w.shape[0]):
        least, best = np.float32(np.inf), 0
        for c in range(steps.shape[0]):
            step, tried = steps[c, g], whole[1 - best]
            lanes[:] = np.float32(0)
            for first in range(0, size, 32):
                for i in range(32):
                    x = w[g, first + i] / step
                    x = np.float32(0) if np.isnan(x) else x
                    x = np.float32(7) if x == np.inf else x
                    x = np.float32(-8) if x == -np.inf else x
                    n = min(max(np.rint(x), np.float32(-8)), np.float32(7))
                    tried[first + i] = np.int8(n)
                    error = x - n
                    lanes[i] += error * error
            ratio = step / steps[0, g]
            squares = _sum_of_32(lanes)
            if c > 0:
                squares *= ratio * ratio
            if c == 0 or squares < least:
                least, best = squares, 1 - best
                chosen[g] = c
        for i in range(size // 2):
            low = np.uint8(whole[best, 2 * i] + 8)
            high = np.uint8(whole[best, 2 * i + 1] + 8)
            codes[g, i] = low | np.uint8(high << np.uint8(4))


def _encode_mxfp4(w: F32) -> tuple[Array, Array]:
    groups, _ = groups_of(w, MXFP4.name, 32)
    codes = np.empty((*groups.shape[:2], 16), np.uint8)
    scales = np.empty(groups.shape[:2], np.uint8)
    _mxfp4(groups.reshape(-1, 32), _MAGNITUDES, codes.reshape(-1, 16), scales.reshape(-1))
    return codes.reshape(len(w), -1), scales


def _int4_encoder(fmt: WeightFormat) -> Encoder:
    def encode(w: F32) -> tuple[Array, Array]:
        assert fmt.scale is not None
        groups, tried = int4_steps(w, fmt)
        N, n, size = groups.shape
        codes, chosen = np.empty((N, n, size // 2), np.uint8), np.empty((N, n), np.int64)
        steps = fmt.scale.decode(tried).reshape(len(tried), -1)
        _int4(groups.reshape(-1, size), steps, codes.reshape(-1, size // 2), chosen.reshape(-1))
        best = np.take_along_axis(tried, chosen[None], axis=0)[0]
        return codes.reshape(N, -1), best

    return encode


ENCODERS: Mapping[str, Encoder] = MappingProxyType(
    {
        MXFP4.name: _encode_mxfp4,
        **{f.name: _int4_encoder(f) for f in (INT4_ROW, *RAW_INT4, *GPTQ_SYMMETRIC)},
    }
)
"""By the name of the format. Of the others `WeightFormat.encode` takes as long as reading."""
