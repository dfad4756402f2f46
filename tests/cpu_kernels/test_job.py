"""The memory of jobs: kept by shape, bounded, and never given to two jobs at a time."""

from __future__ import annotations

import threading

import pytest

from hybrid_moe.cpu_kernels.batch import Batch
from hybrid_moe.cpu_kernels.job import IdleMemory, JobMemory, JobShape


def shape(capacity: int, hidden: int = 64) -> JobShape:
    return JobShape(
        capacity,
        top_k=1,
        experts=4,
        hidden=hidden,
        x_row=160,
        h_row=160,
        unpacked_bytes=0,
        workers=1,
        pools=1,
    )


def test_memory_is_given_to_its_own_shape_only() -> None:
    idle = IdleMemory()
    small, large = (JobMemory.new(shape(capacity)) for capacity in (1, 2))
    idle.give_back(small)
    idle.give_back(large)
    assert idle.borrow(shape(1)) is small
    assert idle.borrow(shape(1)) is not small
    assert idle.borrow(shape(2)) is large


def test_the_oldest_goes_first() -> None:
    idle, made = IdleMemory(), [JobMemory.new(shape(capacity)) for capacity in range(1, 20)]
    for memory in made:
        idle.give_back(memory)
    assert idle._idle == made[-IdleMemory.MOST_JOBS :]
    idle.clear()
    assert idle.borrow(shape(19)) is not made[-1]


def test_large_memory_goes_but_for_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IdleMemory, "MOST_BYTES", shape(1).nbytes)
    idle = IdleMemory()
    for capacity in (1, 2, 3):
        idle.give_back(latest := JobMemory.new(shape(capacity)))
        assert idle._idle == [latest]


def test_threads_never_hold_the_same_memory() -> None:
    idle, held, lock = IdleMemory(), set[int](), threading.Lock()
    clashes: list[int] = []

    def use() -> None:
        for turn in range(300):
            memory = idle.borrow(shape(1 + turn % 2))
            with lock:
                clashes.extend({id(memory)} & held)
                held.add(id(memory))
            with lock:
                held.remove(id(memory))
            idle.give_back(memory)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes and len(idle._idle) <= 8


def test_shared_memory_has_descriptors_of_its_own() -> None:
    memory = JobMemory.new(shape(4))
    other = memory.share()
    memory.fill(7, Batch(3, 1, 10, 20, 30, 40, 50))
    assert other.address != memory.address and other.descriptor.tokens == 0
    assert other.descriptor.scratch == memory.descriptor.scratch
    job = memory.descriptor
    assert (job.layer.address, job.tokens, job.top_k, job.x) == (7, 3, 1, 10)
    assert (job.ids.address, job.weights.address, job.skip.address) == (20, 30, 40)
    assert job.out.value == 50


@pytest.mark.parametrize(("tokens", "sizes"), [(1, [1]), (8, [8]), (9, [8, 1]), (24, [8, 8, 8])])
def test_parts_of_a_batch(tokens: int, sizes: list[int]) -> None:
    """They adjoin in every array, and read one mask."""
    k, H = 3, 64
    batch = Batch(tokens, k, x=1000, ids=20000, weights=50000, skip=7, out=90000)
    begin = 0
    for part, size in zip(batch.parts(8, H), sizes, strict=True):
        assert (part.tokens, part.top_k, part.skip) == (size, k, 7)
        assert (part.x, part.out) == (1000 + 2 * H * begin, 90000 + 2 * H * begin)
        assert (part.ids, part.weights) == (20000 + 8 * k * begin, 50000 + 4 * k * begin)
        begin += size
    assert begin == tokens
