"""A wait is ended by a wake-up and by nothing else: here no time-out runs out for an hour.

A lost wake-up is a thread that stays; the tests look for it after a minute.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from hybrid_moe.cpu_kernels.batch import Batch
from hybrid_moe.cpu_kernels.drivers import worker
from hybrid_moe.cpu_kernels.drivers.records import IDS_COUNT, RING, GraphJob, Group
from hybrid_moe.cpu_kernels.jit.record import Word
from hybrid_moe.cpu_kernels.job import JobMemory
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.group import PoolGroup
from hybrid_moe.cpu_kernels.pool.topology import numa_nodes
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.table import BF16
from tests.cpu_kernels.cases import Array, Case, random_batch
from tests.machines import pretend_processors
from tests.streams.interpreted import interpret

HOUR, MINUTE = 3600, 60
CASE = Case.random(MXFP4, 64, 96)
OTHER = Case.random(BF16, 32, 64, seed=4)

Groups = Callable[..., PoolGroup]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Groups]:
    """Makes groups of any number of threads whose waits do not time out."""
    pretend_processors(monkeypatch)
    groups: list[PoolGroup] = []

    def make(threads: int, pools: int = 1) -> PoolGroup:
        group = PoolGroup(PoolConfig(threads, pools, (min(numa_nodes()),) * pools))
        groups.append(group)
        control = group.control
        control.timeout_ns = HOUR * 10**9
        control.timeout[0], control.timeout[1] = HOUR, 0
        return group

    yield make
    for group in groups:
        group.stop()
        assert not any(thread.is_alive() for thread in group._threads)


def layer_of(case: Case, group: PoolGroup) -> ExpertLayer:
    layer = case.layer(pool=group.config)
    layer._group = group
    return layer


def started(target: Callable[..., object], *args: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + MINUTE
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def ended(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(MINUTE)
        assert not thread.is_alive(), "a thread waits for a wake-up that never came"


def _held_until_somebody_sleeps(group: PoolGroup, word: Word) -> None:
    """Open a lock, which was held, when another thread sleeps on it."""
    until(lambda: word.value == 2, "nobody sleeps on the lock")
    word.value = 0
    wake_private = 129
    arguments = (group.control.futex, word.address, wake_private, 1, 0)
    ctypes.CDLL(None).syscall(*map(ctypes.c_long, arguments))


@contextmanager
def one_task_stands_still(layer: ExpertLayer) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The first gate/up task sets the first event, and waits for the second."""
    descriptor = layer._ready().descriptor
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 9)
    address = descriptor.activate
    activate = kind(address)
    aside, go_on, first = threading.Event(), threading.Event(), threading.Lock()

    def stalled(*arguments: int) -> None:
        if first.acquire(blocking=False):
            aside.set()
            go_on.wait(MINUTE)
        activate(*arguments)

    replaced = kind(stalled)
    descriptor.activate = ctypes.cast(replaced, ctypes.c_void_p).value
    try:
        yield aside, go_on
    finally:
        go_on.set()
        descriptor.activate = address


class Posted:
    """A graph job of a layer, over buffers of its own."""

    def __init__(self, layer: ExpertLayer, tokens: int, seed: int) -> None:
        batch = random_batch(tokens, CASE.H, CASE.E, 2, seed=seed)
        self.inputs = [np.ascontiguousarray(array) for array in batch]
        self.out = np.zeros((tokens, CASE.H), np.uint16)
        self.skip = np.zeros(CASE.E, np.bool_)
        x, ids, weights = (array.ctypes.data for array in self.inputs)
        skip, out = self.skip.ctypes.data, self.out.ctypes.data
        self.job = layer.graph_job(
            Batch(tokens, 2, x, ids, weights, skip, out),
            JobMemory.new(layer.job_shape(tokens, 2)),
            ignored_ids=IDS_COUNT,
        )
        self.expected = CASE.layer().forward(*batch)

    def post(self) -> None:
        self._call(self.job.post_fn)

    def wait(self) -> None:
        self._call(self.job.wait_fn)

    def _call(self, function: int) -> None:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(self.job.user_data)


