"""Threads of a pool group: taking tasks, waiting, publishing jobs.

Jobs run one after another in the order of submission, phase by phase. A phase is over when its
tasks are done, not when threads have met: a thread that the system has put aside delays nobody who
has work. A thread that wakes late finds other sequence numbers in the claim words and leaves
without touching what the job owned.

What a thread has written before a release, another reads behind the acquire that sees it:

    word        released by                  acquired by           what it hands over
    submitted   publish                      work, work_until      a job is in its entry
    claims      publish                      claim                 all that a task reads
    done        take_tasks (fetch_add)       phase_is_done         what the phase's tasks wrote
    completed   complete                     who waits for a job   its output; the entry is free
    worker0     leave_worker0 (fetch_add)    become_worker0        worker 0's scratch
    a lock      unlock                       lock                  what it guards

Every wait spins for a while and then sleeps on a futex, that of an `EventCount`. No wake-up is
lost, because both sides first write and then read what the other writes:

    who sleeps   counts itself, fence, looks once more at what it waits for, sleeps
    who wakes    changes what others wait for, fence, looks whether anybody has counted itself

So at least one of the two sees the other. The epoch to sleep on is read before the count, and is
bumped before the wake-up: who looks in between finds it changed and does not fall asleep.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import (
    call,
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
    store_release,
    system_call,
)
from hybrid_moe.cpu_kernels.drivers.patience import ring_entry
from hybrid_moe.cpu_kernels.drivers.phases import run_task
from hybrid_moe.cpu_kernels.drivers.records import (
    CLAIM_BITS,
    MAX_PHASES,
    MAX_POOLS,
    NO_ROOM,
    RING,
    SPAN_KINDS,
    SPAN_SUBMIT,
    SPAN_TASK,
    SPAN_WAIT,
    Entry,
    EventCount,
    Group,
    Job,
    Layer,
    Phase,
)
from hybrid_moe.cpu_kernels.drivers.route import append_phases, route
from hybrid_moe.cpu_kernels.drivers.spans import CALLER, begin_span, end_span
from hybrid_moe.cpu_kernels.jit.record import Word, i64
from hybrid_moe.cpu_kernels.tuning import PAUSES_PER_LOOK

FUTEX_WAIT_PRIVATE = 128
FUTEX_WAKE_PRIVATE = 129
_ALL = 2147483647
NO_TASK = (1 << CLAIM_BITS) - 1
_TIRED = -1


@driver
def wake(group: Group, event: EventCount) -> None:
    """Bump an event's epoch and wake all who sleep on it."""
    fetch_add(event.epoch, 1)
    system_call(group.futex, event.epoch.address, FUTEX_WAKE_PRIVATE, _ALL, 0)


@driver
def wake_all(group: Group) -> None:
    """Wake workers and waiting submitters, whatever they wait for."""
    wake(group, group.work)
    wake(group, group.phase_done)
    wake(group, group.done)


@driver
def start_to_sleep(event: EventCount) -> int:
    """Count this thread among the sleepers; returns the epoch to sleep on. The caller looks once
    more at what it waits for, sleeps or not, and calls `end_sleep`."""
    seen = load_acquire(event.epoch)
    fetch_add(event.sleepers, 1)
    fence()  # pairs with the fence, or the ordered load, of whoever wakes: see the module
    return seen


@driver
def sleep(group: Group, event: EventCount, seen: int, timeout: int) -> None:
    """Sleep until the epoch differs from `seen`, or `timeout`, the address of a timespec (0: none),
    has passed. A signal ends it too."""
    system_call(group.futex, event.epoch.address, FUTEX_WAIT_PRIVATE, seen, timeout)


@driver
def end_sleep(event: EventCount) -> None:
    fetch_add(event.sleepers, -1)


@driver
def spin(spins: int, until: int, limit: int) -> int:
    """Pause for the `spins`-th time of a wait, counted from 1. Returns what the next pause takes as
    `until` (0 at first), or _TIRED when the wait has lasted for `limit` nanoseconds."""
    pause()
    if spins % PAUSES_PER_LOOK != 0:
        return until
    now = nanoseconds()
    if until == 0:
        return now + limit
    return until if now < until else _TIRED


@driver
def has_stopped(group: Group) -> bool:
    """Whether the group's threads are to end."""
    return load_acquire(group.stop) != 0  # who stores it wakes all sleepers afterwards


