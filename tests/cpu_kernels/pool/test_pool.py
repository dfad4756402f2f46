"""Worker pools: configurations, queues of jobs, late workers."""

from __future__ import annotations

import gc
import random
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from hybrid_moe.cpu_kernels.drivers.records import MAX_POOLS, RING
from hybrid_moe.cpu_kernels.job import IDLE
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool import group as group_module
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.group import PoolGroup, group_for
from hybrid_moe.cpu_kernels.pool.topology import numa_nodes, usable_cores
from hybrid_moe.cpu_kernels.tuning import AWAKE_SPIN_NS, SPIN_NS
from hybrid_moe.formats.mx import MXFP4
from tests.cpu_kernels.cases import Array, Case, random_batch
from tests.machines import Machine, pretend_processors

_NODE = min(numa_nodes())
MOST = min(2, usable_cores())

Batch = tuple[Array, Array, Array]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": 0}, "at least 1"),
        ({"threads": -3}, "at least 1"),
        ({"threads": 1, "pools": 0}, "at least 1"),
        ({"threads": 1, "pools": 2}, "every pool needs a thread"),
        ({"threads": 99, "pools": MAX_POOLS + 1}, f"at most {MAX_POOLS}"),
        ({"threads": 4096}, "may use"),
        ({"threads": 1, "numa_nodes": (900,)}, "unknown NUMA node 900"),
        ({"threads": 1, "numa_nodes": (_NODE, _NODE)}, "names 2 nodes"),
        ({"threads": 1, "numa_nodes": ()}, "names 0 nodes"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PoolConfig(**arguments)  # type: ignore[arg-type]


def test_threads_are_spread_over_pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine({0: "0-3", 2: "8-9"}).pretend(tmp_path, monkeypatch)
    config = PoolConfig(5, 2)
    assert config.nodes == ((0,), (2,))
    assert config.threads_per_pool == (3, 2)
    assert config.worker_pools() == (0, 0, 0, 1, 1)
    assert config.worker_cpus() == (0, 1, 2, 8, 9)
    assert PoolConfig(2, 2, (2, 2)).worker_cpus() == (8, 9)
    with pytest.raises(ValueError, match=r"4 threads for NUMA node 2, where .* may use 2"):
        PoolConfig(4, 2, (2, 2))
    with pytest.raises(ValueError, match="unknown NUMA node 1"):
        PoolConfig(4, 2, (0, 1))


def test_equal_configurations_share_their_threads() -> None:
    group = group_for(PoolConfig(1))
    assert group_for(PoolConfig(1)) is group
    assert group_for(PoolConfig(1, 1, (_NODE,))) is not group


def _jobs(case: Case, count: int, most_tokens: int = 6) -> list[Batch]:
    rng = random.Random(count)
    return [
        random_batch(rng.choice([1, 1, 2, most_tokens]), case.H, case.E, 2, seed=i)
        for i in range(count)
    ]


def _expected(layer: ExpertLayer, batches: list[Batch]) -> list[Array]:
    return [layer.forward(*batch) for batch in batches]


@pytest.fixture(params=range(1, MOST + 1), ids=lambda n: f"{n}threads")
def layer(request: pytest.FixtureRequest) -> ExpertLayer:
    return Case.random(MXFP4, 64, 96).layer(pool=PoolConfig(request.param))


CASE = Case.random(MXFP4, 64, 96)


def test_many_jobs_before_any_wait(layer: ExpertLayer) -> None:
    batches = _jobs(CASE, 3 * RING + 5)
    expected = _expected(layer, batches)
    jobs = [layer.submit(*batch) for batch in batches]
    for index in reversed(range(len(jobs))):
        assert np.array_equal(jobs[index].wait(), expected[index])
        assert jobs[index].done


def test_wait_twice(layer: ExpertLayer) -> None:
    batch = random_batch(3, 64, 5, 2)
    job = layer.submit(*batch)
    assert np.array_equal(job.wait(), job.wait())


def test_jobs_dropped_without_a_wait(layer: ExpertLayer) -> None:
    """Their memory lives as long as workers use it."""
    batches = _jobs(CASE, 10)
    expected = _expected(layer, batches)
    for _ in range(5):
        for batch in batches[:7]:
            layer.submit(*batch)
        gc.collect()
        for batch, value in zip(batches, expected, strict=True):
            assert np.array_equal(layer.forward(*batch), value)


def test_completed_jobs_are_forgotten(layer: ExpertLayer) -> None:
    """By whoever waits, looks, or submits next, also where nobody waited for the job itself."""
    group = group_for(layer.pool)
    batch = random_batch(1, 64, 5, 2)
    layer.forward(*batch)
    assert not group._in_flight
    job = layer.submit(*batch)
    layer.submit(*batch)  # dropped
    layer.submit(*batch).wait()
    assert not group._in_flight and job.done
    jobs = [layer.submit(*batch) for _ in range(4)]
    group.wait(group.control.submitted.value)
    assert all(job.done for job in jobs) and not group._in_flight


def test_groups_coexist() -> None:
    layers = [CASE.layer(pool=PoolConfig(n, 1, (_NODE,))) for n in range(1, MOST + 1)]
    batches = _jobs(CASE, 12)
    expected = _expected(layers[0], batches)
    jobs = [[layer.submit(*batch) for layer in layers] for batch in batches]
    for value, pair in zip(expected, jobs, strict=True):
        for job in pair:
            assert np.array_equal(job.wait(), value)


def test_a_thread_in_place_of_the_caller() -> None:
    """CUDA's way: the caller only waits. Without Python's help the jobs complete."""
    config = PoolConfig(1, 1, (_NODE,) if MOST > 1 else None)
    group = group_module.PoolGroup(config)
    try:
        group.start_background_worker()
        layer = CASE.layer(pool=config)
        layer._group = group
        batches = _jobs(CASE, RING + 4)
        reference = CASE.layer()
        for batch in batches:
            assert np.array_equal(layer.forward(*batch), reference.forward(*batch))
        job = layer.submit(*batches[0])
        deadline = time.monotonic() + 60
        while not job.done:
            assert time.monotonic() < deadline, "the background worker never ran the job"
            time.sleep(0.001)
    finally:
        group.stop()
    with pytest.raises(RuntimeError, match="stopped"):
        layer.forward(*batches[0])


def test_memory_of_jobs_is_reused_and_bounded(mapped: list[int]) -> None:
    layer = CASE.layer()
    batch = random_batch(3, 64, 5, 2)
    layer.forward(*batch)
    mapped.clear()
    for _ in range(5):
        layer.forward(*batch)
    assert not mapped, "equal batches use the memory that the first one mapped"
    IDLE.clear()
    layer.forward(*batch)
    assert len(mapped) == 1


# late workers


def test_idle_workers_wake_for_every_job(layer: ExpertLayer) -> None:
    """2,000 jobs with pauses around the length of the spin: some find the workers asleep, some
    awake, some falling asleep."""
    batches = _jobs(CASE, 20)
    expected = _expected(layer, batches)
    rng = random.Random(5)
    for i in range(2000):
        pick = i % len(batches)
        assert np.array_equal(layer.forward(*batches[pick]), expected[pick])
        if rng.random() < 0.3:
            time.sleep(rng.random() * 3e-4)


def test_more_workers_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system puts workers aside at any point; a late one finds another job in its slot."""
    pretend_processors(monkeypatch)
    config = PoolConfig(5, 2, (_NODE, _NODE))
    group = group_module.PoolGroup(config)
    try:
        layer = CASE.layer(pool=config)
        layer._group = group
        batches = _jobs(CASE, 12)
        expected = _expected(CASE.layer(), batches)
        rng = random.Random(6)
        for _ in range(40):
            picks = [rng.randrange(12) for _ in range(rng.randrange(1, 6))]
            jobs = [layer.submit(*batches[pick]) for pick in picks]
            if rng.random() < 0.2:
                time.sleep(rng.random() * 1e-3)
            for pick, job in zip(picks, jobs, strict=True):
                assert np.array_equal(job.wait(), expected[pick])
    finally:
        group.stop()
    assert not any(thread.is_alive() for thread in group._threads)


def test_idle_workers_stay_awake_in_scopes() -> None:
    """Scopes overlap as those of two threads do; the last one to end ends it, also by an error."""
    group = PoolGroup(PoolConfig(1))
    word, first = group.control.spin_ns, ExitStack()
    assert word.value == SPIN_NS
    first.enter_context(group.awake())
    with pytest.raises(KeyError), group.awake():
        first.close()
        assert word.value == AWAKE_SPIN_NS
        raise KeyError
    assert word.value == SPIN_NS
    group.stop()
