"""Threads of a pool group: taking tasks, waiting, publishing jobs.

Jobs run one after another in the order of submission. A phase is over when its tasks are done, not
when threads have met: a thread that the system has put aside delays nobody who has work. A thread
that wakes late finds other sequence numbers in the claim words and leaves without touching what
the job owned.

Every wait spins for a while and then sleeps on a futex. No wake-up is lost, because both sides of
each pair first write and then read what the other writes:

    who sleeps   counts itself, fence, looks once more at what it waits for, sleeps
    who wakes    changes what others wait for, fence, looks whether anybody has counted itself

So at least one of the two sees the other. The word to sleep on is read before the count, and is
bumped before the wake-up: who looks in between finds it changed and does not fall asleep.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.drivers.intrinsics import (
    call0,
    compare_swap,
    driver,
    fence,
    fetch_add,
    load_acquire,
    load_ordered,
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
_PAUSES_PER_LOOK = 32  # between two looks at the clock: a pause takes 1 to 140 cycles
_TIRED = -1


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
    wake(group, f.G_PHASE_WAKE)
    wake(group, f.G_DONE_WAKE)
    return 0


@driver
def sleep_on(group: int, word: int, seen: int, timeout: int) -> None:
    """Sleep until the word differs from `seen`, or `timeout`, the address of a timespec (0: none),
    has passed. A signal ends it too."""
    system_call(get(group, f.G_FUTEX), group + 8 * word, _FUTEX_WAIT_PRIVATE, seen, timeout)


@driver
def spin(spins: int, until: int, limit: int) -> int:
    """Pause for the `spins`-th time of a wait, counted from 1. Returns what the next pause takes as
    `until` (0 at first), or _TIRED when the wait has lasted for `limit` nanoseconds."""
    pause()
    if spins % _PAUSES_PER_LOOK != 0:
        return until
    now = nanoseconds()
    if until == 0:
        return now + limit
    return until if now < until else _TIRED


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
    fence()  # with those of `wait_for` (G_WAITERS) and `work` (G_SLEEPERS)
    if load_acquire(group + 8 * f.G_WAITERS) > 0:
        wake(group, f.G_DONE_WAKE)
    if load_acquire(group + 8 * f.G_SLEEPERS) > 0 and (
        load_acquire(group + 8 * f.G_SUBMITTED) > sequence
    ):
        wake(group, f.G_WAKE)


@driver
def end_phase(group: int, job: int, sequence: int, phase: int) -> None:
    """What whoever has counted the last task of a phase does next."""
    if phase == get(job, f.J_LAST_PHASE):
        complete(group, sequence)
    # ordered behind the counting of the task; with the fence of `sleep_in_phase`
    if load_ordered(group + 8 * f.G_PHASE_SLEEPERS) > 0:
        wake(group, f.G_PHASE_WAKE)


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
    """Run tasks of a phase until there are none to claim; whoever ends the last one wakes those who
    wait for that, and completes the job if it is the last phase. `deadline` (0: none) bounds how
    long the caller stays away from Python.

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
        if finished == total:
            end_phase(group, job, sequence, phase)


@driver
def phase_is_done(job: int, sequence: int, phase: int) -> bool:
    """A finished phase of this job; also true when the ring slot holds a later job."""
    done = load_acquire(job + 8 * (f.J_DONE + phase * f.LINE_SLOTS))
    if load_acquire(job + 8 * f.J_SEQUENCE) != sequence:
        return True
    return done >= load_acquire(job + 8 * (f.J_TOTAL + phase))


@driver
def sleep_in_phase(group: int, job: int, sequence: int, phase: int, timeout: int) -> None:
    """Sleep until somebody ends a phase. Those who still run its tasks get the core meanwhile.

    A thread that the system puts aside in here may read the total of a later job in the same ring
    slot. That one has begun after this job was complete, which is therefore looked at last.
    """
    seen = load_acquire(group + 8 * f.G_PHASE_WAKE)
    fetch_add(group + 8 * f.G_PHASE_SLEEPERS, 1)
    fence()  # with `end_phase`, which counts the last task and then reads G_PHASE_SLEEPERS
    if (
        not phase_is_done(job, sequence, phase)
        and load_acquire(group + 8 * f.G_COMPLETED) < sequence
        and load_acquire(group + 8 * f.G_STOP) == 0
    ):
        sleep_on(group, f.G_PHASE_WAKE, seen, timeout)
    fetch_add(group + 8 * f.G_PHASE_SLEEPERS, -1)


