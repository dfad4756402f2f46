"""Compiled loops of `bench/pool.py`: empty jobs, and the bare signals that bound them.

Compiled like the drivers of the package (`cpu_kernels/jit/translate.py`), so that no Python runs
between two samples.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.drivers.intrinsics import (
    driver,
    fetch_add,
    load32,
    load_acquire,
    nanoseconds,
    pause,
    store64,
    store_release,
    system_call,
)
from hybrid_moe.cpu_kernels.drivers.worker import help_until, try_launch

SETTLE_NS = 30_000  # from the counter of sleepers to being asleep: one system call

# words of a pair of threads that exchange bare signals, a cache line each
ASKED, ANSWERED, ASLEEP, SIGNAL_WORDS = 0, 8, 16, 24

_WAIT_PRIVATE, _WAKE_PRIVATE = 128, 129


@driver
def settle() -> None:
    until = nanoseconds() + SETTLE_NS
    while nanoseconds() < until:
        pause()


@driver
def fork_join(
    group: int, template: int, found: int, assist: int, asleep: int, samples: int, count: int
) -> int:
    """Launch a job and wait for it `count` times; nanoseconds of each go to `samples`.

    `assist`: the caller works as worker 0. `asleep`: so many workers must sleep before each.
    """
    for i in range(count):
        if asleep > 0:
            while load_acquire(group + 8 * f.G_SLEEPERS) < asleep:
                pause()
            settle()
        begin = nanoseconds()
        sequence = try_launch(group, template, found)
        while help_until(group, sequence, 0, 0, assist) == 0:
            pause()
        store64(samples + 8 * i, nanoseconds() - begin)
    return 0


@driver
def ask(words: int, futex: int, sleeps: int, samples: int, count: int) -> int:
    """Store a word, wait until the other thread has stored its own: the least a fork-join can
    take. With `sleeps` the other one is asleep on the word and has to be woken."""
    for i in range(count):
        if sleeps != 0:
            while load_acquire(words + 8 * ASLEEP) == 0:
                pause()
            settle()
        begin = nanoseconds()
        fetch_add(words + 8 * ASKED, 1)
        if sleeps != 0:
            system_call(futex, words + 8 * ASKED, _WAKE_PRIVATE, 1, 0)
        while load_acquire(words + 8 * ANSWERED) <= i:
            pause()
        store64(samples + 8 * i, nanoseconds() - begin)
    return 0


@driver
def answer(words: int, futex: int, sleeps: int, count: int) -> int:
    """The other thread of `ask`."""
    for i in range(count):
        if sleeps != 0:
            store_release(words + 8 * ASLEEP, 1)
            while load32(words + 8 * ASKED) == i:
                system_call(futex, words + 8 * ASKED, _WAIT_PRIVATE, i, 0)
            store_release(words + 8 * ASLEEP, 0)
        while load_acquire(words + 8 * ASKED) <= i:
            pause()
        store_release(words + 8 * ANSWERED, i + 1)
    return 0
