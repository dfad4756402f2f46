"""The fork-join benchmark: its arithmetic, and that it runs what it says."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pool
import pytest
from harness import make_layer
from tables import POOL, rows

from hybrid_moe.cpu_kernels.drivers.records import RING, ZERO
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import usable_cores

THREADS = [1, pytest.param(2, marks=pytest.mark.skipif(usable_cores() < 2, reason="one core"))]


def test_median_and_99th_percentile_in_microseconds() -> None:
    nanoseconds = np.arange(1, 102, dtype=np.int64) * 1000
    assert pool.summary(nanoseconds) == (51.0, 100.0)


@pytest.mark.parametrize(("signal", "share"), [(0.25, "50"), (None, "")])
def test_share_of_the_bare_signal(signal: float | None, share: str) -> None:
    point = pool.Point("tiny", 2, "hot", "handed over", 0.5, 1.0, signal, None)
    header, (row,) = rows(POOL, [asdict(point)])
    assert row[header.index("% of it")] == share


@pytest.mark.parametrize("threads", THREADS)
def test_tiny_job_is_one_task_for_each_thread(threads: int) -> None:
    layer = make_layer(pool.tiny_shape(threads), "MXFP4", PoolConfig(threads))
    layer.forward(*pool.empty_batch(layer))
    group = layer._ready().group
    entry = group.control.ring[group.completed % RING]
    phases = [entry.phases[index] for index in range(entry.phase_count.value)]
    assert [(phase.kind, phase.total.value) for phase in phases] == [(ZERO, threads)]
    layer.close()


@pytest.mark.parametrize("threads", THREADS)
def test_every_case_is_measured(threads: int) -> None:
    points = pool.measure(threads, [pool.tiny_shape(threads)], 5)
    assert len(points) == (1 if threads == 1 else 4)
    assert len({(p.state, p.caller) for p in points}) == len(points)
    assert all(0 < p.median_us <= p.p99_us for p in points)
    assert all((p.signal_us is not None) == (p.caller == "handed over") for p in points)
