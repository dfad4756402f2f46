"""When tokens come, and how fast memory is read between them."""

from __future__ import annotations

import time

from hybrid_moe.cpu_kernels.ceilings.bandwidth import ReadProbe

SLICE = 8
"""Tokens between two measurements of the read bandwidth: neighbours change it within seconds."""

READ_SECONDS = 0.075


class TokenClock:
    """Notes the times of one answer. Every `SLICE` tokens the clock stands still and memory is
    read instead.

    Attributes:
        prefill: seconds from the start to the first token.
        seconds: of each later token.
        reads: GB/s before the first of these, after every `SLICE`, and after the last.
    """

    def __init__(self, probe: ReadProbe | None) -> None:
        self._probe = probe
        self._last = 0.0
        self.prefill = 0.0
        self.seconds: list[float] = []
        self.reads: list[float] = []

    def start(self) -> None:
        """The prompt goes in now."""
        self._last = time.perf_counter()

    def token(self) -> None:
        """A token has come."""
        took = time.perf_counter() - self._last
        if not self.prefill:
            self.prefill = took
            self._read()
        else:
            self.seconds.append(took)
            if len(self.seconds) % SLICE == 0:
                self._read()
        self._last = time.perf_counter()

    def finish(self) -> None:
        """That was the last one."""
        if len(self.seconds) % SLICE:
            self._read()

    def _read(self) -> None:
        if self._probe is not None:
            self.reads.append(self._probe.measure(READ_SECONDS))
