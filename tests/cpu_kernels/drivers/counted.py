"""A job without weights and without threads: which strips its tasks read, in which order."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from hybrid_moe.cpu_kernels import tuning
from hybrid_moe.cpu_kernels.batch import Batch
from hybrid_moe.cpu_kernels.drivers import phases, records, route
from hybrid_moe.cpu_kernels.drivers.records import DOWN, DOWN_BY_PAIR, GATE_UP
from hybrid_moe.cpu_kernels.job import JobMemory, JobShape, capacity_for
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.shares import even_shares
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS, strip_layout
from tests.cpu_kernels.cases import Array, random_batch
from tests.streams.interpreted import interpret


@dataclass(frozen=True)
class Shape:
    """Hidden, intermediate, experts, ids of a token."""

    H: int
    I: int
    E: int
    k: int


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


@dataclass
class Read:
    """A phase of weights.

    Attributes:
        kind: GATE_UP, ...
        strip_bytes: of each of its strips.
        wanted: address of a strip -> how often it is read, if all tasks together are the phase.
        pools: workers of each; each task was taken by the one that had read least.
    """

    kind: int
    strip_bytes: int
    wanted: Counter[int]
    pools: list[list[Worker]]


class CountedJob:
    """A pass of random tokens over experts of which there are addresses only. Its drivers run as
    Python, its kernels do nothing.

    Attributes:
        active: experts that have tokens.
        reads: the phases that read weights.
    """

    def __init__(self, shape: Shape, tokens: int, threads: tuple[int, ...]) -> None:
        gate_up, down = strip_layout(MXFP4, shape.H), strip_layout(MXFP4, shape.I)
        pools = len(threads)
        blocks = even_shares(shape.I // GROUP, threads)
        strips = even_shares(-(-shape.H // STRIP_ROWS), threads)
        expert_bytes = int(blocks[-1]) * gate_up.nbytes + int(strips[-1]) * down.nbytes
        tables: dict[str, Array] = {
            "packed": np.zeros((shape.E, pools), records.Expert.dtype),
            "workers": np.array(threads, np.int64),
            "blocks": blocks,
            "strips": strips,
        }
        packed = tables["packed"]
        places = np.arange(1, 1 + packed.size).reshape(packed.shape) * 2 * expert_bytes
        packed["gate_up"] = places
        packed["down"] = places + int(blocks[-1]) * gate_up.nbytes
        layer = records.Layer.new()
        layer.experts, layer.hidden, layer.intermediate = shape.E, shape.H, shape.I
        layer.gate_up.strips.strip_bytes = gate_up.nbytes
        layer.down.strips.strip_bytes = down.nbytes
        for name, table in tables.items():
            layer.words[records.Layer.word(name)] = table.ctypes.data
        memory = JobMemory.new(
            JobShape(
                capacity=capacity_for(tokens),
                top_k=shape.k,
                experts=shape.E,
                hidden=shape.H,
                x_row=64,
                h_row=64,
                unpacked_bytes=64,
                workers=sum(threads),
                pools=pools,
            )
        )
        x, ids, weights = random_batch(tokens, shape.H, shape.E, shape.k)
        addresses = (int(array.ctypes.data) for array in (x, ids, weights))
        memory.fill(layer.address, Batch(tokens, shape.k, *addresses, skip=0, out=0))
        job, entry = memory.descriptor, records.Entry.new()
        job.x_copy = 0  # nobody reads x
        at = records.Entry.word("job")
        with pytest.MonkeyPatch.context() as patch:
            self._interpret(patch)
            assert route.route(job) == 0
            entry.words[at : at + len(job.words)] = job.words
            route.append_phases(entry)
            self.active = job.active
            self.reads = []
            for index in range(entry.phase_count.value):
                phase = entry.phases[index]
                assert phase.total.value == sum(phase.tasks[p].value for p in range(pools))
                work = [self._work(entry, phase, p, threads[p]) for p in range(pools)]
                if phase.kind in (GATE_UP, DOWN, DOWN_BY_PAIR):
                    name, bounds, layout = (
                        ("gate_up", blocks, gate_up)
                        if phase.kind == GATE_UP
                        else ("down", strips, down)
                    )
                    wanted = Counter[int]()
                    for pool in range(pools):
                        for i in range(self.active):
                            count = job.active_start[i + 1] - job.active_start[i]
                            base = int(packed[name][job.active_expert[i], pool])
                            for strip in range(int(bounds[pool + 1] - bounds[pool])):
                                passes = -(-count // tuning.BATCH_TOKENS)
                                wanted[base + strip * layout.nbytes] = passes
                    self.reads.append(Read(phase.kind, layout.nbytes, wanted, work))

    def _interpret(self, patch: pytest.MonkeyPatch) -> None:
        interpret(patch, lambda: None)
        for module, name in (
            (route, "call"),
            (route, "set_float_environment"),
            (route, "restore_float_environment"),
            (phases, "call"),
            (phases, "gather_tiles"),
            (phases, "activate_tiles"),
        ):
            patch.setattr(module, name, lambda *arguments: 0)

        def dot_tiles(products: records.Products, strip: int, *arguments: int) -> None:
            self._worker.read(strip, products.strips.strip_bytes)

        patch.setattr(phases, "dot_tiles", dot_tiles)

    def _work(
        self, entry: records.Entry, phase: records.Phase, pool: int, threads: int
    ) -> list[Worker]:
        workers = [Worker() for _ in range(threads)]
        free = [(0, index) for index in range(threads)]
        for task in range(phase.tasks[pool].value):
            _, index = heapq.heappop(free)
            self._worker = workers[index]
            phases.run_task(entry, phase, pool, task, index)
            heapq.heappush(free, (self._worker.nbytes, index))
        return workers
