"""How near the memory's speed an answer was decoded, and what kept it from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybrid_moe.cpu_kernels.pool.config import PoolConfig
    from hybrid_moe.cpu_kernels.pool.group import PoolGroup
    from hybrid_moe.integrations.transformers.serving.answers import Answer


@dataclass(frozen=True)
class Roofline:
    """What one token of decode costs at the least.

    Attributes:
        bandwidth: bytes that the threads read from memory per second.
        nbytes: bytes that a token reads, the context half way through the answer.
    """

    bandwidth: float
    nbytes: int

    def summary(self, answer: Answer, waited: float) -> str:
        """Share of the roofline, and the limit.

        Args:
            answer: two tokens at least.
            waited: seconds of its decode in which a job of the pool ran, see `WaitClock`.

        A token takes T seconds, of which the jobs take J, of which reading takes M at the
        memory's speed. T - J is torch's and Python's, J - M the kernels' own.
        """
        tokens = len(answer.times) - 1
        whole = (answer.times[-1] - answer.times[0]) / tokens
        jobs = min(waited / tokens, whole)
        reading = self.nbytes / self.bandwidth
        parts = {"memory": reading, "torch": whole - jobs, "compute": jobs - reading}
        limit = max(parts, key=lambda name: parts[name])
        why = {
            "memory": "memory",
            "torch": f"torch: {100 * parts['torch'] / whole:.0f} % of the time is outside kernels",
            "compute": f"compute: kernels take {jobs / reading:.1f} times as long as reading",
        }
        share = 100 * reading / whole
        return (
            f"{share:.0f} % of the roofline " if share >= 1 else "less than 1 % of the roofline "
        ) + (
            f"({_bytes(self.nbytes)} a token at {self.bandwidth / 1e9:.1f} GB/s); "
            f"limited by {why[limit]}"
        )


def measure_bandwidth(pool: PoolConfig) -> float:
    """Bytes per second that these threads read from memory; about a quarter of a second, and a
    buffer of four times the caches meanwhile."""
    from hybrid_moe.cpu_kernels.ceilings import bandwidth

    probe = bandwidth.ReadProbe(pool)
    return 1e9 * sorted(probe.measure(0.05, at_random=True) for _ in range(3))[1]


def bytes_of_a_token(path: Path, method: str | None, dense: str, context: int) -> int:
    """What one token reads with `context` tokens before it.

    Raises:
        ValueError: the configuration does not say.
    """
    from hybrid_moe.planning.model import read_model
    from hybrid_moe.planning.reading import token_reads

    return token_reads(read_model(path, method=method, dense=dense), context).total


class WaitClock:
    """Sums the seconds in which a thread waited for jobs of a group, and worked on them.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def on(self, group: PoolGroup) -> Iterator[None]:
        """Count the waits of `group` meanwhile."""
        wait = group.wait

        def timed(sequence: int) -> None:
            begin = perf_counter()
            wait(sequence)
            self.seconds += perf_counter() - begin

        group.wait = timed  # type: ignore[method-assign]
        try:
            yield
        finally:
            del group.wait  # the class's is seen again


def _bytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