@driver
def wait_for_phase(group: int, job: int, sequence: int, phase: int, deadline: int) -> bool:
    """Whether the phase is over, so that the next may begin: not after the deadline or a stop, and
    not if the whole job is."""
    spins = 0
    until = 0
    while not phase_is_done(job, sequence, phase):
        if load_acquire(group + 8 * f.G_COMPLETED) >= sequence:
            return False
        if deadline != 0 and nanoseconds() > deadline:
            return False
        if load_acquire(group + 8 * f.G_STOP) != 0:
            return False
        if until == _TIRED:
            sleep_in_phase(
                group, job, sequence, phase, 0 if deadline == 0 else group + 8 * f.G_TIMESPEC
            )
            continue
        spins += 1
        until = spin(spins, until, get(group, f.G_WAIT_SPIN_NS))
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
def is_idle(group: int) -> bool:
    """Whether there is nothing to do for a worker but to wait."""
    return (
        load_acquire(group + 8 * f.G_SUBMITTED) <= load_acquire(group + 8 * f.G_COMPLETED)
        and load_acquire(group + 8 * f.G_STOP) == 0
    )


@driver
def work(group: int, pool: int, worker: int) -> int:
    """A worker's loop. It sleeps while the group is idle, and returns when the group stops."""
    set_float_environment()
    spins = 0
    until = 0
    while True:
        if load_acquire(group + 8 * f.G_STOP) != 0:
            return 1
        completed = load_acquire(group + 8 * f.G_COMPLETED)
        if load_acquire(group + 8 * f.G_SUBMITTED) > completed:
            participate(group, completed + 1, pool, worker, 0)
            spins = 0
            until = 0
            continue
        spins += 1
        until = spin(spins, until, get(group, f.G_SPIN_NS))
        if until != _TIRED:
            continue
        seen = load_acquire(group + 8 * f.G_WAKE)
        fetch_add(group + 8 * f.G_SLEEPERS, 1)
        fence()  # with those of `publish` and `complete`; `stop` bumps the word in any case
        if is_idle(group):
            sleep_on(group, f.G_WAKE, seen, 0)
        fetch_add(group + 8 * f.G_SLEEPERS, -1)
        spins = 0
        until = 0


@driver
def become_worker0(group: int) -> bool:
    """Take the place of worker 0, whose scratch only one thread may use, if it is free."""
    word = group + 8 * f.G_WORKER0
    return load_acquire(word) == 0 and compare_swap(word, 0, 1)


@driver
def take_worker0(group: int) -> int:
    """`become_worker0` for Python."""
    return 1 if become_worker0(group) else 0


@driver
def leave_worker0(group: int) -> None:
    """Make the place free, for one of those who wait for their jobs meanwhile."""
    fetch_add(group + 8 * f.G_WORKER0, -1)
    # ordered behind that; with the fence of `wait_for`
    if load_ordered(group + 8 * f.G_WAITERS) > 0:
        wake(group, f.G_DONE_WAKE)


@driver
def work_until(group: int, sequence: int, pool: int, worker: int, deadline: int) -> None:
    """Work on all jobs up to `sequence`, in their order."""
    completed = load_acquire(group + 8 * f.G_COMPLETED)
    while completed < sequence:
        participate(group, completed + 1, pool, worker, deadline)
        completed = load_acquire(group + 8 * f.G_COMPLETED)
        if completed < sequence and nanoseconds() > deadline:
            return
        if load_acquire(group + 8 * f.G_STOP) != 0:
            return


