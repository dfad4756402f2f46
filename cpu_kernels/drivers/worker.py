"""Threads of a pool group: taking tasks, waiting, publishing jobs.

Jobs run one after another in the order of submission. A phase is over when its tasks are done, not
when threads have met: a thread that the system has put aside delays nobody who has work. A thread
that wakes late finds other sequence numbers in the claim words and leaves without touching what
the job owned.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.drivers.memory import (
    call0,
    compare_swap,
    driver,
    fence,
    fetch_add,
    load32,
    load_acquire,
    nanoseconds,
    pause,
    restore_float_environment,
    set_float_environment,
    store64,
    store_release,
    system_call,
)
from hybrid_moe.cpu_kernels.drivers.patience import task_nanoseconds
from hybrid_moe.cpu_kernels.drivers.phases import run_task
from hybrid_moe.cpu_kernels.drivers.route import get, prepare, put

_FUTEX_WAIT_PRIVATE = 128
_FUTEX_WAKE_PRIVATE = 129
_ALL = 2147483647
_NO_TASK = (1 << f.CLAIM_BITS) - 1
_HELP_SPIN = 4096  # pauses of a waiting submitter before it sleeps


@driver
def wake(group: int, word: int) -> None:
    """Bump a futex word and wake all who sleep on it."""
    address = group + 8 * word
    fetch_add(address, 1)
    system_call(get(group, f.G_FUTEX), address, _FUTEX_WAKE_PRIVATE, _ALL, 0)


@driver
def wake_all(group: int) -> int:
    """Wake workers and waiting submitters, whatever they wait for."""
    wake(group, f.G_WAKE)
    wake(group, f.G_DONE_WAKE)
    return 0


@driver
def sleep_on(group: int, word: int, seen: int) -> None:
    """Sleep until the word differs from `seen` or the group's timeout has passed."""
    system_call(
        get(group, f.G_FUTEX),
        group + 8 * word,
        _FUTEX_WAIT_PRIVATE,
        seen,
        group + 8 * f.G_TIMESPEC,
    )


@driver
def ring_slot(group: int, sequence: int) -> int:
    return group + 8 * (f.G_RING + (sequence % f.RING) * f.JOB_SLOTS)


@driver
def claim(job: int, sequence: int, phase: int, pool: int) -> int:
    """The next task of (phase, pool), or -1 when there is none or the job is another by now."""
    word = job + 8 * (f.J_CLAIM + (phase * f.MAX_POOLS + pool) * f.LINE_SLOTS)
    while True:
        value = load_acquire(word)
        if (value >> f.CLAIM_BITS) != sequence:
            return -1
        task = value & _NO_TASK
        if task >= get(job, f.J_TASKS + phase * f.MAX_POOLS + pool):
            return -1
        if compare_swap(word, value, value + 1):
            return task


@driver
def complete(group: int, sequence: int) -> None:
    store_release(group + 8 * f.G_COMPLETED, sequence)
    fence()
    if load_acquire(group + 8 * f.G_WAITERS) > 0:
        wake(group, f.G_DONE_WAKE)
    if load_acquire(group + 8 * f.G_SLEEPERS) > 0 and (
        load_acquire(group + 8 * f.G_SUBMITTED) > sequence
    ):
        wake(group, f.G_WAKE)


@driver
def enter(layer: int) -> int:
    """Make the thread ready for the layer's kernels. Returns what undoes it, or 0."""
    if get(layer, f.L_ENTER) != 0:
        call0(get(layer, f.L_ENTER))
    return get(layer, f.L_LEAVE)


