"""A grid, in batches of blocks that bound the memory and keep NumPy busy."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from tests.gpu.simulator.execute import Batch, Program
from tests.gpu.simulator.lint import Lint
from tests.gpu.simulator.memory import GlobalMemory
from tests.gpu.simulator.parse import parse

LANES = 4096
"""Of a batch: enough that NumPy's calls cost little, few enough that registers stay in L2."""


@lru_cache(maxsize=64)
def _program(ptx: str) -> Program:
    return Program(parse(ptx))


def launch(
    ptx: str,
    grid: tuple[int, int, int],
    params: bytes,
    memory: GlobalMemory,
    shared_bytes: int = 0,
    seed: int | None = None,
    lint: Lint | None = None,
) -> None:
    """Runs a kernel to its end.

    params: its parameter block, as on the device. shared_bytes: dynamic shared memory of a block.
    seed: blocks, and bursts of their warps, in random order; None runs all in lockstep.
    lint: counts memory requests, if given.
    """
    program = _program(ptx)
    if len(params) != program.kernel.params_bytes:
        raise ValueError(f"{len(params)} bytes of parameters, not {program.kernel.params_bytes}")
    rng = None if seed is None else np.random.default_rng(seed)
    blocks = np.arange(grid[0] * grid[1] * grid[2])
    if rng is not None:
        rng.shuffle(blocks)
    step = max(1, LANES // program.kernel.threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), step):
            some = blocks[first : first + step]
            shared = program.kernel.shared_bytes + shared_bytes
            Batch(program, some, grid, params, memory, shared, lint, rng).run()
