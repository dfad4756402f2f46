"""A functional simulator of PTX for kernels of the mma.sync class.

It executes the PTX that CuTe DSL emits, without a GPU: every thread of dozens of blocks (CTAs) at
once, one NumPy operation an instruction. It has no notion of time. What it is strict about is what
a GPU forgives or hides: accesses out of bounds or misaligned raise, memory and registers that
nobody wrote hold NaN, an asynchronous copy lands no earlier than its wait, and under a seed warps
run in random order, so that a missing barrier becomes a wrong answer. It counts what memory
requests cost: 32-byte sectors in global memory, bank conflicts in shared memory.

    parse         PTX text -> instructions
    decode        instruction -> a Python function over all lanes, operands resolved to registers
    arithmetic    what arithmetic means; numbers: rounding to bf16, fp8, and of fused multiply-add
    collective    what a warp does together: shuffles, votes, ldmatrix, mma
    access        loads, stores, atomics, cp.async; memory: the bytes, with their bounds
    lint          sectors and wavefronts of every request
    execute       lanes, divergence and reconvergence, barriers, schedules
    launch        a grid, in batches of blocks

Limits: no wgmma, TMA, mbarrier or clusters; an unknown instruction raises NotImplementedError.
`approx` instructions are computed as exactly as float32 allows. Lanes of one warp run in lockstep
wherever they agree, so a missing `__syncwarp` is not seen.
"""

from tests.gpu.simulator.launch import launch
from tests.gpu.simulator.lint import Access, Lint, Traffic
from tests.gpu.simulator.memory import GlobalMemory
from tests.gpu.simulator.parse import parse

__all__ = ["Access", "GlobalMemory", "Lint", "Traffic", "launch", "parse"]
