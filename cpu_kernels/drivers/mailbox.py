"""Mailboxes through which a GPU's stream posts and awaits jobs, and the thread that reads them.

A stream writes the address of a job slot into M_POSTED and waits until M_DONE is 1; `watch` is the
thread on the other side. It alone answers, in this order: clear M_POSTED, run the job, set M_DONE.
The stream clears M_DONE after its wait and before its next post. Whatever a graph has captured is a
constant, so a captured number could not tell one replay from the next; words that go back to zero
can: when a stream waits for a job, its own post comes after its own clearing of M_DONE, and nobody
but the watcher's answer to that post sets it again.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.drivers.host import (
    abandon,
    ended,
    fail,
    has_room,
    is_withdrawn,
    launch_slot,
    mercy,
    trouble,
    withdraw,
)
from hybrid_moe.cpu_kernels.drivers.intrinsics import (
    driver,
    load32,
    load_acquire,
    nanoseconds,
    pause,
    store_release,
    system_call,
)
from hybrid_moe.cpu_kernels.drivers.patience import is_late, start_clock
from hybrid_moe.cpu_kernels.drivers.route import get, put

_FUTEX_WAIT_PRIVATE = 128


@driver
def answer(entry: int) -> None:
    """Release the stream that waits at an entry's mailbox."""
    host = get(entry, f.E_HOST)
    put(entry, f.E_HOST, 0)
    store_release(get(entry, f.E_MAILBOX) + 8 * f.M_DONE, 1)
    ended(host)


@driver
def accept(entry: int, host: int) -> None:
    """Take a post out of the mailbox."""
    store_release(get(entry, f.E_MAILBOX) + 8 * f.M_POSTED, 0)
    put(entry, f.E_SEQUENCE, 0)
    put(entry, f.E_CODE, 0)
    start_clock(host)
    put(entry, f.E_HOST, host)


@driver
def give_up(entry: int, host: int) -> None:
    """Answer for a job that is withdrawn: once nobody writes to its output, or some time later."""
    late = nanoseconds() - get(host, f.H_SINCE) > mercy(host)
    if late or is_withdrawn(host, get(entry, f.E_SEQUENCE)):
        fail(host, get(entry, f.E_CODE))
        answer(entry)


@driver
def advance(entry: int, host: int) -> None:
    """Bring the job of an entry one step further; never waits."""
    if get(entry, f.E_CODE) != 0:
        give_up(entry, host)
        return
    group = get(host, f.H_GROUP)
    sequence = get(entry, f.E_SEQUENCE)
    if sequence != 0 and load_acquire(group + 8 * f.G_COMPLETED) >= sequence:
        answer(entry)
        return
    code = trouble(group)
    if code == 0 and sequence == 0 and has_room(group):
        launched = launch_slot(host)
        if launched == 0:
            answer(entry)
            return
        if launched != f.NO_ROOM:
            put(entry, f.E_SEQUENCE, launched)
            return
    if code == 0 and is_late(host):
        code = f.ERROR_TIMEOUT
    if code == 0:
        return
    if sequence == 0:
        fail(host, code)
        answer(entry)
        return
    withdraw(host, sequence)
    put(entry, f.E_CODE, code)
    put(host, f.H_SINCE, nanoseconds())
    give_up(entry, host)


@driver
def host_under_way(entry: int) -> int:
    """The job slot that the entry's mailbox is busy with, which may have just been posted; or 0."""
    mailbox = load_acquire(entry + 8 * f.E_MAILBOX)
    if mailbox == 0:
        return 0
    host = get(entry, f.E_HOST)
    if host == 0:
        host = load_acquire(mailbox + 8 * f.M_POSTED)
        if host != 0:
            accept(entry, host)
    return host


@driver
def watch_once(watcher: int) -> int:
    """Look at every mailbox once; how many of them are in use at the moment."""
    busy = 0
    for i in range(load_acquire(watcher + 8 * f.W_COUNT)):
        entry = watcher + 8 * (f.W_ENTRIES + i * f.ENTRY_SLOTS)
        host = host_under_way(entry)
        if host != 0:
            advance(entry, host)
            busy += 1
    return busy


@driver
def release_all(watcher: int) -> None:
    """Fail what is under way, so that no stream waits for a watcher that is gone."""
    for i in range(load_acquire(watcher + 8 * f.W_COUNT)):
        entry = watcher + 8 * (f.W_ENTRIES + i * f.ENTRY_SLOTS)
        host = host_under_way(entry)
        if host == 0:
            continue
        if get(entry, f.E_SEQUENCE) == 0:
            fail(host, f.ERROR_STOPPED)
        else:
            abandon(host, get(entry, f.E_SEQUENCE), f.ERROR_STOPPED, 0)
        answer(entry)


@driver
def watch(watcher: int) -> int:
    """The watcher's loop: spins while there is work and W_HOT_NS longer, then naps between looks.
    Returns when W_STOP is set."""
    last = nanoseconds()
    while load_acquire(watcher + 8 * f.W_STOP) == 0:
        if watch_once(watcher) > 0:
            last = nanoseconds()
        elif nanoseconds() - last > get(watcher, f.W_HOT_NS):
            word = watcher + 8 * f.W_WORD
            seen = load32(word)
            system_call(
                get(watcher, f.W_FUTEX), word, _FUTEX_WAIT_PRIVATE, seen, watcher + 8 * f.W_NAP
            )
        pause()
    release_all(watcher)
    return 0