@driver
def claim(phase: Phase, sequence: int, pool: int) -> int:
    """The next task of (phase, pool), or -1 when there is none or the job is another by now."""
    word = phase.claims[pool]
    while True:
        value = load_acquire(word)  # pairs with the release of `publish`: the job is filled in
        if (value >> CLAIM_BITS) != sequence:
            return -1
        task = value & NO_TASK
        if task >= load_acquire(phase.tasks[pool]):
            return -1
        if compare_swap(word, value, value + 1):  # so the tasks were those of this job
            return task


@driver
def complete(group: Group, sequence: int) -> None:
    store_release(group.completed, sequence)  # pairs with the acquires of who waits for the job
    fence()  # pairs with that of `start_to_sleep`, of waiters and of workers
    if load_acquire(group.done.sleepers) > 0:
        wake(group, group.done)
    if load_acquire(group.work.sleepers) > 0 and load_acquire(group.submitted) > sequence:
        wake(group, group.work)


@driver
def count_time(group: Group, entry: Entry) -> None:
    """Add to the job's layer how long the pool was at it: since it was published, or since the job
    before it ended. For who has counted the job's last task and has not completed it yet, so
    nothing of it can go; jobs end one after the other, and so do these calls."""
    now = nanoseconds()
    begun = max(load_acquire(entry.begun), load_acquire(group.ended))
    store_release(group.ended, now)  # for the next job's, whose workers acquire `completed`
    if entry.job.layer.address != 0:  # a job may be no layer's
        fetch_add(entry.job.layer.busy_ns, now - begun)


@driver
def end_phase(group: Group, sequence: int, is_last: int) -> None:
    """What whoever has counted the last task of a phase does next. The entry may hold a later job
    by now, so this reads nothing of it."""
    if is_last != 0:
        complete(group, sequence)
    # ordered behind the counting of the task; pairs with the fence of `start_to_sleep`
    if load_ordered(group.phase_done.sleepers) > 0:
        wake(group, group.phase_done)


@driver
def enter(layer: Layer) -> int:
    """Make the thread ready for the layer's kernels. Returns what undoes it, or 0."""
    if layer.enter != 0:
        call(layer.enter)
    return layer.leave


@driver
def take_tasks(
    group: Group,
    entry: Entry,
    sequence: int,
    index: int,
    pool: int,
    worker: int,
    deadline: int,
    leave: int,
) -> int:
    """Run tasks of phase `index` until there are none to claim; whoever ends the last one wakes
    those who wait for that, and completes the job if it is the last phase. `deadline` (0: none)
    bounds how long the caller stays away from Python.

    Returns what the thread must call when it leaves the job (0: nothing). It enters at its first
    task, since only a claimed task keeps the job's layer where it is; `leave` is not 0 if it has.
    """
    phase = entry.phases[index]
    while True:
        if deadline != 0 and nanoseconds() > deadline:
            return leave
        if has_stopped(group):
            return leave
        task = claim(phase, sequence, pool)
        if task < 0:
            return leave
        if leave == 0:
            leave = enter(entry.job.layer)
        # the task that is claimed keeps the entry as it is, until it is counted
        total = load_acquire(phase.total)
        last = load_acquire(entry.phase_count) - 1
        begin = begin_span(group)
        run_task(entry, phase, pool, task, worker)
        if begin != 0:
            detail = SPAN_KINDS * index + phase.kind
            end_span(group, begin, SPAN_TASK, worker, sequence, detail, 0)
        # its release half publishes what the task wrote, to the acquire of `phase_is_done`
        if fetch_add(phase.done, 1) + 1 == total:
            if index == last:
                count_time(group, entry)
            end_phase(group, sequence, 1 if index == last else 0)


@driver
def phase_is_done(entry: Entry, sequence: int, index: int) -> bool:
    """A finished phase of this job; also true when the entry holds a later job."""
    # in this order: `publish` clears `done` after `open_entry` has changed the sequence
    done = load_acquire(entry.phases[index].done)
    if load_acquire(entry.sequence) != sequence:
        return True
    return done >= load_acquire(entry.phases[index].total)


@driver
def sleep_in_phase(group: Group, entry: Entry, sequence: int, index: int, timeout: int) -> None:
    """Sleep until somebody ends a phase. Those who still run its tasks get the core meanwhile.

    A thread that the system puts aside in here may read the total of a later job in the same entry.
    That one has begun after this job was complete, which is therefore looked at last.
    """
    seen = start_to_sleep(group.phase_done)
    if (
        not phase_is_done(entry, sequence, index)
        and load_acquire(group.completed) < sequence
        and not has_stopped(group)
    ):
        sleep(group, group.phase_done, seen, timeout)
    end_sleep(group.phase_done)


