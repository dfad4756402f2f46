"""Lanes at work: divergence, barriers, asynchronous copies, schedules.

`Warps` are lanes that are issued together: all warps of all blocks of a batch, or, where a seed
asks for random schedules, warp w of each block. Lanes of one program counter are a group; the group
with the lowest one runs, up to the next branch or the next group, which it then joins: groups meet
again behind a branch because compilers lay out code in that order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.gpu.simulator.decode import CONTROL, Decoder, Mask
from tests.gpu.simulator.lint import Lint
from tests.gpu.simulator.memory import GlobalMemory, Piece, SharedMemory, scatter
from tests.gpu.simulator.numbers import Array
from tests.gpu.simulator.parse import Instruction, Kernel

LIMIT = 20_000_000
"""Instructions of a batch, after which it is taken to be in an endless loop."""


class Program:
    """A decoded kernel. `stop[pc]` is the next control instruction at or after pc."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.decoder = Decoder(kernel)
        self.steps = self.decoder.steps
        self.stop = [0] * len(self.steps)
        self.guards: dict[int, Any] = {}
        for pc in reversed(range(len(self.steps))):
            self.stop[pc] = pc if self.steps[pc] is None else self.stop[pc + 1]
            instruction = kernel.code[pc]
            if instruction.op[0] in CONTROL and instruction.guard:
                self.guards[pc] = self.decoder.predicate(instruction)


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
        self.threads = program.kernel.threads
        self.shared = SharedMemory(len(blocks), shared_bytes)
        self.rng = rng
        self.arrived: dict[int, Array] = {}
        """Barrier -> threads of each block that wait at it."""
        self.warps: list[Warps] = []
        tids = np.arange(self.threads).reshape(-1, 32)
        for tid in [tids.reshape(-1)] if rng is None else tids:
            block = np.repeat(np.arange(len(blocks)), len(tid))
            self.warps.append(Warps(self, block, np.tile(tid, len(blocks)), blocks, grid))
        self.left = LIMIT

    def run(self) -> None:
        """Until every thread has ended."""
        while ready := [warps for warps in self.warps if warps.groups]:
            if self.rng is None:
                ready[0].run(LIMIT)
            else:
                ready[self.rng.integers(len(ready))].run(int(self.rng.integers(1, 200)))
        if waiting := [entry for warps in self.warps for entry in warps.waiting]:
            barrier, pc, mask = waiting[0]
            raise RuntimeError(
                f"deadlock: threads wait for others at barrier {barrier}, "
                f"{self.program.kernel.code[pc - 1]}"
            )

    def arrive(self, barrier: int, blocks: Array, expected: int) -> None:
        """Counts threads in, and releases those of full blocks."""
        count = self.arrived.setdefault(barrier, np.zeros(self.shared_blocks, np.int64))
        count += np.bincount(blocks, minlength=len(count))
        if (full := count >= expected).any():
            if (count > expected).any():
                raise RuntimeError(f"more than {expected} threads at barrier {barrier}")
            count[full] = 0
            for warps in self.warps:
                warps.release(barrier, full)

    @property
    def shared_blocks(self) -> int:
        return len(self.shared.data) // self.shared.stride


