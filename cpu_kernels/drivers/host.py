"""Jobs that a GPU's stream posts and awaits, by host functions or through mailboxes.

Two ways lead from a stream to the workers:

* *Host functions.* The driver's callback thread calls `post_host`, which routes and publishes,
  and later `wait_host`, which returns when the job is complete.
* *Mailboxes.* A stream writes the address of a job slot into M_POSTED and waits until M_DONE is 1;
  `watch` is the thread on the other side. It alone answers, in this order: clear M_POSTED, run the
  job, set M_DONE. The stream clears M_DONE after its wait and before its next post. Whatever a
  graph has captured is a constant, so a captured number could not tell one replay from the next;
  words that go back to zero can: when a stream waits for a job, its own post comes after its own
  clearing of M_DONE, and nobody but the watcher's answer to that post sets it again.

Nobody waits for ever. When the pool has completed nothing for H_TIMEOUT_NS, the waiter abandons the
job: its output becomes NaN, and so does at once that of later jobs until the pool has recovered.
Every failed run adds to H_ERRORS and to the process's word H_FAULTS.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.drivers.memory import (
    compare_swap,
    driver,
    fetch_add,
    load8,
    load32,
    load_acquire,
    nanoseconds,
    pause,
    store8,
    store32,
    store_release,
    system_call,
)
from hybrid_moe.cpu_kernels.drivers.route import get, put
from hybrid_moe.cpu_kernels.drivers.worker import help_until, launch, ring_slot

_FUTEX_WAIT_PRIVATE = 128
_NAN_PAIR = 0x7FC07FC0  # two bf16


@driver
def fill_nan(job: int) -> None:
    """Make the output of a job that cannot run NaN, so that nobody takes it for a result."""
    pairs = get(job, f.J_TOKENS) * get(get(job, f.J_LAYER), f.L_HIDDEN) // 2
    for i in range(pairs):
        store32(get(job, f.J_OUT) + 4 * i, _NAN_PAIR)


@driver
def fault(host: int) -> None:
    """Tell the process that a run went wrong."""
    fetch_add(get(host, f.H_FAULTS), 1)


@driver
def fail(host: int, code: int) -> None:
    """End a run that has not been published."""
    fill_nan(get(host, f.H_TEMPLATE))
    put(host, f.H_SEQUENCE, 0)
    put(host, f.H_ERROR, code)
    put(host, f.H_ERRORS, get(host, f.H_ERRORS) + 1)
    fault(host)


@driver
def abandon(host: int, sequence: int, code: int) -> None:
    """End the wait for a published job. It may still run: its output goes elsewhere from now on,
    and its group takes no more slots until it is over."""
    group = get(host, f.H_GROUP)
    if get(group, f.G_ABANDONED) < sequence:
        store_release(group + 8 * f.G_ABANDONED, sequence)
    job = ring_slot(group, sequence)
    if get(job, f.J_SEQUENCE) == sequence:
        put(job, f.J_OUT, get(host, f.H_DUMP))
    put(host, f.H_ABANDONED, sequence)
    fail(host, code)


@driver
def trouble(group: int) -> int:
    """Why the group takes no more slots now, or 0."""
    if load_acquire(group + 8 * f.G_STOP) != 0:
        return f.ERROR_STOPPED
    if load_acquire(group + 8 * f.G_COMPLETED) < load_acquire(group + 8 * f.G_ABANDONED):
        return f.ERROR_STUCK
    return 0


@driver
def has_room(group: int) -> bool:
    """Whether the ring takes a job at once."""
    submitted = load_acquire(group + 8 * f.G_SUBMITTED)
    return load_acquire(group + 8 * f.G_COMPLETED) + f.RING > submitted + 1


@driver
def snapshot_mask(mask: int) -> int:
    """Bring the layer's copy of the mask up to date, lock it, and return its epoch."""
    while not compare_swap(mask + 8 * f.K_LOCK, 0, 1):
        pause()
    live = get(mask, f.K_LIVE)
    copy = mask + 8 * f.K_SLOTS
    changed = 0
    for e in range(get(mask, f.K_EXPERTS)):
        now = load8(live + e)
        if now != load8(copy + e):
            store8(copy + e, now)
            changed = 1
    put(mask, f.K_EPOCH, get(mask, f.K_EPOCH) + changed)
    return get(mask, f.K_EPOCH)


@driver
def unlock_mask(mask: int) -> None:
    store_release(mask + 8 * f.K_LOCK, 0)


