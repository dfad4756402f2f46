"""Jobs that a GPU's stream posts and awaits.

Two ways lead from a stream to the workers:

* *Host functions.* The driver's callback thread calls `post_host`, which routes and publishes,
  and later `wait_host`, which returns when the job is complete.
* *Mailboxes.* The stream writes and reads words, and a thread answers: `drivers.mailbox`.

Nobody waits for ever. When the pool has shown no sign of life for as long as `patience` says, the
waiter abandons the job: its output becomes NaN, and so does at once that of later jobs until the
pool has recovered. Every failed run adds to the layer's counters and to the process's word of
faults.

A slot's memory may go when H_ENDED has come to the number of visits that streams were asked for (a
post that is answered, a wait that returns) and no job of it runs. H_ENDED is therefore the last
word of a slot that a visit touches.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.drivers.intrinsics import (
    compare_swap,
    driver,
    fence,
    fetch_add,
    load8,
    load_acquire,
    nanoseconds,
    pause,
    store8,
    store32,
    store_release,
)
from hybrid_moe.cpu_kernels.drivers.patience import is_late, patience, start_clock
from hybrid_moe.cpu_kernels.drivers.route import get, put
from hybrid_moe.cpu_kernels.drivers.worker import (
    help_until,
    lock,
    ring_slot,
    try_launch,
    unlock,
)

_NAN_PAIR = 0x7FC07FC0  # two bf16


@driver
def fill_nan(host: int) -> None:
    """Make the output of a run that failed NaN, so that nobody takes it for a result."""
    template = get(host, f.H_TEMPLATE)
    pairs = get(template, f.J_TOKENS) * get(host, f.H_HIDDEN) // 2
    for i in range(pairs):
        store32(get(template, f.J_OUT) + 4 * i, _NAN_PAIR)


@driver
def count(host: int, counter: int, number: int) -> None:
    """Add to one of the layer's counters."""
    fetch_add(get(host, f.H_COUNTERS) + 8 * counter, number)


@driver
def note(host: int, counter: int, value: int) -> None:
    """Put what belongs to the latest event beside the layer's counters."""
    store_release(get(host, f.H_COUNTERS) + 8 * counter, value)


@driver
def fault(host: int) -> None:
    """Tell the process that a run went wrong."""
    fetch_add(get(host, f.H_FAULTS), 1)


@driver
def ended(host: int) -> None:
    """A visit is over: from here on it touches nothing of the slot."""
    fetch_add(host + 8 * f.H_ENDED, 1)


@driver
def fail(host: int, code: int) -> None:
    """End a run that is not, or no more, waited for."""
    fill_nan(host)
    put(host, f.H_SEQUENCE, 0)
    note(host, f.C_ERROR, code)
    note(host, f.C_WAITED_NS, patience(host))
    count(host, f.C_ERRORS, 1)
    fault(host)


@driver
def raise_word(word: int, value: int) -> None:
    """Make a word at least `value`; several threads may."""
    now = load_acquire(word)
    while now < value and not compare_swap(word, now, value):
        now = load_acquire(word)


@driver
def withdraw(host: int, sequence: int) -> None:
    """Give up a published job. It may still run: its output goes elsewhere from now on, and its
    group takes no more slots until it is over."""
    group = get(host, f.H_GROUP)
    raise_word(group + 8 * f.G_ABANDONED, sequence)
    put(host, f.H_ABANDONED, sequence)
    job = ring_slot(group, sequence)
    if get(job, f.J_SEQUENCE) == sequence:
        store_release(job + 8 * f.J_OUT, get(host, f.H_DUMP))
    fence()  # against `claim`: a worker whose task is not seen below sees the new J_OUT


@driver
def is_withdrawn(host: int, sequence: int) -> bool:
    """Whether no worker can write to the output any more: the job is over, or none is inside a task
    that it may have begun before it could see where the output goes now."""
    group = get(host, f.H_GROUP)
    job = ring_slot(group, sequence)
    last = get(job, f.J_LAST_PHASE)
    done = load_acquire(job + 8 * (f.J_DONE + last * f.LINE_SLOTS))
    taken = 0
    for pool in range(get(job, f.J_POOLS)):
        at = last * f.MAX_POOLS + pool
        claims = load_acquire(job + 8 * (f.J_CLAIM + at * f.LINE_SLOTS)) & ((1 << f.CLAIM_BITS) - 1)
        taken += min(claims, get(job, f.J_TASKS + at))
    return load_acquire(group + 8 * f.G_COMPLETED) >= sequence or done >= taken