@driver
def wait_for_phase(group: Group, entry: Entry, sequence: int, index: int, deadline: int) -> bool:
    """Whether the phase is over, so that the next may begin: not after the deadline or a stop, and
    not if the whole job is."""
    spins = 0
    until = 0
    while not phase_is_done(entry, sequence, index):
        if load_acquire(group.completed) >= sequence:
            return False
        if deadline != 0 and nanoseconds() > deadline:
            return False
        if has_stopped(group):
            return False
        if until == _TIRED:
            timeout = 0 if deadline == 0 else group.timeout.address
            sleep_in_phase(group, entry, sequence, index, timeout)
            continue
        spins += 1
        until = spin(spins, until, group.wait_spin_ns)
    return True


@driver
def participate(group: Group, sequence: int, pool: int, worker: int, deadline: int) -> None:
    """Work on one job until it is complete (or the deadline)."""
    entry = ring_entry(group, sequence)
    leave = 0
    # a later job's count, read by a thread that comes too late, leads to claim words of that job
    for index in range(load_acquire(entry.phase_count)):
        leave = take_tasks(group, entry, sequence, index, pool, worker, deadline, leave)
        if not wait_for_phase(group, entry, sequence, index, deadline):
            break
    if leave != 0:
        call(leave)


@driver
def is_idle(group: Group) -> bool:
    """Whether there is nothing to do for a worker but to wait."""
    return load_acquire(group.submitted) <= load_acquire(group.completed) and not has_stopped(group)


@driver
def work(group: Group, pool: int, worker: int) -> None:
    """A worker's loop. It sleeps while the group is idle, and returns when the group stops."""
    set_float_environment()
    spins = 0
    until = 0
    while not has_stopped(group):
        completed = load_acquire(group.completed)
        if load_acquire(group.submitted) > completed:  # pairs with the release of `publish`
            participate(group, completed + 1, pool, worker, 0)
            spins = 0
            until = 0
            continue
        spins += 1
        until = spin(spins, until, load_acquire(group.spin_ns))
        if until != _TIRED:
            continue
        seen = start_to_sleep(group.work)
        if is_idle(group):
            sleep(group, group.work, seen, 0)
        end_sleep(group.work)
        spins = 0
        until = 0


@driver
def become_worker0(group: Group) -> bool:
    """Take the place of worker 0, whose scratch only one thread may use, if it is free."""
    return load_acquire(group.worker0) == 0 and compare_swap(group.worker0, 0, 1)


@driver
def leave_worker0(group: Group) -> None:
    """Make the place free, for one of those who wait for their jobs meanwhile."""
    fetch_add(group.worker0, -1)  # its release half hands the scratch to the next `become_worker0`
    # ordered behind that; pairs with the fence of `start_to_sleep` in `wait_for`
    if load_ordered(group.done.sleepers) > 0:
        wake(group, group.done)


@driver
def work_until(group: Group, sequence: int, pool: int, worker: int, deadline: int) -> None:
    """Work on all jobs up to `sequence`, in their order."""
    completed = load_acquire(group.completed)
    while completed < sequence:
        participate(group, completed + 1, pool, worker, deadline)
        completed = load_acquire(group.completed)
        if completed < sequence and nanoseconds() > deadline:
            return
        if has_stopped(group):
            return


@driver
def wait_for(group: Group, sequence: int, pool: int, worker: int, assist: int) -> bool:
    """See `help_until`. Who may assist looks for the place of worker 0 whenever it wakes up."""
    deadline = nanoseconds() + group.timeout_ns
    spins = 0
    until = 0
    while True:
        if load_acquire(group.completed) >= sequence:
            return True
        if nanoseconds() > deadline or has_stopped(group):
            return False
        if assist != 0 and become_worker0(group):
            work_until(group, sequence, pool, worker, deadline)
            leave_worker0(group)
            continue
        if until != _TIRED:
            spins += 1
            until = spin(spins, until, group.wait_spin_ns)
            continue
        seen = start_to_sleep(group.done)  # pairs with `complete` and `leave_worker0`
        if load_acquire(group.completed) < sequence and (
            assist == 0 or load_acquire(group.worker0) != 0
        ):
            sleep(group, group.done, seen, group.timeout.address)
        end_sleep(group.done)


