"""RMS norms of bf16 rows, with the bits that PyTorch's own operations give.

Transformers computes one from six operations of torch, 20 us a row; this is one pass of 0.5 us. The
only step whose order is free is the sum of squares. torch (ATen/native/cpu/SumKernel.cpp,
`cascade_sum`) adds 8 lanes of 4 vectors (32 numbers, a *line* here) at a time, begins a new sum
every 16 lines and adds up the old ones, level by level:

    sum0 of up to 16 lines;  sum1 of up to 16 sum0;  sum2 of up to 16 sum1

then the levels, then whole vectors that are left to the first of the four, the four, and the lanes
one by one from 0. Squares, the mean, 1 / sqrt and the products are single operations of float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_moe.cpu_kernels.dsl.emit import F32, Emit, KernelBody, Val, Var
from hybrid_moe.cpu_kernels.kernels.encode import load_bf16, through_bf16, to_bf16

LANES = 8
"""Of torch's sums; x86-64 has no wider ones of them."""
_VECTORS = 4
_LINE = LANES * _VECTORS
_RUN = 16
"""Lines, and sums of a level, that are added up before the next level takes the result."""
MOST_INPUTS = _RUN**3 * _LINE
"""Inputs that three levels take."""


@dataclass(frozen=True)
class NormStyle:
    """What a norm does with its weight. h is x / rms(x) in float32.

    Attributes:
        name: for messages.
        weight_bytes: 2 (bf16) or 4 (float32) of a weight.
        rounds_first: h is rounded to bf16 before it meets the weight.
        from_one: the weight is stored as its difference from 1.
    """

    name: str
    weight_bytes: int
    rounds_first: bool = False
    from_one: bool = False


STYLES = {
    style.name: style
    for style in (
        NormStyle("bf16(w * bf16(h))", 2, rounds_first=True),
        NormStyle("bf16(w * h)", 2),
        NormStyle("bf16(w * h), w float32", 4),
        NormStyle("bf16((1 + w) * h)", 2, from_one=True),
        NormStyle("bf16((1 + w) * h), w float32", 4, from_one=True),
    )
}
"""By name: Llama and Qwen, gpt-oss (which keeps its weights in float32), Gemma and Qwen3-Next."""


def rms_norm(style: NormStyle) -> KernelBody:
    """Kernel (x, weight, out, rows, inputs, epsilon).

    x and out are bf16 [rows][inputs], weight [inputs]; epsilon is the address of a float32.
    `inputs` is a multiple of 8 and at most MOST_INPUTS.
    """

    def body(
        emit: Emit, x: Val, weight: Val, out: Val, rows: Val, inputs: Val, epsilon: Val
    ) -> None:
        small = emit.load(epsilon, F32, align=4)
        with emit.loop(0, rows) as row:
            at, to = x + row * inputs * 2, out + row * inputs * 2
            mean = _sum_of_squares(emit, at, inputs) / inputs.to_float()
            scale = emit.splat(1.0, F32) / _square_root(emit, mean + small)
            with emit.loop(0, inputs, LANES) as i:
                h = load_bf16(emit, at + i * 2, LANES) * scale
                w = _weights(emit, weight, i, style)
                if style.rounds_first:
                    h = through_bf16(h)
                emit.store(to + i * 2, to_bf16(w * h), align=2)

    return body


def _weights(emit: Emit, weight: Val, i: Val, style: NormStyle) -> Val:
    at = weight + i * style.weight_bytes
    wide = style.weight_bytes == 4
    w = emit.load(at, F32, LANES, align=4) if wide else load_bf16(emit, at, LANES)
    return w + 1.0 if style.from_one else w


def _square_root(emit: Emit, x: Val) -> Val:
    return emit.intrinsic("llvm.sqrt.f32", F32, x)


def _squares(emit: Emit, at: Val, i: Val) -> Val:
    """Of the inputs from i on."""
    x = load_bf16(emit, at + i * 2, LANES)
    return x * x


def _sum_of_squares(emit: Emit, at: Val, inputs: Val) -> Val:
    """Of the bf16 row at `at`, as the module says."""
    zero = emit.splat(0.0, F32, LANES)
    levels = [[emit.var(zero) for _ in range(_VECTORS)] for _ in range(3)]

    def add_lines(begin: Val, end: Val) -> None:
        with emit.loop(begin, end, _LINE) as i:
            for k, total in enumerate(levels[0]):
                total.set(total.get() + _squares(emit, at, i + LANES * k))

    def pass_on(level: int) -> None:
        """A level's sums go to the next."""
        for done, total in zip(levels[level], levels[level + 1], strict=True):
            total.set(total.get() + done.get())
            done.set(zero)

    run, lines_end = _LINE * _RUN, inputs & -_LINE
    runs_end = inputs & -run
    with emit.loop(0, runs_end, run) as begin:
        add_lines(begin, begin + run)
        pass_on(0)
        with emit.when(((begin + run) & (run * _RUN - 1)).equals(0)):
            pass_on(1)
    add_lines(runs_end, lines_end)
    first, *others = (_over_levels(levels, k) for k in range(_VECTORS))
    rest = emit.var(first)
    with emit.loop(lines_end, inputs, LANES) as i:
        rest.set(rest.get() + _squares(emit, at, i))
    vector = rest.get()
    for other in others:
        vector = vector + other
    total = emit.splat(0.0, F32)
    for lane in range(LANES):
        total = total + vector.shuffle([lane]).bits(F32)
    return total


def _over_levels(levels: list[list[Var]], k: int) -> Val:
    total = levels[0][k].get()
    for level in levels[1:]:
        total = total + level[k].get()
    return total
