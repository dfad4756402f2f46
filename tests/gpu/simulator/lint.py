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

from tests.gpu.simulator.memory import SECTOR, GlobalMemory
from tests.gpu.simulator.numbers import Array
from tests.gpu.simulator.parse import Instruction

WARP = 32


@dataclass
class Access:
    """All requests of one instruction."""

    instruction: Instruction
    space: str
    """"global" or "shared"."""
    array: str
    """Argument whose array it touches, "" in shared memory."""
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
    wanted: int = 0
    """Distinct bytes, summed over requests."""

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
    """32-byte sectors, as often as they were asked for."""
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
        self.accesses: dict[tuple[int, str, str], Access] = {}
        self._costs: dict[tuple[str, int, bytes], Array] = {}

    def count(
        self,
        instruction: Instruction,
        space: str,
        array: str,
        size: int,
        address: Array,
        mask: Array,
    ) -> None:
        """Adds the requests of all warps. address: int64 [lanes]; mask: the lanes that take part."""
        rows = address.reshape(-1, WARP)
        active = mask.reshape(-1, WARP)
        base = np.where(active, rows, np.iinfo(np.int64).max).min(1) & ~127
        relative = np.where(active, rows - base[:, None], -1)
        if (relative == relative[0]).all():
            patterns = Counter({relative[0].tobytes(): len(relative)})
        else:
            patterns = Counter(row.tobytes() for row in relative)
        total = np.zeros(6, np.int64)
        for pattern, times in patterns.items():
            key = (space, size, pattern)
            if key not in self._costs:
                lanes = [(i, a) for i, a in enumerate(np.frombuffer(pattern, np.int64)) if a >= 0]
                cost = _global_cost if space == "global" else _shared_cost
                self._costs[key] = np.array(cost(lanes, size) if lanes else [0] * 6)
            total += times * self._costs[key]
        access = self.accesses.setdefault(
            (instruction.line, space, array), Access(instruction, space, array, size)
        )
        access.requests += int(total[0])
        access.units += int(total[1])
        access.ideal += int(total[2])
        access.lines += int(total[3])
        access.ideal_lines += int(total[4])
        access.wanted += int(total[5])

    def reads(self, memory: GlobalMemory) -> dict[str, Traffic]:
        """Argument -> what was read from its array."""
        traffic = {}
        for segment in memory.segments:
            requests = sectors = 0
            for (_, _, name), access in self.accesses.items():
                if name == segment.name and access.instruction.op[0] in ("ld", "cp"):
                    requests += access.requests
                    sectors += access.units
            traffic[segment.name] = Traffic(requests, sectors, int(segment.read.sum()))
        return traffic


def _global_cost(lanes: list[tuple[int, int]], size: int) -> list[int]:
    wanted = {a + i for _, a in lanes for i in range(size)}
    sectors, lines = {b // SECTOR for b in wanted}, {b // 128 for b in wanted}
    ideal, ideal_lines = -(-len(wanted) // SECTOR), -(-len(wanted) // 128)
    return [1, len(sectors), ideal, len(lines), ideal_lines, len(wanted)]


def _shared_cost(lanes: list[tuple[int, int]], size: int) -> list[int]:
    together = {16: 8, 8: 16}.get(size, WARP)
    wavefronts = ideal = 0
    for first in range(0, WARP, together):
        words = {
            (a + i) // 4
            for lane, a in lanes
            if first <= lane < first + together
            for i in range(0, size, 4)
        }
        if words:
            wavefronts += max(Counter(word % 32 for word in words).values())
            ideal += -(-len(words) // 32)
    return [1, wavefronts, ideal, 0, 0, 0]
