"""What memory requests cost. A request is one instruction of one warp.

Global memory moves sectors of 32 bytes: a request is ideal if the sectors that it touches hold
nothing but bytes that it wants. Shared memory has 32 banks of 4 bytes and serves a request in
wavefronts, each with one word a bank: lanes of a quarter warp together where a lane wants 16 bytes,
of a half for 8, of a whole warp for less. More wavefronts than the words need are bank conflicts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from tests.gpu.simulator.memory import Segment
from tests.gpu.simulator.numbers import Array
from tests.gpu.simulator.parse import Instruction

SECTOR, LINE = 32, 128


@dataclass
class Access:
    """All requests of one instruction to one array, "" being shared memory."""

    instruction: Instruction
    array: str
    size: int
    """Bytes of a lane."""
    requests: int = 0
    units: int = 0
    """Sectors in global memory, wavefronts in shared memory."""
    ideal: int = 0
    """How few units could have done it."""
    lines: int = 0
    """Lines of 128 bytes, in global memory."""
    ideal_lines: int = 0

    @property
    def space(self) -> str:
        return "global" if self.array else "shared"

    @property
    def efficiency(self) -> float:
        return self.ideal / self.units

    def __str__(self) -> str:
        name = "sectors" if self.space == "global" else "wavefronts"
        return (
            f"{self.array or 'shared':12} {self.requests:8} requests, {self.units} {name}, "
            f"{self.ideal} ideal ({self.efficiency:.0%}): {self.instruction}"
        )


@dataclass
class Traffic:
    """What a kernel read from one array."""

    requests: int
    sectors: int
    """Of 32 bytes, as often as they were asked for."""
    distinct_sectors: int
    """Each counted once: what a cache that never forgets would fetch."""

    @property
    def bytes(self) -> int:
        return self.sectors * SECTOR

    @property
    def distinct_bytes(self) -> int:
        return self.distinct_sectors * SECTOR


class Lint:
    """Counts requests while a kernel runs."""

    def __init__(self) -> None:
        self.accesses: dict[tuple[int, str], Access] = {}
        """Of each line of the text and array."""
        self._read: dict[str, Array] = {}  # array -> sectors that were read, bool
        self._costs: dict[tuple[bool, int, bytes], Array] = {}

    def count(
        self, instruction: Instruction, segment: Segment, size: int, address: Array, mask: Array
    ) -> None:
        """Adds the requests of all warps: `size` bytes at address, int64 [lanes], where mask is."""
        rows, active = address.reshape(-1, 32), mask.reshape(-1, 32)
        base = np.where(active, rows, np.iinfo(np.int64).max).min(1) & -LINE
        relative = np.where(active, rows - base[:, None], -1)
        if (relative == relative[0]).all():
            patterns = Counter({relative[0].tobytes(): len(relative)})
        else:
            patterns = Counter(row.tobytes() for row in relative)
        total, shared = np.zeros(5, np.int64), not segment.name
        for pattern, times in patterns.items():
            key = (shared, size, pattern)
            if key not in self._costs:
                lanes = [(i, a) for i, a in enumerate(np.frombuffer(pattern, np.int64)) if a >= 0]
                cost = _shared_cost if shared else _global_cost
                self._costs[key] = np.array(cost(lanes, size) if lanes else [0] * 5)
            total += times * self._costs[key]
        access = self.accesses.setdefault(
            (instruction.line, segment.name), Access(instruction, segment.name, size)
        )
        for name, more in zip(list(vars(access))[3:], total.tolist(), strict=True):
            setattr(access, name, getattr(access, name) + more)
        if not shared and instruction.op[0] != "st":
            read = self._read.setdefault(
                segment.name, np.zeros(-(-segment.data.size // SECTOR), bool)
            )
            for byte in range(0, size, SECTOR):
                read[(address[mask] - segment.address + byte) // SECTOR] = True

    def reads(self) -> dict[str, Traffic]:
        """Array -> what was read from it."""
        traffic = {name: Traffic(0, 0, int(read.sum())) for name, read in self._read.items()}
        for (_, name), access in self.accesses.items():
            if name in traffic and access.instruction.op[0] != "st":
                traffic[name].requests += access.requests
                traffic[name].sectors += access.units
        return traffic


def _global_cost(lanes: list[tuple[int, int]], size: int) -> list[int]:
    wanted = {a + i for _, a in lanes for i in range(size)}
    sectors, lines = {b // SECTOR for b in wanted}, {b // LINE for b in wanted}
    return [1, len(sectors), -(-len(wanted) // SECTOR), len(lines), -(-len(wanted) // LINE)]


def _shared_cost(lanes: list[tuple[int, int]], size: int) -> list[int]:
    together = {16: 8, 8: 16}.get(size, 32)
    wavefronts = ideal = 0
    for first in range(0, 32, together):
        some = [a for lane, a in lanes if first <= lane < first + together]
        words = {(a + i) // 4 for a in some for i in range(0, size, 4)}
        wavefronts += max(Counter(word % 32 for word in words).values(), default=0)
        ideal += -(-len(words) // 32)
    return [1, wavefronts, ideal, 0, 0]
