"""Logits of a router: few rows of bf16 times its weight, as torch's BF16 product adds them.

On processors with VDPBF16PS torch calls oneDNN, which keeps the sum of each output in one lane and
adds pair after pair of inputs, in ascending order. A *chunk* of inputs (512 for one token, by
experiment) begins a new sum, which is added to those before; the bias comes last, and the result is
rounded once. The same instruction in the same order gives the same bits, and reads the weight where
torch has it. oneDNN copies it into another layout at every call, which takes most of its time.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.dsl.emit import F32, I32, Emit, KernelBody, Val
from hybrid_moe.cpu_kernels.kernels.encode import load_bf16, to_bf16
from hybrid_moe.cpu_kernels.kernels.transpose import transpose

EXPERTS = 16
"""Experts that are computed together, one a lane; their number is a multiple of it."""
INPUTS = 32
"""Of a row that are read at once, a cache line; their number is a multiple of it."""


def router_logits(biased: bool) -> KernelBody:
    """Kernel (x, weight, bias, out, experts, inputs, chunk) of one token.

    x is bf16 [inputs], weight bf16 [experts][inputs], bias bf16 [experts] or not looked at, out
    bf16 [experts]; chunk is a multiple of INPUTS.
    """

    def body(
        emit: Emit,
        x: Val,
        weight: Val,
        bias: Val,
        out: Val,
        experts: Val,
        inputs: Val,
        chunk: Val,
    ) -> None:
        row_bytes = inputs * 2
        zero = emit.splat(0.0, F32, EXPERTS)
        with emit.loop(0, experts, EXPERTS) as first:
            rows = weight + first * row_bytes
            total, part, end = emit.var(zero), emit.var(zero), emit.var(chunk)
            with emit.loop(0, inputs, INPUTS) as i:
                with emit.when(i.equals(end.get())):
                    total.set(total.get() + part.get())
                    part.set(zero)
                    end.set(i + chunk)
                lines = [
                    emit.load(rows + row_bytes * row + i * 2, I32, INPUTS // 2, align=2)
                    for row in range(EXPERTS)
                ]
                sums = part.get()
                for pair, w in enumerate(transpose(lines)):
                    pairs = emit.load(x + i * 2 + 4 * pair, I32, align=2)
                    sums = emit.op("pair_dot", sums, w, emit.broadcast(pairs, EXPERTS))
                part.set(sums)
            logits = total.get() + part.get()
            if biased:
                logits = logits + load_bf16(emit, bias + first * 2, EXPERTS)
            emit.store(out + first * 2, to_bf16(logits), align=2)

    return body