@driver
def take_tasks(
    group: int,
    job: int,
    sequence: int,
    phase: int,
    pool: int,
    worker: int,
    deadline: int,
    leave: int,
) -> int:
    """Run tasks of a phase until there are none to claim; whoever ends the last phase's last task
    completes the job. `deadline` (0: none) bounds how long the caller stays away from Python.

    Returns what the thread must call when it leaves the job (0: nothing). It enters at its first
    task, since only a claimed task keeps the job's layer where it is; `leave` is not 0 if it has.
    """
    done = job + 8 * (f.J_DONE + phase * f.LINE_SLOTS)
    while True:
        if deadline != 0 and nanoseconds() > deadline:
            return leave
        if load_acquire(group + 8 * f.G_STOP) != 0:
            return leave
        task = claim(job, sequence, phase, pool)
        if task < 0:
            return leave
        if leave == 0:
            leave = enter(get(job, f.J_LAYER))
        total = get(job, f.J_TOTAL + phase)
        run_task(job, phase, pool, task, worker)
        finished = fetch_add(done, 1) + 1
        if phase == f.PHASES - 1 and finished == total:
            complete(group, sequence)


@driver
def phase_is_done(job: int, sequence: int, phase: int) -> bool:
    """A finished phase of this job; also true when the ring slot holds a later job."""
    done = load_acquire(job + 8 * (f.J_DONE + phase * f.LINE_SLOTS))
    if get(job, f.J_SEQUENCE) != sequence:
        return True
    return done >= get(job, f.J_TOTAL + phase)


@driver
def wait_for_phase(group: int, job: int, sequence: int, phase: int, deadline: int) -> bool:
    """Whether the phase is over, so that the next may begin: not after the deadline or a stop, and
    not if the whole job is."""
    while not phase_is_done(job, sequence, phase):
        if load_acquire(group + 8 * f.G_COMPLETED) >= sequence:
            return False
        if deadline != 0 and nanoseconds() > deadline:
            return False
        if load_acquire(group + 8 * f.G_STOP) != 0:
            return False
        pause()
    return True


@driver
def participate(group: int, sequence: int, pool: int, worker: int, deadline: int) -> None:
    """Work on one job until it is complete (or the deadline)."""
    job = ring_slot(group, sequence)
    leave = 0
    for phase in range(f.PHASES):
        leave = take_tasks(group, job, sequence, phase, pool, worker, deadline, leave)
        if not wait_for_phase(group, job, sequence, phase, deadline):
            break
    if leave != 0:
        call0(leave)


@driver
def work(group: int, pool: int, worker: int) -> int:
    """A worker's loop. Returns 1 when the group stops, 0 after an idle sleep (call again)."""
    set_float_environment()
    spins = 0
    while True:
        if load_acquire(group + 8 * f.G_STOP) != 0:
            return 1
        completed = load_acquire(group + 8 * f.G_COMPLETED)
        if load_acquire(group + 8 * f.G_SUBMITTED) > completed:
            participate(group, completed + 1, pool, worker, 0)
            spins = 0
            continue
        spins += 1
        if spins < get(group, f.G_SPIN):
            pause()
            continue
        seen = load32(group + 8 * f.G_WAKE)
        fetch_add(group + 8 * f.G_SLEEPERS, 1)
        if (
            load_acquire(group + 8 * f.G_SUBMITTED) <= load_acquire(group + 8 * f.G_COMPLETED)
            and load_acquire(group + 8 * f.G_STOP) == 0
        ):
            sleep_on(group, f.G_WAKE, seen)
        fetch_add(group + 8 * f.G_SLEEPERS, -1)
        if load_acquire(group + 8 * f.G_SUBMITTED) <= load_acquire(group + 8 * f.G_COMPLETED):
            return 0
        spins = 0