class Warps:
    """Lanes that are issued together, whole warps."""

    def __init__(
        self, batch: Batch, block: Array, tid: Array, blocks: Array, grid: tuple[int, int, int]
    ) -> None:
        self.batch, self.block = batch, block
        self.n = len(block)
        self.R = list(batch.program.decoder.initial)
        self.groups: dict[int, Mask] = {0: None}
        """Program counter -> lanes that are there and may run."""
        self.waiting: list[tuple[int, int, Array]] = []
        """Barrier, where to go on, lanes."""
        self.alive = np.ones(self.n, bool)
        self.committed = np.zeros(self.n, np.int64)
        """Groups of asynchronous copies that each lane has closed."""
        self.copies: list[tuple[Array, Piece, Array, Array]] = []
        """Under way: lanes, where to, bytes, each lane's group."""
        index = blocks[block]
        place = {
            "x": index % grid[0],
            "y": index // grid[0] % grid[1],
            "z": index // (grid[0] * grid[1]),
        }
        for name, register in batch.program.decoder.specials.items():
            self.R[register] = self._special(name, tid, place, grid)

    def _special(self, name: str, tid: Array, place: dict[str, Array], grid: Any) -> Array:
        name, _, axis = name.lstrip("%").partition(".")
        size = dict(zip("xyz", grid, strict=True))
        threads = {"x": self.batch.threads, "y": 1, "z": 1}
        lane = tid % 32
        values: dict[str, Any] = {
            "tid": tid if axis == "x" else [0],
            "ntid": [threads.get(axis)],
            "ctaid": place.get(axis),
            "nctaid": [size.get(axis)],
            "laneid": lane,
            "warpid": tid // 32,
            "nwarpid": [self.batch.threads // 32],
            "WARP_SZ": [32],
            "lanemask_eq": 1 << lane,
            "lanemask_lt": (1 << lane) - 1,
            "lanemask_le": (2 << lane) - 1,
            "lanemask_gt": 0xFFFFFFFF & -(2 << lane),
            "lanemask_ge": 0xFFFFFFFF & -(1 << lane),
        }
        if name not in values:
            raise NotImplementedError(f"special register %{name}")
        return np.asarray(values[name], np.int64).astype(np.uint32)

    # ---- groups

    def go(self, pc: int, mask: Mask) -> None:
        """Lanes continue at pc, joining those that are there."""
        if mask is not None:
            if not mask.any():
                return
            other = self.groups.get(pc)
            if other is not None:
                mask = mask | other
            if mask.all():
                mask = None
        self.groups[pc] = mask

    def run(self, budget: int) -> None:
        """At most `budget` instructions."""
        program = self.batch.program
        steps, stop = program.steps, program.stop
        while budget > 0 and self.groups:
            pc = min(self.groups)
            mask = self.groups.pop(pc)
            if steps[pc] is None:
                self._control(pc, mask)
                budget -= 1
                continue
            end = min(stop[pc], pc + budget, *self.groups)
            try:
                for at in range(pc, end):
                    steps[at](self, mask)  # type: ignore[misc]
            except (IndexError, ValueError, RuntimeError) as error:
                raise type(error)(f"{error}; {program.kernel.code[at]}") from error
            budget -= end - pc
            self.batch.left -= end - pc
            if self.batch.left < 0:
                raise RuntimeError(f"endless loop around {program.kernel.code[pc]}")
            self.go(end, mask)

    def _control(self, pc: int, mask: Mask) -> None:
        instruction = self.batch.program.kernel.code[pc]
        name = instruction.op[0]
        taken, rest = mask, None
        some = True
        if pc in self.batch.program.guards:
            true = self.batch.program.guards[pc](self.R)
            if true.size == 1:
                some = bool(true[0])
                if not some:
                    rest = mask
                    self.go(pc + 1, mask)
                    return
            else:
                taken = true if mask is None else true & mask
                rest = ~true if mask is None else mask & ~true
                self.go(pc + 1, rest)
                if not taken.any():
                    return
        if name == "bra":
            self.go(self.batch.program.kernel.labels[instruction.args[0]], taken)
        elif name in ("ret", "exit"):
            self._end(taken)
        else:
            self._barrier(pc, instruction, taken)

    # ---- ends and barriers

    def _lanes(self, mask: Mask) -> Array:
        return np.ones(self.n, bool) if mask is None else mask

    def _end(self, mask: Mask) -> None:
        self.alive = self.alive & ~self._lanes(mask)
        warps = self.alive.reshape(-1, 32).any(1)
        if warps.sum() <= len(warps) * 3 // 4:
            self._compact(np.repeat(warps, 32))

    def _compact(self, keep: Array) -> None:
        """Forgets warps that have ended."""
        place = np.cumsum(keep) - 1
        kept = []
        for lanes, (which, data, offset), values, group in self.copies:
            some = keep[lanes]
            kept.append(
                (place[lanes[some]], (which, data, offset[some]), values[some], group[some])
            )
        self.copies = kept
        self.waiting = [(barrier, pc, mask[keep]) for barrier, pc, mask in self.waiting]
        groups, self.groups = self.groups, {}
        self.R = [value if value.size == 1 else value[keep] for value in self.R]
        self.block, self.committed = self.block[keep], self.committed[keep]
        self.alive = self.alive[keep]
        self.n = len(self.block)
        for pc, mask in groups.items():
            self.go(pc, self._lanes(None) if mask is None else mask[keep])

    def _barrier(self, pc: int, instruction: Instruction, mask: Mask) -> None:
        """bar.sync id {, threads}; bar.arrive counts without waiting."""
        decoder = self.batch.program.decoder
        numbers = [decoder.constant(arg) for arg in instruction.args]
        kinds = set(instruction.op)
        if "red" in kinds or None in numbers or not kinds & {"sync", "arrive"}:
            raise NotImplementedError(str(instruction))
        lanes = self._lanes(mask)
        if "sync" in kinds:
            self.waiting.append((numbers[0] or 0, pc + 1, lanes))
        else:
            self.go(pc + 1, mask)
        expected = numbers[1] if len(numbers) > 1 else self.batch.threads
        self.batch.arrive(numbers[0] or 0, self.block[lanes], expected or 0)

    def release(self, barrier: int, full: Array) -> None:
        """Lanes of full blocks go on."""
        waiting, self.waiting = self.waiting, []
        for name, pc, mask in waiting:
            through = mask & full[self.block] if name == barrier else np.zeros_like(mask)
            self.go(pc, through)
            if (mask & ~through).any():
                self.waiting.append((name, pc, mask & ~through))

    # ---- asynchronous copies

    def start_copy(self, lanes: Array, to: Piece, data: Array) -> None:
        """It lands at the wait, the latest moment; under a seed also at once, the earliest."""
        if self.batch.rng is not None and self.batch.rng.integers(2):
            scatter(to, data)
        else:
            self.copies.append((lanes, to, data, self.committed[lanes]))

    def commit_copies(self, mask: Mask) -> None:
        self.committed = self.committed + self._lanes(mask)

    def finish_copies(self, mask: Mask, keep: int) -> None:
        """All but the `keep` latest groups land."""
        active = self._lanes(mask)
        copies, self.copies = self.copies, []
        for lanes, (which, memory, offset), data, group in copies:
            lands = active[lanes] & (group < self.committed[lanes] - keep)
            if lands.any():
                scatter((None, memory, offset[lands]), data[lands])
            if not lands.all():
                stay = ~lands
                self.copies.append(
                    (lanes[stay], (which, memory, offset[stay]), data[stay], group[stay])
                )
