"""Lanes at work: divergence, barriers, asynchronous copies, schedules.

`Warps` are lanes that are issued together: all warps of all blocks of a batch, or, where a seed
asks for random schedules, warp w of each block. Lanes of one program counter are a group; the group
with the lowest one runs, up to the next branch or the next group, which it then joins: groups meet
again behind a branch because compilers lay out code in that order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.gpu.simulator import access, arithmetic, collective
from tests.gpu.simulator.decode import Decoder, Mask
from tests.gpu.simulator.lint import Lint
from tests.gpu.simulator.memory import GlobalMemory, Piece, Segment, SharedMemory
from tests.gpu.simulator.numbers import Array
from tests.gpu.simulator.parse import Instruction, Kernel

LIMIT = 3_000_000
"""Instructions of a batch, after which it is taken to be in an endless loop."""


class Program(Decoder):
    """A decoded kernel. `stop[pc]` is the next control instruction at or after pc."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel, (arithmetic.meaning, access.meaning, collective.meaning))
        self.kernel = kernel
        self.stop = [0] * len(self.steps)
        self.guards: dict[int, Any] = {}
        for pc in reversed(range(len(self.steps))):
            self.stop[pc] = pc if self.steps[pc] is None else self.stop[pc + 1]
            if self.steps[pc] is None and kernel.code[pc].guard:
                self.guards[pc] = self.source(kernel.code[pc].guard, "pred")


class Batch:
    """Blocks that run at once: their shared memory and barriers."""

    def __init__(
        self,
        program: Program,
        blocks: Array,
        grid: tuple[int, int, int],
        params: bytes,
        memory: GlobalMemory,
        shared_bytes: int,
        lint: Lint | None,
        rng: np.random.Generator | None,
    ) -> None:
        self.program, self.params, self.memory, self.lint = program, params, memory, lint
        self.blocks, self.grid, self.rng = blocks, grid, rng
        self.shared = SharedMemory(len(blocks), shared_bytes)
        self.left = LIMIT
        self.threads = program.kernel.threads
        self._arrived: dict[int, Array] = {}  # barrier -> threads of each block that wait there
        tids = np.arange(self.threads)
        together = [tids] if rng is None else tids.reshape(-1, 32)
        self.warps = [Warps(self, tid) for tid in together]

    def run(self) -> None:
        """Until every thread has ended."""
        while ready := [warps for warps in self.warps if warps.groups]:
            if self.rng is None:
                ready[0].run(LIMIT)
            else:
                ready[self.rng.integers(len(ready))].run(int(self.rng.integers(1, 200)))
        for warps in self.warps:
            for barrier, pc, _ in warps.waiting:
                where = self.program.kernel.code[pc - 1]
                raise RuntimeError(
                    f"deadlock: threads wait for others at barrier {barrier}, {where}"
                )

    def arrive(self, barrier: int, blocks: Array, expected: int) -> None:
        """Counts threads in, and releases those of full blocks."""
        count = self._arrived.setdefault(barrier, np.zeros(len(self.blocks), np.int64))
        count += np.bincount(blocks, minlength=len(count))
        if (count > expected).any():
            raise RuntimeError(f"more than {expected} threads at barrier {barrier}")
        if (full := count == expected).any():
            count[full] = 0
            for warps in self.warps:
                warps.release(barrier, full)