def test_a_waiter_takes_over_from_worker_0(patient: Groups) -> None:
    """One thread, two callers: the second works on its job when the first has its own."""
    group = patient(1)
    layer = layer_of(Case.random(MXFP4, 512, 512, E=4), group)
    jobs = [layer.submit(*random_batch(tokens, 512, 4, 2)) for tokens in (1000, 3)]
    first = started(jobs[0].wait)
    until(lambda: group.control.worker0.value == 1 or jobs[0].done, "nobody became worker 0")
    second = started(jobs[1].wait)
    until(
        lambda: group.control.done.sleepers.value == 1 or jobs[0].done, "the second did not sleep"
    )
    ended(first, second)
    assert group.control.worker0.value == 0 and jobs[1].done


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("pools", [1, 2])
def test_submission_from_several_threads(patient: Groups, threads: int, pools: int) -> None:
    """More workers than cores in some cases: the system puts them aside at any point."""
    if threads < pools:
        pytest.skip("every pool needs a thread")
    group = patient(threads, pools)
    cases = [CASE, OTHER]
    layers = [layer_of(case, group) for case in cases]
    batches = [
        [random_batch(tokens, case.H, case.E, 2, seed=tokens) for tokens in (1, 2, 5, 17, 40)]
        for case in cases
    ]
    expected = [
        [case.layer().forward(*batch) for batch in own]
        for case, own in zip(cases, batches, strict=True)
    ]
    failures: list[object] = []

    def run(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(25):
                which, index = rng.randrange(2), rng.randrange(5)
                job = layers[which].submit(*batches[which][index])
                if rng.random() < 0.3:
                    time.sleep(rng.random() * 1e-3)
                if not np.array_equal(job.wait(), expected[which][index]):
                    failures.append((seed, which, index))
        except Exception as error:  # a thread's exception would be lost otherwise
            failures.append(error)

    ended(*[started(run, seed) for seed in range(4)])
    assert not failures
    assert group.control.worker0.value == 0


def test_a_wait_inside_a_job_sleeps(patient: Groups) -> None:
    """A worker that the system has put aside holds its core's others up no longer than it must:
    they sleep until its task is done, and go on then."""
    group = patient(3)
    layer = layer_of(CASE, group)
    batch = random_batch(40, CASE.H, CASE.E, 2)
    expected = layer.forward(*batch)
    results: list[Array] = []
    with one_task_stands_still(layer) as (aside, go_on):
        waiting = started(lambda: results.append(layer.forward(*batch)))
        assert aside.wait(MINUTE)
        until(lambda: group.control.phase_done.sleepers.value == 2, "the others do not sleep")
        go_on.set()
        ended(waiting)
    assert np.array_equal(results[0], expected)


def test_a_late_thread_does_not_sleep_for_a_job_that_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is put aside when it has read the sequence number of its job, and another job takes the
    entry, with more tasks. Nobody would wake it: its job has ended all phases long ago."""
    interpret(monkeypatch, lambda: None)
    group, mine, index = Group.new(), 1, 1
    entry = worker.ring_entry(group, mine)
    phase = entry.phases[index]
    entry.sequence.value, phase.total.value, phase.done.value = mine, 8, 7
    asleep: list[bool] = []
    monkeypatch.setattr(worker, "sleep", lambda *_: asleep.append(True))
    worker.sleep_in_phase(group, entry, mine, index, 0)
    assert asleep, "it does not wait for a task that is left"
    asleep.clear()
    phase.done.value = 8
    load = worker.load_acquire

    def put_aside(word: Word) -> int:
        value = load(word)
        if word.address == entry.sequence.address:
            group.completed.value = RING
            entry.sequence.value, phase.total.value = mine + RING, 20
        return value

    monkeypatch.setattr(worker, "load_acquire", put_aside)
    worker.sleep_in_phase(group, entry, mine, index, 0)
    assert entry.sequence.value != mine and not asleep


def test_who_waits_for_the_ring_sleeps(patient: Groups) -> None:
    """Whoever fills its next slot may be put aside, too."""
    group = patient(2)
    layer = layer_of(CASE, group)
    batch = random_batch(3, CASE.H, CASE.E, 2)
    expected = layer.forward(*batch)
    group.control.lock.value = 1  # held
    results: list[Array] = []
    waiting = started(lambda: results.append(layer.forward(*batch)))
    _held_until_somebody_sleeps(group, group.control.lock)
    ended(waiting)
    assert np.array_equal(results[0], expected)


def test_who_waits_for_the_mask_of_a_layer_sleeps(patient: Groups) -> None:
    """Two streams launch runs of a layer, and the one that holds its mask is put aside."""
    group = patient(2)
    posted = Posted(layer_of(CASE, group), 3, seed=1)
    mask = GraphJob.at(posted.job.user_data).mask
    mask.lock.value = 1  # held
    posting = started(posted.post)
    _held_until_somebody_sleeps(group, mask.lock)
    ended(posting)
    ended(started(posted.wait))
    assert np.array_equal(posted.out, posted.expected)


def test_a_post_that_finds_the_ring_full_sleeps(patient: Groups) -> None:
    """Until the oldest job is complete. Workers may need the core meanwhile."""
    group = patient(2)
    layer = layer_of(CASE, group)
    jobs = [Posted(layer, 2, seed) for seed in range(RING)]
    with one_task_stands_still(layer) as (aside, go_on):
        for job in jobs[:-1]:
            job.post()
        assert aside.wait(MINUTE)
        last = started(jobs[-1].post)
        until(lambda: group.control.done.sleepers.value == 1, "it does not sleep")
        go_on.set()
        ended(last, *[started(job.wait) for job in jobs])
    for job in jobs:
        assert np.array_equal(job.out, job.expected)


def test_idle_workers_stay_away_from_python(patient: Groups) -> None:
    """A wake-up without work sends a worker back to sleep; only the end of its group ends it."""
    group = patient(2)
    returned: list[int] = []
    worker = started(lambda: returned.append(group._work(group.address, 0, 1)))
    for _ in range(20):
        until(lambda: group.control.work.sleepers.value == 2, "the workers do not sleep")
        group._wake_all(group.address)
    until(lambda: group.control.work.sleepers.value == 2, "the workers do not sleep")
    assert not returned and worker.is_alive()
    group.stop()
    ended(worker)
    assert returned == [0]


@pytest.mark.parametrize("spin_ns", [0, 1, 10**4])
def test_sleeping_at_every_opportunity(patient: Groups, spin_ns: int) -> None:
    """With next to no spinning every wait goes through its sleep, and every wake-up is needed."""
    group = patient(4, 2)
    group.control.spin_ns.value = group.control.wait_spin_ns = spin_ns
    layer = layer_of(CASE, group)
    batches = [random_batch(tokens, CASE.H, CASE.E, 2, seed=tokens) for tokens in (1, 7, 40)]
    expected = [CASE.layer().forward(*batch) for batch in batches]
    failures: list[object] = []

    def run(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(100):
            index = rng.randrange(3)
            if not np.array_equal(layer.forward(*batches[index]), expected[index]):
                failures.append((seed, index))

    ended(*[started(run, seed) for seed in range(2)])
    assert not failures
