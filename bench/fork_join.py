"""Compiled loops of `bench/pool.py`: empty jobs, and the bare signals that bound them.

Compiled like the drivers of the package (`cpu_kernels/jit/translate.py`), so that no Python runs
between two samples.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import (
    driver,
    fetch_add,
    load_acquire,
    nanoseconds,
    pause,
    store_release,
    system_call,
)
from hybrid_moe.cpu_kernels.drivers.records import Group, Job
from hybrid_moe.cpu_kernels.drivers.worker import (
    FUTEX_WAIT_PRIVATE,
    FUTEX_WAKE_PRIVATE,
    help_until,
    try_launch,
)
from hybrid_moe.cpu_kernels.jit.record import Record, i64, shared_line

SETTLE_NS = 30_000  # from the counter of sleepers to being asleep: one system call


class Signal(Record):
    """Words of a pair of threads that exchange bare signals."""

    asked = shared_line
    answered = shared_line
    asleep = shared_line


@driver
def settle() -> None:
    until = nanoseconds() + SETTLE_NS
    while nanoseconds() < until:
        pause()


@driver
def fork_join(group: Group, job: Job, assist: int, asleep: int, samples: int, count: int) -> None:
    """Launch a job and wait for it `count` times; nanoseconds of each go to `samples`.

    `assist`: the caller works as worker 0. `asleep`: so many workers must sleep before each.
    """
    for i in range(count):
        if asleep > 0:
            while load_acquire(group.work.sleepers) < asleep:
                pause()
            settle()
        begin = nanoseconds()
        sequence = try_launch(group, job)
        while not help_until(group, sequence, 0, 0, assist):
            pause()
        i64.at(samples)[i] = nanoseconds() - begin


@driver
def ask(signal: Signal, futex: int, sleeps: int, samples: int, count: int) -> None:
    """Store a word, wait until the other thread has stored its own: the least a fork-join can
    take. With `sleeps` the other one is asleep on the word and has to be woken."""
    for i in range(count):
        if sleeps != 0:
            while load_acquire(signal.asleep) == 0:
                pause()
            settle()
        begin = nanoseconds()
        fetch_add(signal.asked, 1)
        if sleeps != 0:
            system_call(futex, signal.asked.address, FUTEX_WAKE_PRIVATE, 1, 0)
        while load_acquire(signal.answered) <= i:
            pause()
        i64.at(samples)[i] = nanoseconds() - begin


@driver
def answer(signal: Signal, futex: int, sleeps: int, count: int) -> None:
    """The other thread of `ask`."""
    for i in range(count):
        if sleeps != 0:
            store_release(signal.asleep, 1)
            while load_acquire(signal.asked) == i:
                system_call(futex, signal.asked.address, FUTEX_WAIT_PRIVATE, i, 0)
            store_release(signal.asleep, 0)
        while load_acquire(signal.asked) <= i:
            pause()
        store_release(signal.answered, i + 1)


@driver
def count_up(signal: Signal, adds: int, count: int) -> None:
    """So many additions to a word that others may read, `count` times."""
    for _ in range(adds * count):
        fetch_add(signal.asked, 1)
