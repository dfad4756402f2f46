"""Whether other processes and other guests were busy while something was timed."""

from __future__ import annotations

import os
import time
from pathlib import Path

DISTURBED = 0.05
"""A measurement in which others had this share of all processors is taken again."""

ATTEMPTS = 3


class OtherLoad:
    """Processor time that was not ours since this was made: other processes, other guests."""

    def __init__(self) -> None:
        self._busy, self._own, self._wall = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
        ticks = user + nice + system + irq + softirq + steal
        own = os.times()
        busy = ticks / os.sysconf("SC_CLK_TCK")
        return busy, own.user + own.system, time.perf_counter()

    def share(self) -> float:
        """As a part of all the machine's processors, 0 to 1."""
        busy, own, wall = self._now()
        others = (busy - self._busy) - (own - self._own)
        return max(0.0, others / ((wall - self._wall) * (os.cpu_count() or 1)))
