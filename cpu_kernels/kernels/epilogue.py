"""What happens to the sums of a strip: activation, weighting by the router, rounding.

All arithmetic is float32 without fused operations, so every tier computes the same bits.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.dsl.emit import F32, I32, I64, Emit, KernelBody, Val
from hybrid_moe.cpu_kernels.kernels.encode import ROUND, ROUND_BITS, Encoding, to_bf16
from hybrid_moe.formats.strips import GROUP, PANEL_ROWS, PANELS, SUMS_BYTES

_LOG2_E = 1.44269504088896341
_LN2_HIGH = 0.693359375  # 9 bits: n * _LN2_HIGH is exact for |n| < 2^15
_LN2_LOW = -2.12194440e-4
_EXP_COEFFICIENTS = (  # of (exp(r) - 1 - r) / r^2 on |r| <= ln2 / 2; Cephes expf, 2 ulp
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def clamp(x: Val, low: Val | float, high: Val | float) -> Val:
    """Lane-wise clamp that lets NaN through."""
    x = (x > high).select(high, x)
    return (x < low).select(low, x)


def exp(x: Val) -> Val:
    """e^x in float32, within 3 ulp; saturates outside [-87, 88]."""
    x = clamp(x, -87.0, 88.0)
    shifted = x * _LOG2_E + ROUND
    n = shifted - ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    polynomial = r * _EXP_COEFFICIENTS[0] + _EXP_COEFFICIENTS[1]
    for coefficient in _EXP_COEFFICIENTS[2:]:
        polynomial = polynomial * r + coefficient
    value = polynomial * (r * r) + r + 1.0
    exponent = shifted.bits(I32) - ROUND_BITS
    return value * ((exponent + 127) << 23).bits(F32)


def activate(encoding: Encoding) -> KernelBody:
    """Kernel (sums, count, to, gate_bias, up_bias, parameters).

    sums is float32 [count][64] of one gate/up strip: 32 gates, then 32 ups. Writes one group of a
    tile of `count` encoded rows, [token] at address `to`. The biases are float32 [32] each;
    `parameters` is float32 [3]: limit, alpha, up offset.

        gate' = min(gate, limit), up' = clamp(up, -limit, limit)
        h = gate' * sigmoid(alpha * gate') * (up' + offset), rounded once to bf16
    """

    def body(
        emit: Emit, sums: Val, count: Val, to: Val, gate_bias: Val, up_bias: Val, parameters: Val
    ) -> None:
        limit, alpha, offset = (emit.load(parameters + 4 * i, F32, align=4) for i in range(3))
        with emit.loop(0, count) as token:
            at = sums + token * SUMS_BYTES
            halves = []
            for index in range(PANELS // 2):
                gate = emit.load(at + 64 * index, F32, 16, align=64)
                up = emit.load(at + 64 * (PANELS // 2 + index), F32, 16, align=64)
                gate = gate + emit.load(gate_bias + 64 * index, F32, 16, align=4)
                up = up + emit.load(up_bias + 64 * index, F32, 16, align=4)
                gate = (gate > limit).select(limit, gate)
                up = clamp(up, -limit, limit)
                glu = gate / (exp(-(gate * alpha)) + 1.0)
                halves.append(to_bf16(glu * (up + offset)))
            h = (halves[0].concat(halves[1]).zext(I32) << 16).bits(F32)
            encoding.store(emit, h, to + token * encoding.group_bytes)

    return body


def _weighted(emit: Emit, sums: Val, weight: Val, bias: Val, panel: int) -> Val:
    """What a pair adds to its token: weight * (sums + bias), of one panel."""
    y = emit.load(sums + 64 * panel, F32, 16, align=64)
    return (y + emit.load(bias + 64 * panel, F32, 16, align=4)) * weight


def _add(emit: Emit, to: Val, value: Val) -> None:
    emit.store(to, emit.load(to, F32, 16, align=64) + value, align=64)


def combine(
    emit: Emit, sums: Val, count: Val, tokens: Val, weights: Val, out: Val, bias: Val
) -> None:
    """Kernel: out[tokens[i]] += weights[i] * (sums[i] + bias) for the 64 rows of a strip.

    sums float32 [count][64], tokens int32 [count], weights float32 [count], out float32 [T][64],
    bias float32 [64]. `weigh`, then `add`, gives the same bits.
    """
    with emit.loop(0, count) as i:
        weight = emit.load(weights + i * 4, F32, align=4)
        token = emit.load(tokens + i * 4, I32, align=4).zext(I64)
        for panel in range(PANELS):
            y = _weighted(emit, sums + i * SUMS_BYTES, weight, bias, panel)
            _add(emit, out + token * SUMS_BYTES + 64 * panel, y)


def weigh(emit: Emit, sums: Val, count: Val, weights: Val, bias: Val, rows: Val) -> None:
    """Kernel: rows[i] = weights[i] * (sums[i] + bias), see `combine`; rows float32 [count][64]."""
    with emit.loop(0, count) as i:
        weight = emit.load(weights + i * 4, F32, align=4)
        for panel in range(PANELS):
            y = _weighted(emit, sums + i * SUMS_BYTES, weight, bias, panel)
            emit.store(rows + i * SUMS_BYTES + 64 * panel, y, align=64)


def add(emit: Emit, rows: Val, count: Val, tokens: Val, out: Val) -> None:
    """Kernel: out[tokens[i]] += rows[i], see `combine`."""
    with emit.loop(0, count) as i:
        token = emit.load(tokens + i * 4, I32, align=4).zext(I64)
        for panel in range(PANELS):
            y = emit.load(rows + i * SUMS_BYTES + 64 * panel, F32, 16, align=64)
            _add(emit, out + token * SUMS_BYTES + 64 * panel, y)


def clear(emit: Emit, out: Val, count: Val) -> None:
    """Kernel: out, float32 [count][64], = 0."""
    zero = emit.splat(0.0, F32, 16)
    with emit.loop(0, count) as i:
        for panel in range(PANELS):
            emit.store(out + i * SUMS_BYTES + 64 * panel, zero, align=64)


def deliver(
    emit: Emit, sums: Val, count: Val, out: Val, out_stride: Val, rows: Val, bias: Val
) -> None:
    """Kernel: out[i] = the first `rows` of sums[i] + bias, rounded to bf16.

    sums float32 [count][64]; out bf16 [count][rows], out_stride bytes from one to the next; bias
    float32 [64]. `rows` is 1 to 64: the last strip of a matrix may end anywhere.
    """
    with emit.loop(0, count) as i:
        at, to = sums + i * SUMS_BYTES, out + i * out_stride
        for panel in range(PANELS):
            with emit.when(rows > PANEL_ROWS * (panel + 1) - 1):
                y = emit.load(at + 64 * panel, F32, 16, align=64)
                y = y + emit.load(bias + 64 * panel, F32, 16, align=4)
                emit.store(to + 32 * panel, to_bf16(y), align=2)
        with emit.loop(rows & -PANEL_ROWS, rows) as row:  # of a panel that is not whole
            y = emit.load(at + row * 4, F32, align=4) + emit.load(bias + row * 4, F32, align=4)
            emit.store(to + row * 2, to_bf16(y), align=2)


def finish(emit: Emit, sums: Val, count: Val, out: Val, out_stride: Val, rows: Val) -> None:
    """Kernel: out[i] = the first `rows` of sums[i], rounded to bf16.

    sums float32 [count][64]; out bf16 [count][rows], out_stride bytes from one to the next. `rows`
    is 64, or 32 in the last strip of an output that ends in the middle of it.
    """
    with emit.loop(0, count) as i:
        for half in range(2):
            with emit.when(rows > GROUP * half):
                for panel in (2 * half, 2 * half + 1):
                    y = emit.load(sums + i * SUMS_BYTES + 64 * panel, F32, 16, align=64)
                    emit.store(out + i * out_stride + 32 * panel, to_bf16(y), align=2)


def finish_float(emit: Emit, sums: Val, count: Val, out: Val, out_stride: Val, rows: Val) -> None:
    """Kernel: `finish` without the rounding; out is float32 [count][rows]."""
    with emit.loop(0, count) as i:
        for half in range(2):
            with emit.when(rows > GROUP * half):
                for panel in (2 * half, 2 * half + 1):
                    y = emit.load(sums + i * SUMS_BYTES + 64 * panel, F32, 16, align=64)
                    emit.store(out + i * out_stride + 64 * panel, y, align=4)