@driver
def launch_slot(host: int) -> int:
    """Route and publish the template job of a slot: its number, or 0 if it failed."""
    template = get(host, f.H_TEMPLATE)
    mask = get(host, f.H_MASK)
    put(host, f.H_EPOCH, snapshot_mask(mask))
    sequence = launch(get(host, f.H_GROUP), template, host + 8 * f.H_FOUND)
    unlock_mask(mask)
    if get(host, f.H_IGNORED_IDS) != f.IDS_PASS:
        put(host, f.H_IGNORED, get(host, f.H_IGNORED) + get(host, f.H_FOUND))
        if get(host, f.H_IGNORED_IDS) == f.IDS_FAULT and get(host, f.H_FOUND) > 0:
            fault(host)
    if sequence <= 0:
        fill_nan(template)
        put(host, f.H_MISSING_EXPERT, -sequence)
        put(host, f.H_MISSING, get(host, f.H_MISSING) + 1)
        fault(host)
        sequence = 0
    put(host, f.H_SEQUENCE, sequence)
    return sequence


@driver
def post_host(host: int) -> int:
    """Body of a CUDA host function: launch a slot. Waits only while the ring is full."""
    group = get(host, f.H_GROUP)
    seen = load_acquire(group + 8 * f.G_COMPLETED)
    deadline = nanoseconds() + get(host, f.H_TIMEOUT_NS)
    while True:
        code = trouble(group)
        if code == 0 and has_room(group):
            launch_slot(host)
            return 0
        completed = load_acquire(group + 8 * f.G_COMPLETED)
        if completed != seen:
            seen = completed
            deadline = nanoseconds() + get(host, f.H_TIMEOUT_NS)
        elif code == 0 and nanoseconds() > deadline:
            code = f.ERROR_TIMEOUT
        if code != 0:
            fail(host, code)
            return 0
        pause()


@driver
def wait_host(host: int) -> int:
    """Body of a CUDA host function: return when the latest launch is complete or given up."""
    group = get(host, f.H_GROUP)
    sequence = get(host, f.H_SEQUENCE)
    seen = load_acquire(group + 8 * f.G_COMPLETED)
    deadline = nanoseconds() + get(host, f.H_TIMEOUT_NS)
    while help_until(group, sequence, 0, 0, 0) == 0:
        code = trouble(group)
        completed = load_acquire(group + 8 * f.G_COMPLETED)
        if completed >= sequence:
            return 0
        if completed != seen:
            seen = completed
            deadline = nanoseconds() + get(host, f.H_TIMEOUT_NS)
        elif code == 0 and nanoseconds() > deadline:
            code = f.ERROR_TIMEOUT
        if code != 0:
            abandon(host, sequence, code)
            return 0
    return 0


# Mailboxes


@driver
def answer(entry: int) -> None:
    """Release the stream that waits at an entry's mailbox."""
    put(entry, f.E_HOST, 0)
    store_release(get(entry, f.E_MAILBOX) + 8 * f.M_DONE, 1)


@driver
def accept(entry: int, host: int) -> None:
    """Take a post out of the mailbox."""
    group = get(host, f.H_GROUP)
    store_release(get(entry, f.E_MAILBOX) + 8 * f.M_POSTED, 0)
    put(entry, f.E_SEQUENCE, 0)
    put(entry, f.E_SEEN, load_acquire(group + 8 * f.G_COMPLETED))
    put(entry, f.E_DEADLINE, nanoseconds() + get(host, f.H_TIMEOUT_NS))
    put(entry, f.E_HOST, host)


@driver
def is_late(entry: int, host: int, completed: int) -> bool:
    """Whether the pool has made no progress for the slot's timeout."""
    if completed != get(entry, f.E_SEEN):
        put(entry, f.E_SEEN, completed)
        put(entry, f.E_DEADLINE, nanoseconds() + get(host, f.H_TIMEOUT_NS))
        return False
    return nanoseconds() > get(entry, f.E_DEADLINE)


@driver
def advance(entry: int, host: int) -> None:
    """Bring the job of an entry one step further; never waits."""
    group = get(host, f.H_GROUP)
    sequence = get(entry, f.E_SEQUENCE)
    completed = load_acquire(group + 8 * f.G_COMPLETED)
    if sequence != 0 and completed >= sequence:
        answer(entry)
        return
    code = trouble(group)
    if code == 0 and sequence == 0 and has_room(group):
        sequence = launch_slot(host)
        put(entry, f.E_SEQUENCE, sequence)
        if sequence == 0:
            answer(entry)
        return
    if code == 0 and is_late(entry, host, completed):
        code = f.ERROR_TIMEOUT
    if code != 0:
        if sequence == 0:
            fail(host, code)
        else:
            abandon(host, sequence, code)
        answer(entry)


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
            abandon(host, get(entry, f.E_SEQUENCE), f.ERROR_STOPPED)
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
