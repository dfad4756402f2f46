"""A job without weights and without threads: which strips its tasks read, in which order."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
import pytest

from hybrid_moe.cpu_kernels.descriptor import describe
from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.drivers import phases, route
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS
from hybrid_moe.cpu_kernels.job import JobShape, StagedJob, capacity_for
from hybrid_moe.cpu_kernels.kernels.format_kernels import FORMAT_KERNELS
from hybrid_moe.cpu_kernels.kernels.library import kernel_set
from hybrid_moe.cpu_kernels.layer import _shares
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS, strip_layout
from hybrid_moe.formats.table import MXFP4
from tests.cpu_kernels.cases import random_batch
from tests.streams.interpreted import interpret


@dataclass
class Worker:
    """What one worker has read in a phase.

    Attributes:
        nbytes: of weights.
        runs: how often it went to strips that do not follow those before.
        strips: addresses, in order.
    """

    nbytes: int = 0
    runs: int = 0
    strips: list[int] = field(default_factory=list)

    def read(self, address: int, nbytes: int) -> None:
        self.runs += not self.strips or address != self.strips[-1] + nbytes
        self.nbytes += nbytes
        self.strips.append(address)


@dataclass(frozen=True)
class Shape:
    """Hidden, intermediate, experts, ids of a token."""

    H: int
    I: int
    E: int
    k: int


@dataclass
class CountedJob:
    """A pass over experts at addresses where nothing is, whose drivers run as Python.

    Attributes:
        workers: phase -> pool -> its workers, each task taken by the one that has read least.
        active: experts with pairs.
    """

    shape: Shape
    tokens: int
    threads: tuple[int, ...]
    monkeypatch: pytest.MonkeyPatch
    workers: dict[int, list[list[Worker]]] = field(init=False)
    active: int = field(init=False)

    def __post_init__(self) -> None:
        shape, pools = self.shape, len(self.threads)
        gate_up, down = strip_layout(MXFP4, shape.H), strip_layout(MXFP4, shape.I)
        blocks = _shares(shape.I // GROUP, self.threads)
        strips = _shares(-(-shape.H // STRIP_ROWS), self.threads)
        expert = gate_up.nbytes * shape.I // GROUP + down.nbytes * -(-shape.H // STRIP_ROWS)
        each = np.arange(1, 1 + pools * shape.E, dtype=np.int64).reshape(pools, shape.E)
        nothing = np.zeros(shape.E, np.int64)
        tables = {
            f.L_GATE_UP: each * 2 * expert,
            f.L_DOWN: each * 2 * expert + gate_up.nbytes * shape.I // GROUP,
            f.L_BLOCKS: blocks,
            f.L_STRIPS: strips,
            f.L_GATE_BIAS: nothing,
            f.L_UP_BIAS: nothing,
            f.L_DOWN_BIAS: nothing,
            f.L_PARAMETERS: np.zeros(3, np.float32),
        }
        kernels = kernel_set(MXFP4.name, TIERS["portable"])
        layer = describe(kernels, shape.E, gate_up, down, tables)
        encoding = kernels.encoding
        job = StagedJob(
            JobShape(
                capacity=capacity_for(self.tokens),
                top_k=shape.k,
                experts=shape.E,
                hidden=shape.H,
                x_row=encoding.row_bytes(gate_up.groups),
                h_row=encoding.row_bytes(down.groups),
                unpacked_bytes=FORMAT_KERNELS[MXFP4.name].unpacked_bytes,
                workers=sum(self.threads),
                pools=pools,
            )
        )
        job.stage(*random_batch(self.tokens, shape.H, shape.E, shape.k), None)
        address = job.address(layer.ctypes.data, 0)
        with self.monkeypatch.context() as patch:
            self._interpret(patch)
            assert route.prepare(address) == 0
            slots = job.template
            self.active = int(slots[f.J_ACTIVE])
            self.workers = {
                phase: [
                    self._work(address, phase, pool, int(slots[f.J_TASKS + phase * f.MAX_POOLS + pool]))
                    for pool in range(pools)
                ]
                for phase in (f.PHASE_GATE_UP, f.PHASE_DOWN)
            }

    def _interpret(self, patch: pytest.MonkeyPatch) -> None:
        """Kernels do nothing; strips are noted."""
        interpret(patch, lambda: None)
        for module in (route, phases):
            for name in vars(module):
                if name.startswith("call") and name[4:].isdigit():
                    patch.setattr(module, name, lambda *arguments: None)
        for name in ("set_float_environment", "restore_float_environment"):
            patch.setattr(route, name, lambda *arguments: 0)

        def dot_tiles(layer: int, layout: int, codes: int, *arguments: int) -> None:
            self.reader.read(codes, route.get(layer, layout + f.LAYOUT_STRIP_BYTES))

        patch.setattr(phases, "dot_tiles", dot_tiles)

    def _work(self, job: int, phase: int, pool: int, tasks: int) -> list[Worker]:
        workers = [Worker() for _ in range(self.threads[pool])]
        free = [(0, index) for index in range(len(workers))]
        for task in range(tasks):
            _, index = heapq.heappop(free)
            self.reader = workers[index]
            phases.run_task(job, phase, pool, task, index)
            heapq.heappush(free, (self.reader.nbytes, index))
        return workers