@driver
def wait_for(group: int, sequence: int, pool: int, worker: int, assist: int) -> int:
    """See `help_until`. Who may assist looks for the place of worker 0 whenever it wakes up."""
    deadline = nanoseconds() + get(group, f.G_TIMEOUT_NS)
    spins = 0
    until = 0
    while True:
        if load_acquire(group + 8 * f.G_COMPLETED) >= sequence:
            return 1
        if nanoseconds() > deadline or load_acquire(group + 8 * f.G_STOP) != 0:
            return 0
        if assist != 0 and become_worker0(group):
            work_until(group, sequence, pool, worker, deadline)
            leave_worker0(group)
            continue
        if until != _TIRED:
            spins += 1
            until = spin(spins, until, get(group, f.G_WAIT_SPIN_NS))
            continue
        seen = load_acquire(group + 8 * f.G_DONE_WAKE)
        fetch_add(group + 8 * f.G_WAITERS, 1)
        fence()  # with `complete` and `leave_worker0`
        if load_acquire(group + 8 * f.G_COMPLETED) < sequence and (
            assist == 0 or load_acquire(group + 8 * f.G_WORKER0) != 0
        ):
            sleep_on(group, f.G_DONE_WAKE, seen, group + 8 * f.G_TIMESPEC)
        fetch_add(group + 8 * f.G_WAITERS, -1)


@driver
def help_until(group: int, sequence: int, pool: int, worker: int, assist: int) -> int:
    """Wait for a job; with `assist` as worker `worker` (0), whenever nobody else is. Returns 1 when
    it is complete, 0 after the group's timeout, so that Python can see signals."""
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
    fence()  # with the compare-and-swap of `claim`: the words are closed before anything changes
    put(job, f.J_SEQUENCE, sequence)
    return 0


@driver
def publish(group: int, job: int) -> int:
    """Hand a prepared job of the ring to the workers. The caller holds the ring's lock."""
    sequence = get(job, f.J_SEQUENCE)
    for phase in range(f.PHASES):
        # released: who reads the new count reads the new sequence number, see `phase_is_done`
        store_release(job + 8 * (f.J_DONE + phase * f.LINE_SLOTS), 0)
        for pool in range(get(job, f.J_POOLS)):
            word = job + 8 * (f.J_CLAIM + (phase * f.MAX_POOLS + pool) * f.LINE_SLOTS)
            store_release(word, sequence << f.CLAIM_BITS)
    store_release(group + 8 * f.G_SUBMITTED, sequence)
    fence()  # with that of `work`
    if load_acquire(group + 8 * f.G_SLEEPERS) > 0:
        wake(group, f.G_WAKE)
    return sequence


@driver
def lock(group: int, word: int) -> None:
    """Take the lock in the word at address `word`: the ring's, that of a layer's mask. Held for
    microseconds, unless the system puts the holder aside: then others sleep on the word, which is 2
    as long as any of them may, and 1 while it is held otherwise."""
    spins = 0
    until = 0
    while not compare_swap(word, 0, 1 if until != _TIRED else 2):
        if until != _TIRED:
            spins += 1
            until = spin(spins, until, get(group, f.G_WAIT_SPIN_NS))
        elif compare_swap(word, 1, 2) or load_acquire(word) == 2:
            system_call(get(group, f.G_FUTEX), word, _FUTEX_WAIT_PRIVATE, 2, 0)


@driver
def unlock(group: int, word: int) -> None:
    if not compare_swap(word, 1, 0):
        store_release(word, 0)  # it was 2
        system_call(get(group, f.G_FUTEX), word, _FUTEX_WAKE_PRIVATE, 1, 0)


@driver
def try_launch(group: int, template: int, found: int) -> int:
    """Copy a job into the ring, route and publish it; never waits for the pool.

    Returns its sequence number, NO_ROOM if the ring is full, or -expert if a token is routed to an
    expert that is neither loaded nor skipped (0 is an expert too; sequence numbers start at 1);
    nothing runs then. The number of ids out of range goes to `found`.
    """
    ring = group + 8 * f.G_LOCK
    lock(group, ring)
    sequence = load_acquire(group + 8 * f.G_SUBMITTED) + 1
    if load_acquire(group + 8 * f.G_COMPLETED) + f.RING <= sequence:
        unlock(group, ring)
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
    unlock(group, ring)
    return sequence if missing == 0 else 1 - missing