class Warps:
    """Lanes that are issued together, whole warps: threads `tid` of each block of a batch."""

    def __init__(self, batch: Batch, tid: Array) -> None:
        self.batch = batch
        self.block = np.repeat(np.arange(len(batch.blocks)), len(tid))
        self.n = len(self.block)
        self.R = list(batch.program.initial)
        self.groups: dict[int, Mask] = {0: None}
        """Program counter -> lanes that are there and may run."""
        self.waiting: list[tuple[int, int, Array]] = []
        """Barrier, where to go on, lanes."""
        self._alive = np.ones(self.n, bool)
        self._committed = np.zeros(self.n, np.int64)  # groups of copies that each lane has closed
        self._copies: list[tuple[Array, Segment, Array, Array, Array]] = []
        # under way: lanes, where to, offsets there, bytes, each lane's group
        special = _special(batch, np.tile(tid, len(batch.blocks)), batch.blocks[self.block])
        for name, register in batch.program.specials.items():
            if name not in special:
                raise NotImplementedError(f"special register {name}")
            self.R[register] = np.atleast_1d(special[name]).astype(np.int64).astype(np.uint32)

    def mask(self, mask: Mask) -> Array:
        return np.ones(self.n, bool) if mask is None else mask

    def lanes(self, mask: Mask) -> Array:
        return np.arange(self.n) if mask is None else np.nonzero(mask)[0]

    # ---- groups

    def go(self, pc: int, mask: Mask) -> None:
        """Lanes continue at pc, joining those that are there."""
        if mask is not None:
            if not mask.any():
                return
            other = self.groups.get(pc)
            mask = mask if other is None else mask | other
            if mask.all():
                mask = None
        self.groups[pc] = mask

    def run(self, budget: int) -> None:
        """At most `budget` instructions."""
        program = self.batch.program
        while budget > 0 and self.groups:
            pc = at = min(self.groups)
            mask = self.groups.pop(pc)
            if program.steps[pc] is None:
                self._control(pc, mask)
                budget -= 1
                continue
            end = min(program.stop[pc], pc + budget, *self.groups)
            try:
                for at in range(pc, end):
                    program.steps[at](self, mask)  # type: ignore[misc]
            except (IndexError, ValueError, RuntimeError) as error:
                raise type(error)(f"{error}; {program.kernel.code[at]}") from error
            budget -= end - pc
            self.batch.left -= end - pc
            if self.batch.left < 0:
                raise RuntimeError(f"endless loop around {program.kernel.code[pc]}")
            self.go(end, mask)

    def _control(self, pc: int, mask: Mask) -> None:
        """Those whose guard holds branch, end or wait; the others go on."""
        instruction = self.batch.program.kernel.code[pc]
        if guard := self.batch.program.guards.get(pc):
            true = guard(self.R)
            if true.size > 1:
                self.go(pc + 1, self.mask(mask) & ~true)
                mask = true & self.mask(mask)
                if not mask.any():
                    return
            elif not true[0]:
                self.go(pc + 1, mask)
                return
        if instruction.op[0] == "bra":
            self.go(self.batch.program.kernel.labels[instruction.args[0]], mask)
        elif instruction.op[0] in ("ret", "exit"):
            self._end(mask)
        else:
            self._barrier(pc, instruction, mask)

    def _end(self, mask: Mask) -> None:
        self._alive = self._alive & ~self.mask(mask)
        warps = self._alive.reshape(-1, 32).any(1)
        if warps.sum() <= len(warps) * 3 // 4:
            self._forget(np.repeat(warps, 32))

    def _forget(self, keep: Array) -> None:
        """Drops warps that have ended, so that the others need not drag them along."""
        place = np.cumsum(keep) - 1
        copies, self._copies = self._copies, []
        for lanes, segment, *rest in copies:
            some = keep[lanes]
            offset, data, group = (array[some] for array in rest)
            self._copies.append((place[lanes[some]], segment, offset, data, group))
        self.waiting = [(barrier, pc, mask[keep]) for barrier, pc, mask in self.waiting]
        groups = {pc: self.mask(mask)[keep] for pc, mask in self.groups.items()}
        self.R = [value if value.size == 1 else value[keep] for value in self.R]
        self.block, self._committed = self.block[keep], self._committed[keep]
        self._alive, self.n, self.groups = self._alive[keep], int(keep.sum()), {}
        for pc, mask in groups.items():
            self.go(pc, mask)

    def _barrier(self, pc: int, instruction: Instruction, mask: Mask) -> None:
        """bar.sync id {, threads}; bar.arrive counts without waiting."""
        try:
            barrier, *expected = map(self.batch.program.constant, instruction.args)
        except KeyError as error:
            raise NotImplementedError(str(instruction)) from error
        if "red" in instruction.op or not {"sync", "arrive"} & set(instruction.op):
            raise NotImplementedError(str(instruction))
        lanes = self.mask(mask)
        if "sync" in instruction.op:
            self.waiting.append((barrier, pc + 1, lanes))
        else:
            self.go(pc + 1, mask)
        self.batch.arrive(barrier, self.block[lanes], (expected or [self.batch.threads])[0])

    def release(self, barrier: int, full: Array) -> None:
        """Lanes of full blocks go on."""
        waiting, self.waiting = self.waiting, []
        for name, pc, mask in waiting:
            stay = mask & ~full[self.block] if name == barrier else mask
            self.go(pc, mask & ~stay)
            if stay.any():
                self.waiting.append((name, pc, stay))

    # ---- asynchronous copies

    def start_copy(self, lanes: Array, landing: Piece, data: Array) -> None:
        """It lands at the wait, the latest moment; under a seed also at once, the earliest."""
        _, segment, offset = landing
        if self.batch.rng is not None and self.batch.rng.integers(2):
            segment.store(offset, data)
        else:
            self._copies.append((lanes, segment, offset, data, self._committed[lanes]))

    def commit_copies(self, mask: Mask) -> None:
        self._committed = self._committed + self.mask(mask)

    def finish_copies(self, mask: Mask, keep: int) -> None:
        """All but the `keep` latest groups land; -1: also those in no group."""
        active, copies, self._copies = self.mask(mask), self._copies, []
        for lanes, segment, offset, data, group in copies:
            lands = active[lanes] & (group < self._committed[lanes] - keep)
            segment.store(offset[lands], data[lands])
            if (stay := ~lands).any():
                left = (array[stay] for array in (offset, data, group))
                self._copies.append((lanes[stay], segment, *left))


def _special(batch: Batch, tid: Array, block: Array) -> dict[str, Any]:
    x, y, z = batch.grid
    lane = tid % 32
    return {
        "%tid.x": tid,
        "%tid.y": 0,
        "%tid.z": 0,
        "%ntid.x": batch.threads,
        "%ntid.y": 1,
        "%ntid.z": 1,
        "%ctaid.x": block % x,
        "%ctaid.y": block // x % y,
        "%ctaid.z": block // (x * y),
        "%nctaid.x": x,
        "%nctaid.y": y,
        "%nctaid.z": z,
        "%laneid": lane,
        "%warpid": tid // 32,
        "WARP_SZ": 32,
        "%lanemask_eq": 1 << lane,
        "%lanemask_lt": (1 << lane) - 1,
        "%lanemask_le": (2 << lane) - 1,
        "%lanemask_gt": -(2 << lane),
        "%lanemask_ge": -(1 << lane),
    }
