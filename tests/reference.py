"""Float64 reference of the numerics contract, and how far a correct kernel may be from it.

Nothing here uses the code under test: plain NumPy float64 on dequantized weights. Shapes: T tokens,
k experts per token, E experts, hidden H, intermediate I.

    g = W_gate x + b_gate      u = W_up x + b_up
    limit > 0:  g = min(g, limit)      u = clip(u, -limit, limit)
    h = silu(g) * u                          alpha == 0
    h = g * sigmoid(alpha * g) * (u + 1)     alpha > 0 (gpt-oss)
    y = sum over the token's slots of  weight * (W_down h + b_down)

The contract allows these roundings on the way, and the two error measures follow each of them
through the layers:

| where | size, relative to | source |
|---|---|---|
| x and h into a product | `activation_error` x max of their group of 32 | 2^-14; 8 bits: 1/254 |
| each product, FP32 accumulation | (K + 2) 2^-24 x sum of |w||x|  | Higham 2002, section 3.1 |
| h in FP32 | 2^-16 x |h| | exponential and division, a few FP32 roundings each |
| h, once, to BF16 | 2^-8 x |h| | 8 significant bits, to nearest: half a unit in the last place |
| output, once, to BF16 | 2^-8 x |y| | the same |
| anything below 2^-100 | 2^-100 x sum of |w| | flushed subnormals, saturated exponentials |

`bound` takes every rounding at its worst and adds absolute values: no correct kernel exceeds it for
any input. `sigma` adds the same roundings as independent errors, uniform in their range (variance
size^2 / 3): about sqrt(K) tighter, valid where inputs are random. A wrong nibble order, a scale of
the neighbouring group or a dropped bias passes `bound` now and then, and never `sigma`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

BF16_ROUNDOFF = 2.0**-8
FP32_ROUNDOFF = 2.0**-24
FIXED_POINT_ERROR = 2.0**-14
INT8_ACTIVATION_ERROR = (1 + 2.0**-12) / 254
"""Half a step of m / 127, and what float32 loses on the way to q and back."""
ACTIVATION_FUNCTION_ERROR = 2.0**-16
SILU_SLOPE = 1.1  # max of the derivative of silu is 1.0998..; g * sigmoid(alpha g) has the same
FLOOR = 2.0**-100
SIGMAS = 8.0
"""Allowed |error| / sigma of one element. Beyond 6 is a chance of 1e-9 for Gaussian errors."""


@dataclass(frozen=True)
class Evaluation:
    """The contract's value with what may separate a correct kernel from it, all [T, H]."""

    value: F64
    bound: F64
    sigma: F64


def added(*parts: Evaluation) -> Evaluation:
    """The sum of separately rounded outputs, rounded once more."""
    value = np.sum([p.value for p in parts], axis=0)
    bound = np.sum([p.bound for p in parts], axis=0)
    variance = np.sum([p.sigma**2 for p in parts], axis=0)
    size = BF16_ROUNDOFF * (np.abs(value) + bound)
    return Evaluation(value, bound + size, np.sqrt(variance + size**2 / 3))


@dataclass(frozen=True)
class _Uncertain:
    """A value, its worst error and the variance of its error, elementwise."""

    value: F64
    worst: F64
    variance: F64

    def rounded(self, relative: float) -> _Uncertain:
        size = relative * (np.abs(self.value) + self.worst) + FLOOR
        return _Uncertain(self.value, self.worst + size, self.variance + size**2 / 3)

    def fixed_point(self, relative: float) -> _Uncertain:
        """Encoded in groups of 32 with an error of `relative` times the group's maximum."""
        size = np.abs(self.value) + self.worst
        maxima = size.reshape(*size.shape[:-1], -1, 32).max(-1, keepdims=True)
        error = np.broadcast_to(maxima, (*maxima.shape[:-1], 32)).reshape(size.shape) * relative
        return _Uncertain(self.value, self.worst + error, self.variance + error**2 / 3)

    def times(self, w: F64, bias: F64 | None, sizes: F64 | None = None) -> _Uncertain:
        """self [T, K] times w [N, K], plus bias [N]. `sizes` [N, K] is what roundings are relative
        to where that is more than abs(w)."""
        size = np.abs(w) if sizes is None else sizes
        value, magnitude = self.value @ w.T, (np.abs(self.value) + self.worst) @ size.T
        if bias is not None:
            value, magnitude = value + bias, magnitude + np.abs(bias)
        K = w.shape[1]
        accumulation = (K + 2) * FP32_ROUNDOFF * magnitude + FLOOR * (1 + np.abs(w).sum(1))
        # K roundings of partial sums of about sqrt(K) terms: the sqrt(K) law for the variance
        random = np.sqrt(K + 2) * FP32_ROUNDOFF * magnitude + FLOOR
        return _Uncertain(
            value, self.worst @ np.abs(w).T + accumulation, self.variance @ (w**2).T + random**2
        )


def sigmoid(x: F64) -> F64:
    """1 / (1 + exp(-x)) without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


def activation(g: F64, u: F64, limit: float = 0.0, alpha: float = 0.0) -> F64:
    """The contract's SwiGLU of gate `g` and up `u`."""
    if limit > 0:
        g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    return g * sigmoid(alpha * g) * (u + 1) if alpha > 0 else g * sigmoid(g) * u


def _activate(g: _Uncertain, u: _Uncertain, limit: float, alpha: float) -> _Uncertain:
    """Errors through h = s(g) v(u): clamps never enlarge them, s has slope <= SILU_SLOPE, v 1."""
    h = activation(g.value, u.value, limit, alpha)
    gate, up = g.value, u.value
    if limit > 0:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    s = np.abs(gate * sigmoid((alpha or 1.0) * gate))
    v = np.abs(up + 1 if alpha > 0 else up)
    worst = SILU_SLOPE * g.worst * (v + u.worst) + s * u.worst
    variance = (SILU_SLOPE * v) ** 2 * g.variance + s**2 * u.variance
    return _Uncertain(h, worst, variance).rounded(ACTIVATION_FUNCTION_ERROR)