@driver
def help_until(group: Group, sequence: int, pool: int, worker: int, assist: int) -> bool:
    """Wait for a job; with `assist` as worker `worker` (0), whenever nobody else is. Whether it is
    complete: false after the group's timeout, so that Python can see signals."""
    begin = begin_span(group)
    before = set_float_environment()
    is_complete = wait_for(group, sequence, pool, worker, assist)
    restore_float_environment(before)
    if begin != 0:
        end_span(group, begin, SPAN_WAIT, CALLER, sequence, 0, 0)
    return is_complete


@driver
def open_entry(entry: Entry, sequence: int) -> None:
    """Take an entry for a new job: from here on no late worker can claim a task in it."""
    for index in range(MAX_PHASES):
        for pool in range(MAX_POOLS):
            store_release(entry.phases[index].claims[pool], (sequence << CLAIM_BITS) | NO_TASK)
    fence()  # pairs with the compare-and-swap of `claim`: closed before anything changes
    store_release(entry.sequence, sequence)


@driver
def publish(group: Group, entry: Entry) -> None:
    """Hand a prepared job of the ring to the workers. The caller holds the ring's lock."""
    sequence = load_acquire(entry.sequence)
    store_release(entry.begun, nanoseconds())
    for index in range(load_acquire(entry.phase_count)):
        phase = entry.phases[index]
        # pairs with the acquire of `phase_is_done`: who reads the new count reads the new sequence
        store_release(phase.done, 0)
        for pool in range(entry.job.pools):
            # pairs with the acquire of `claim`
            store_release(phase.claims[pool], sequence << CLAIM_BITS)
    store_release(group.submitted, sequence)  # pairs with the acquire of `work`
    fence()  # pairs with that of `start_to_sleep` in `work`
    if load_acquire(group.work.sleepers) > 0:
        wake(group, group.work)


@driver
def lock(group: Group, word: Word) -> None:
    """Take a lock: the ring's, that of a layer's mask. Held for microseconds, unless the system
    puts the holder aside: then others sleep on the word, which is 2 as long as any of them may, and
    1 while it is held otherwise."""
    spins = 0
    until = 0
    # acquires what the last holder wrote before the release in `unlock`
    while not compare_swap(word, 0, 1 if until != _TIRED else 2):
        if until != _TIRED:
            spins += 1
            until = spin(spins, until, group.wait_spin_ns)
        elif compare_swap(word, 1, 2) or load_acquire(word) == 2:
            system_call(group.futex, word.address, FUTEX_WAIT_PRIVATE, 2, 0)


@driver
def unlock(group: Group, word: Word) -> None:
    if not compare_swap(word, 1, 0):
        store_release(word, 0)  # it was 2; pairs with the compare-and-swap of `lock`
        system_call(group.futex, word.address, FUTEX_WAKE_PRIVATE, 1, 0)


@driver
def copy_job(to: Job, job: Job) -> None:
    for i in range(Job.nbytes // 8):
        i64.at(to.address)[i] = i64.at(job.address)[i]


@driver
def has_room(group: Group) -> bool:
    """Whether the ring would take a job now: a cheap look, which only its lock makes certain."""
    submitted = load_acquire(group.submitted)
    return load_acquire(group.completed) + RING > submitted + 1


@driver
def try_launch(group: Group, job: Job) -> int:
    """Route a job, which takes in its inputs, and publish a copy of it in the ring; never waits for
    the pool. What routing has found is in the job afterwards.

    Returns its sequence number, NO_ROOM if the ring is full, or -expert if a token is routed to an
    expert that is neither loaded nor skipped (0 is an expert too; sequence numbers start at 1);
    nothing runs then.
    """
    if not has_room(group):
        return NO_ROOM
    begin = begin_span(group)
    missing = route(job)  # before the lock: it works in the job's own memory
    if missing != 0:
        return 1 - missing
    lock(group, group.lock)
    if not has_room(group):
        unlock(group, group.lock)
        return NO_ROOM
    sequence = load_acquire(group.submitted) + 1
    entry = ring_entry(group, sequence)
    open_entry(entry, sequence)
    copy_job(entry.job, job)
    append_phases(entry)
    publish(group, entry)
    unlock(group, group.lock)
    if begin != 0:
        end_span(group, begin, SPAN_SUBMIT, CALLER, sequence, job.tokens, job.layer.label)
    return sequence
