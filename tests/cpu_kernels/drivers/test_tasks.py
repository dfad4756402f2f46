"""Tasks are even, and long runs of strips: by counting what each worker reads."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.cpu_kernels.drivers.counted import CountedJob, Shape

SHAPES = {
    "A": Shape(4096, 2048, 64, 6),
    "B": Shape(2048, 768, 128, 8),
    "C": Shape(2880, 2880, 32, 4),
    "D": Shape(7168, 2048, 24, 8),
}
"""Those of the benchmarks."""
RUN = 100_000
"""Bytes of a run, on average, unless each worker has less than that."""


POOLS = ((1,), (2,), (7,), (16,), (64,), (96,), (8, 8), (11, 10), (12,) * 8)


@pytest.mark.parametrize("threads", POOLS, ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_few_tokens_are_read_evenly_and_in_long_runs(
    name: str, tokens: int, threads: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The busiest worker reads at most 1.15 times the mean, or where a pool has few strips for each
    of its workers, as few of them as whole strips allow."""
    job = CountedJob(SHAPES[name], tokens, threads, monkeypatch)
    for phase, pools in job.workers.items():
        for workers in pools:
            nbytes = [worker.nbytes for worker in workers]
            total, mean = sum(nbytes), sum(nbytes) / len(nbytes)
            strips = total // job.strip_bytes[phase]
            least = -(-strips // len(workers)) * job.strip_bytes[phase]
            assert max(nbytes) <= max(1.15 * mean, least), phase
            runs = sum(worker.runs for worker in workers)
            assert runs <= max(total / RUN, len(workers) + job.active - 1), phase


@pytest.mark.parametrize("threads", POOLS, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 70, 700])
@pytest.mark.parametrize("name", ["B", "C"])
def test_tasks_cover_the_strips_of_all_experts_once(
    name: str, tokens: int, threads: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each strip of each active expert, for as many passes as its tokens need."""
    job = CountedJob(SHAPES[name], tokens, threads, monkeypatch)
    for phase, pools in job.workers.items():
        seen = Counter(address for workers in pools for w in workers for address in w.strips)
        assert seen == job.wanted(phase)