def evaluate(
    x: Array,
    ids: Array,
    weights: Array,
    gate: Array,
    up: Array,
    down: Array,
    *,
    gate_bias: Array | None = None,
    up_bias: Array | None = None,
    down_bias: Array | None = None,
    gate_sizes: Array | None = None,
    up_sizes: Array | None = None,
    down_sizes: Array | None = None,
    limit: float = 0.0,
    alpha: float = 0.0,
    skip: Array | None = None,
    activation_error: float = FIXED_POINT_ERROR,
) -> Evaluation:
    """One MoE layer and its error bounds.

    Args:
        x: [T, H], the exact values that the kernel is given (BF16 values).
        ids: int [T, k]. Ids below 0, at and above E, and those with `skip[id]` contribute zero.
        weights: [T, k], the exact routing weights (FP32 values).
        gate, up: [E, I, H] dequantized weights. down: [E, H, I].
        gate_bias, up_bias: [E, I]. down_bias: [E, H].
        gate_sizes, up_sizes, down_sizes: as the weights: what the roundings of a product are
            relative to where weights are sums whose parts are rounded apart; abs(weights) else.
        limit, alpha: options of the activation.
        skip: bool [E].
        activation_error: relative error of an activation as input of a product; 0 where the
            kernel takes BF16 as it is.
    """
    T, H = x.shape
    E = gate.shape[0]
    tokens = _exact(x)
    value, worst, variance = np.zeros((3, T, H))
    magnitude = np.zeros((T, H))
    for e in range(E):
        rows, slots = np.nonzero(np.asarray(ids) == e)
        if rows.size == 0 or (skip is not None and skip[e]):
            continue
        x_e = _Uncertain(tokens.value[rows], tokens.worst[rows], tokens.variance[rows])
        x_e = x_e.fixed_point(activation_error)
        g = x_e.times(_f64(gate[e]), _of(e, gate_bias), _of(e, gate_sizes))
        u = x_e.times(_f64(up[e]), _of(e, up_bias), _of(e, up_sizes))
        h = _activate(g, u, limit, alpha).rounded(BF16_ROUNDOFF).fixed_point(activation_error)
        y = h.times(_f64(down[e]), _of(e, down_bias), _of(e, down_sizes))
        p = np.asarray(weights, np.float64)[rows, slots][:, None]
        np.add.at(value, rows, p * y.value)
        np.add.at(worst, rows, np.abs(p) * y.worst)
        np.add.at(variance, rows, p**2 * y.variance)
        np.add.at(magnitude, rows, np.abs(p) * (np.abs(y.value) + y.worst))
    combine = (np.shape(ids)[1] + 2) * FP32_ROUNDOFF * magnitude
    out = _Uncertain(value, worst + combine, variance + combine**2).rounded(BF16_ROUNDOFF)
    return Evaluation(value, out.worst, np.sqrt(out.variance))


def evaluate_linear(
    x: Array, w: Array, bias: Array | None = None, *, activation_error: float = FIXED_POINT_ERROR
) -> Evaluation:
    """x W^T + b and its error bounds: x [T, K] the exact values that the kernel is given, w [N, K]
    dequantized weights, bias [N]; rounded once to BF16."""
    y = _exact(x).fixed_point(activation_error).times(_f64(w), None if bias is None else _f64(bias))
    out = y.rounded(BF16_ROUNDOFF)
    return Evaluation(y.value, out.worst, np.sqrt(out.variance))


def reference_moe(*args: Any, **options: Any) -> F64:
    """The value alone, [T, H]; arguments as for `evaluate`."""
    return evaluate(*args, **options).value


def error_bound(*args: Any, **options: Any) -> F64:
    """The largest |output - reference| of a correct kernel, [T, H]; arguments as for `evaluate`."""
    return evaluate(*args, **options).bound


def assert_within(actual: Array, expected: Evaluation, *, random: bool = True) -> None:
    """Assert that `actual` [T, H] is what a correct kernel may return.

    Args:
        actual: output as float values.
        expected: from `evaluate`.
        random: the inputs are random, so that `sigma` holds too: elementwise within `SIGMAS`, and
            the whole output's root mean square error within twice what sigma says.
    """
    assert actual.shape == expected.value.shape, (actual.shape, expected.value.shape)
    assert np.isfinite(actual).all(), "output has a NaN or an infinity"
    error = np.abs(np.asarray(actual, np.float64) - expected.value)
    if error.size == 0:
        return
    at = np.unravel_index(np.argmax(error / expected.bound), error.shape)
    assert (error <= expected.bound).all(), (
        f"error {error[at]:.3g} at {tuple(map(int, at))} exceeds the bound {expected.bound[at]:.3g}"
    )
    if random:
        ratio = error / expected.sigma
        assert ratio.max() <= SIGMAS, f"an error is {ratio.max():.2f} sigma"
        rms, allowed = np.sqrt((error**2).mean()), 2 * np.sqrt((expected.sigma**2).mean())
        assert rms <= allowed, f"root mean square error {rms:.3g} exceeds {allowed:.3g}"


def _exact(x: Array) -> _Uncertain:
    value = _f64(x)
    return _Uncertain(value, np.zeros_like(value), np.zeros_like(value))


def _f64(x: Array) -> F64:
    return np.asarray(x, np.float64)


def _of(expert: int, arrays: Array | None) -> F64 | None:
    return None if arrays is None else _f64(arrays[expert])
