"""Tasks are even, and long runs of strips: by counting what each worker reads."""

from __future__ import annotations

from collections import Counter

import pytest

from hybrid_moe.cpu_kernels.drivers.records import DOWN, DOWN_BY_PAIR, GATE_UP
from tests.cpu_kernels.drivers.counted import CountedJob, Shape

SHAPES = {
    "A": Shape(4096, 2048, 64, 6),
    "B": Shape(2048, 768, 128, 8),
    "C": Shape(2880, 2880, 32, 4),
    "D": Shape(7168, 2048, 24, 8),
}
"""Those of the benchmarks."""
POOLS = ((1,), (2,), (7,), (16,), (64,), (96,), (8, 8), (11, 10), (12,) * 8)
RUN = 100_000
"""Bytes that a run has on average, unless no worker has that many of one expert."""


@pytest.mark.parametrize("threads", POOLS, ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_few_tokens_are_read_evenly_and_in_long_runs(
    name: str, tokens: int, threads: tuple[int, ...]
) -> None:
    """The busiest worker reads at most 1.15 times the mean, or where a pool has few strips for each
    of its workers, as many of them as whole strips make necessary."""
    job = CountedJob(SHAPES[name], tokens, threads)
    assert len(job.reads) == 2
    for read in job.reads:
        for workers in read.pools:
            nbytes = [worker.nbytes for worker in workers]
            total, mean = sum(nbytes), sum(nbytes) / len(nbytes)
            least = -(-(total // read.strip_bytes) // len(workers)) * read.strip_bytes
            assert max(nbytes) <= max(1.15 * mean, least), read.kind
            runs = sum(worker.runs for worker in workers)
            assert runs <= max(total / RUN, len(workers) + job.active - 1), read.kind


@pytest.mark.parametrize("threads", POOLS, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 70, 700])
@pytest.mark.parametrize("name", ["B", "C"])
def test_tasks_are_all_strips_of_all_active_experts(
    name: str, tokens: int, threads: tuple[int, ...]
) -> None:
    """Each once, or where an expert has many tokens, once for each pass."""
    job = CountedJob(SHAPES[name], tokens, threads)
    for read in job.reads:
        seen = Counter(strip for workers in read.pools for w in workers for strip in w.strips)
        assert seen == read.wanted


@pytest.mark.parametrize(
    ("threads", "tokens", "kind"),
    [((8,), 1, DOWN), ((9,), 1, DOWN_BY_PAIR), ((9,), 64, DOWN_BY_PAIR), ((9,), 65, DOWN)],
)
def test_rows_by_pair_are_for_many_workers_and_few_tokens(
    threads: tuple[int, ...], tokens: int, kind: int
) -> None:
    """64 strips of output: more than an eighth as many workers."""
    job = CountedJob(SHAPES["A"], tokens, threads)
    assert [read.kind for read in job.reads] == [GATE_UP, kind]