@driver
def wait_for(group: int, sequence: int, pool: int, worker: int, assist: int) -> int:
    deadline = nanoseconds() + get(group, f.G_TIMEOUT_NS)
    spins = 0
    while True:
        completed = load_acquire(group + 8 * f.G_COMPLETED)
        if completed >= sequence:
            return 1
        if nanoseconds() > deadline or load_acquire(group + 8 * f.G_STOP) != 0:
            return 0
        if assist != 0:
            participate(group, completed + 1, pool, worker, deadline)
            continue
        spins += 1
        if spins < _HELP_SPIN:
            pause()
            continue
        seen = load32(group + 8 * f.G_DONE_WAKE)
        fetch_add(group + 8 * f.G_WAITERS, 1)
        if load_acquire(group + 8 * f.G_COMPLETED) < sequence:
            sleep_on(group, f.G_DONE_WAKE, seen)
        fetch_add(group + 8 * f.G_WAITERS, -1)


@driver
def help_until(group: int, sequence: int, pool: int, worker: int, assist: int) -> int:
    """Wait for a job, as worker `worker` if `assist`. Returns 1 when it is complete, 0 after the
    group's timeout, so that Python can see signals."""
    before = set_float_environment()
    result = wait_for(group, sequence, pool, worker, assist)
    restore_float_environment(before)
    return result


@driver
def open_slot(job: int, sequence: int) -> int:
    """Take a ring slot for a new job: from here on no late worker can claim a task in it."""
    for phase in range(f.PHASES):
        for pool in range(f.MAX_POOLS):
            word = job + 8 * (f.J_CLAIM + (phase * f.MAX_POOLS + pool) * f.LINE_SLOTS)
            store_release(word, (sequence << f.CLAIM_BITS) | _NO_TASK)
    fence()
    put(job, f.J_SEQUENCE, sequence)
    return 0


@driver
def publish(group: int, job: int) -> int:
    """Hand a prepared job of the ring to the workers. The caller holds the ring's lock."""
    sequence = get(job, f.J_SEQUENCE)
    for phase in range(f.PHASES):
        store64(job + 8 * (f.J_DONE + phase * f.LINE_SLOTS), 0)
        for pool in range(get(job, f.J_POOLS)):
            word = job + 8 * (f.J_CLAIM + (phase * f.MAX_POOLS + pool) * f.LINE_SLOTS)
            store_release(word, sequence << f.CLAIM_BITS)
    store_release(group + 8 * f.G_SUBMITTED, sequence)
    fence()
    if load_acquire(group + 8 * f.G_SLEEPERS) > 0:
        wake(group, f.G_WAKE)
    return sequence


@driver
def lock_ring(group: int) -> int:
    """Take the right to fill the next ring slot. Held for microseconds, so waiting is spinning."""
    while not compare_swap(group + 8 * f.G_LOCK, 0, 1):
        pause()
    return 0


@driver
def unlock_ring(group: int) -> int:
    store_release(group + 8 * f.G_LOCK, 0)
    return 0


@driver
def try_launch(group: int, template: int, found: int) -> int:
    """`launch`, or NO_ROOM at once if the ring is full: it never waits for the pool."""
    lock_ring(group)
    sequence = load_acquire(group + 8 * f.G_SUBMITTED) + 1
    if load_acquire(group + 8 * f.G_COMPLETED) + f.RING <= sequence:
        unlock_ring(group)
        return f.NO_ROOM
    job = ring_slot(group, sequence)
    open_slot(job, sequence)
    for slot in range(f.J_SEQUENCE + 1, f.J_TOTAL):
        put(job, slot, get(template, slot))
    missing = prepare(job)
    store64(found, get(job, f.J_IGNORED))
    if missing == 0:
        put(job, f.J_TASK_NS, task_nanoseconds(job))
        publish(group, job)
    unlock_ring(group)
    return sequence if missing == 0 else 1 - missing


@driver
def launch(group: int, template: int, found: int) -> int:
    """Copy a job into the ring, route and publish it; waits, without the lock, for room.

    Returns its sequence number, or -expert if a token is routed to an expert that is neither loaded
    nor skipped (0 is an expert too; sequence numbers start at 1); nothing runs then. The number of
    ids out of range goes to `found`.
    """
    while True:
        sequence = try_launch(group, template, found)
        if sequence != f.NO_ROOM:
            return sequence
        pause()