@driver
def mercy(host: int) -> int:
    """Nanoseconds that workers inside a task get to leave the output of a job that is given up. One
    that stands still for longer, and comes back just before the output is read, spoils the NaN of
    its strips; the error is raised all the same."""
    return get(host, f.H_TIMEOUT_NS) // 8


@driver
def abandon(host: int, sequence: int, code: int, grace: int) -> None:
    """End the wait for a published job; waits up to `grace` nanoseconds for `is_withdrawn`."""
    withdraw(host, sequence)
    until = nanoseconds() + grace
    while not is_withdrawn(host, sequence) and nanoseconds() < until:
        help_until(get(host, f.H_GROUP), sequence, 0, 0, 0)  # sleeps, unless the group has stopped
        pause()
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
    """Whether the ring would take a job now: a cheap look, before `try_launch` which knows."""
    submitted = load_acquire(group + 8 * f.G_SUBMITTED)
    return load_acquire(group + 8 * f.G_COMPLETED) + f.RING > submitted + 1


@driver
def snapshot_mask(mask: int) -> int:
    """Bring the layer's copy of the mask up to date; return its epoch. The caller holds K_LOCK."""
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
def launch_slot(host: int) -> int:
    """Route and publish the template job of a slot: its number, 0 if it failed, or NO_ROOM."""
    template = get(host, f.H_TEMPLATE)
    group = get(host, f.H_GROUP)
    mask = get(host, f.H_MASK)
    lock(group, mask + 8 * f.K_LOCK)
    if get(host, f.H_CLOSED) != 0:
        unlock(group, mask + 8 * f.K_LOCK)
        fill_nan(host)
        put(host, f.H_SEQUENCE, 0)
        fetch_add(get(host, f.H_FAULTS) + 8, 1)
        fault(host)
        return 0
    epoch = snapshot_mask(mask)
    sequence = try_launch(group, template, host + 8 * f.H_FOUND)
    if sequence > 0:
        put(host, f.H_SEQUENCE, sequence)
    unlock(group, mask + 8 * f.K_LOCK)
    if sequence == f.NO_ROOM:
        return sequence
    put(host, f.H_EPOCH, epoch)
    if get(host, f.H_IGNORED_IDS) != f.IDS_PASS and get(host, f.H_FOUND) > 0:
        count(host, f.C_IGNORED, get(host, f.H_FOUND))
        if get(host, f.H_IGNORED_IDS) == f.IDS_FAULT:
            fault(host)
    if sequence <= 0:
        fill_nan(host)
        put(host, f.H_SEQUENCE, 0)
        note(host, f.C_MISSING_EXPERT, -sequence)
        count(host, f.C_MISSING, 1)
        fault(host)
        sequence = 0
    return sequence


@driver
def close_host(host: int) -> int:
    """Let no run of a slot begin any more: later posts of it give NaN, and read nothing of the
    layer. What has been launched runs on."""
    group = get(host, f.H_GROUP)
    word = get(host, f.H_MASK) + 8 * f.K_LOCK
    lock(group, word)
    put(host, f.H_CLOSED, 1)
    put(get(host, f.H_TEMPLATE), f.J_LAYER, 0)
    unlock(group, word)
    return 0


@driver
def post(host: int) -> None:
    """Launch a slot. Waits only while the ring is full, for its oldest job."""
    group = get(host, f.H_GROUP)
    start_clock(host)
    while True:
        oldest = load_acquire(group + 8 * f.G_COMPLETED) + 1  # a full ring has it, or had
        code = trouble(group)
        if code == 0 and has_room(group) and launch_slot(host) != f.NO_ROOM:
            return
        if code == 0 and is_late(host):
            code = f.ERROR_TIMEOUT
        if code != 0:
            fail(host, code)
            return
        help_until(group, oldest, 0, 0, 0)


@driver
def post_host(host: int) -> int:
    """Body of a CUDA host function: launch a slot."""
    post(host)
    ended(host)
    return 0


@driver
def wait(host: int) -> None:
    """Return when the latest launch is complete or given up."""
    group = get(host, f.H_GROUP)
    sequence = get(host, f.H_SEQUENCE)
    start_clock(host)
    while help_until(group, sequence, 0, 0, 0) == 0:
        code = trouble(group)
        late = is_late(host)
        if load_acquire(group + 8 * f.G_COMPLETED) >= sequence:
            return
        if code == 0 and late:
            code = f.ERROR_TIMEOUT
        if code != 0:
            abandon(host, sequence, code, mercy(host))
            return


@driver
def wait_host(host: int) -> int:
    """Body of a CUDA host function: wait for the latest launch."""
    wait(host)
    ended(host)
    return 0
