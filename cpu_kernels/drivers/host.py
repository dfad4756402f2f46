"""Jobs that a GPU's stream posts and awaits.

Two ways lead from a stream to the workers:

* *Host functions.* The driver's callback thread calls `post_host`, which routes and publishes,
  and later `wait_host`, which returns when the job is complete.
* *Mailboxes.* The stream writes and reads words, and a thread answers: `drivers.mailbox`.

Nobody waits for ever. When the pool has shown no sign of life for as long as `patience` says, the
waiter abandons the job: its output becomes NaN, and so does at once that of later jobs until the
pool has recovered. Every failed run adds to the layer's counters and to the process's faults.

Words that hand something over, as in `worker`:

    word             released by   acquired by              what it hands over
    Job.out          withdraw      phases.down_task         where the output goes now
    Group.abandoned  raise_word    group_error              nothing: the number itself
    sequence         launch        wait; Python             a launch that is under way
    counters         fail, launch  Python's `report`        counts come behind what explains them
    faults           add_fault     Python's `check_errors`  the counters
    visits           end_visit     Python's `idle`          that the visit touches nothing any more

A graph job's memory may go when `visits` has come to the number that streams were asked for (a post
that is answered, a wait that returns) and no launch of it runs. `visits` is therefore the last word
that a visit touches.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import (
    compare_swap,
    driver,
    fence,
    fetch_add,
    load_acquire,
    nanoseconds,
    pause,
    store_release,
)
from hybrid_moe.cpu_kernels.drivers.patience import is_late, patience_ns, ring_entry, start_clock
from hybrid_moe.cpu_kernels.drivers.records import (
    ERROR_STOPPED,
    ERROR_STUCK,
    ERROR_TIMEOUT,
    IDS_FAULT,
    IDS_PASS,
    NO_ROOM,
    GraphJob,
    Group,
    Layer,
    Mask,
)
from hybrid_moe.cpu_kernels.drivers.worker import (
    NO_TASK,
    has_room,
    has_stopped,
    help_until,
    lock,
    try_launch,
    unlock,
)
from hybrid_moe.cpu_kernels.jit.record import Word, i32

_NAN_WORD = 0x7FC07FC0  # two bf16, or a float32


@driver
def fill_nan(graph_job: GraphJob) -> None:
    """Make the output of a run that failed NaN, so that nobody takes it for a result."""
    job = graph_job.job
    words = i32.at(load_acquire(job.out))
    for i in range(job.tokens * graph_job.hidden * job.out_size // 4):
        words[i] = _NAN_WORD


@driver
def add_fault(graph_job: GraphJob) -> None:
    """Tell the process that a run went wrong."""
    # ordered behind what the counters say of it, for Python that sees this number first
    fetch_add(graph_job.faults.runs, 1)


@driver
def end_visit(graph_job: GraphJob) -> None:
    """A visit is over: from here on it touches nothing of the job."""
    # its release half comes behind all that the visit wrote; `GraphJobState.idle` reads it
    fetch_add(graph_job.visits, 1)


@driver
def fail(graph_job: GraphJob, error: int) -> None:
    """End a run that is not, or no more, waited for."""
    fill_nan(graph_job)
    store_release(graph_job.sequence, 0)
    counters = graph_job.counters
    store_release(counters.error, error)
    store_release(counters.waited_ns, patience_ns(graph_job))
    fetch_add(counters.errors, 1)  # behind the words that belong to it, for `report`
    add_fault(graph_job)


@driver
def raise_word(word: Word, value: int) -> None:
    """Make a word at least `value`; several threads may."""
    now = load_acquire(word)
    while now < value and not compare_swap(word, now, value):
        now = load_acquire(word)


@driver
def withdraw(graph_job: GraphJob, sequence: int) -> None:
    """Give up a published job. It may still run: its output goes elsewhere from now on, and its
    group takes no more graph jobs until it is over."""
    group = graph_job.group
    raise_word(group.abandoned, sequence)
    store_release(graph_job.abandoned, sequence)
    entry = ring_entry(group, sequence)
    if load_acquire(entry.sequence) == sequence and load_acquire(group.completed) < sequence:
        # an exchange: an entry that a later job takes meanwhile has another output. It pairs with
        # the acquires of `phases.finish_strip` and `phases.zero_task`
        compare_swap(entry.job.out, load_acquire(graph_job.job.out), graph_job.dump)
    # pairs with the compare-and-swap of `claim`: a worker whose task `is_withdrawn` does not see
    # sees the new output
    fence()


@driver
def is_withdrawn(graph_job: GraphJob, sequence: int) -> bool:
    """Whether no worker can write to the output any more: the job is over, or none is inside a task
    of the last phase that it may have begun before it could see where the output goes now."""
    group = graph_job.group
    entry = ring_entry(group, sequence)
    last = max(1, load_acquire(entry.phase_count)) - 1  # 0 while a later job is prepared
    phase = entry.phases[last]
    # acquires what the tasks that are counted have written, before the claims are read
    done = load_acquire(phase.done)
    taken = 0
    for pool in range(graph_job.job.pools):
        claimed = load_acquire(phase.claims[pool]) & NO_TASK
        taken += min(claimed, load_acquire(phase.tasks[pool]))
    return load_acquire(group.completed) >= sequence or done >= taken


@driver
def grace_ns(graph_job: GraphJob) -> int:
    """Nanoseconds that workers inside a task get to leave the output of a job that is given up. One
    that stands still for longer, and comes back just before the output is read, spoils the NaN of
    its strips; the error is raised all the same."""
    return graph_job.timeout_ns // 8


@driver
def abandon(graph_job: GraphJob, sequence: int, error: int, grace: int) -> None:
    """End the wait for a published job; waits up to `grace` nanoseconds for `is_withdrawn`."""
    withdraw(graph_job, sequence)
    until = nanoseconds() + grace
    while not is_withdrawn(graph_job, sequence) and nanoseconds() < until:
        help_until(graph_job.group, sequence, 0, 0, 0)  # sleeps, unless the group has stopped
        pause()
    fail(graph_job, error)


@driver
def group_error(group: Group) -> int:
    """Why the group takes no more graph jobs now, or 0."""
    if has_stopped(group):
        return ERROR_STOPPED
    if load_acquire(group.completed) < load_acquire(group.abandoned):
        return ERROR_STUCK
    return 0


@driver
def snapshot_mask(mask: Mask) -> int:
    """Bring the layer's copy of the mask up to date; return its epoch. The caller holds the mask's
    lock."""
    changed = 0
    for e in range(mask.experts):
        now = mask.live[e]
        if now != mask.seen[e]:
            mask.seen[e] = now
            changed = 1
    mask.epoch += changed
    return mask.epoch


@driver
def launch(graph_job: GraphJob) -> int:
    """Route and publish a graph job: the launch's number, 0 if it failed, or NO_ROOM."""
    group = graph_job.group
    mask = graph_job.mask
    lock(group, mask.lock)
    if graph_job.closed != 0:
        unlock(group, mask.lock)
        fill_nan(graph_job)
        store_release(graph_job.sequence, 0)
        fetch_add(graph_job.faults.closed_runs, 1)  # before the runs that it is one of
        add_fault(graph_job)
        return 0
    epoch = snapshot_mask(mask)
    sequence = try_launch(group, graph_job.job)
    if sequence > 0:
        store_release(graph_job.sequence, sequence)  # for `GraphJobState.idle` in Python
    unlock(group, mask.lock)
    if sequence == NO_ROOM:
        return sequence
    store_release(graph_job.epoch, epoch)
    if graph_job.ignored_ids != IDS_PASS and graph_job.job.ignored > 0:
        fetch_add(graph_job.counters.ignored, graph_job.job.ignored)
        if graph_job.ignored_ids == IDS_FAULT:
            add_fault(graph_job)
    if sequence <= 0:
        fill_nan(graph_job)
        store_release(graph_job.sequence, 0)
        store_release(graph_job.counters.missing_expert, -sequence)
        fetch_add(graph_job.counters.missing, 1)  # behind the expert, for `report`
        add_fault(graph_job)
        sequence = 0
    return sequence


@driver
def close_host(graph_job: GraphJob) -> None:
    """Let no run of a graph job begin any more: later posts of it give NaN, and read nothing of the
    layer. What has been launched runs on."""
    group = graph_job.group
    mask = graph_job.mask
    lock(group, mask.lock)
    graph_job.closed = 1
    graph_job.job.layer = Layer.at(0)
    unlock(group, mask.lock)


@driver
def post(graph_job: GraphJob) -> None:
    """Launch a graph job. Waits only while the ring is full, for its oldest job."""
    group = graph_job.group
    start_clock(graph_job)
    while True:
        oldest = load_acquire(group.completed) + 1  # a full ring has it, or had
        error = group_error(group)
        if error == 0 and has_room(group) and launch(graph_job) != NO_ROOM:
            return
        if error == 0 and is_late(graph_job):
            error = ERROR_TIMEOUT
        if error != 0:
            fail(graph_job, error)
            return
        help_until(group, oldest, 0, 0, 0)


@driver
def post_host(graph_job: GraphJob) -> None:
    """Body of a CUDA host function: launch a graph job."""
    post(graph_job)
    end_visit(graph_job)


@driver
def wait(graph_job: GraphJob) -> None:
    """Return when the latest launch is complete or given up."""
    group = graph_job.group
    sequence = load_acquire(graph_job.sequence)
    start_clock(graph_job)
    while not help_until(group, sequence, 0, 0, 0):
        error = group_error(group)
        late = is_late(graph_job)
        if load_acquire(group.completed) >= sequence:
            return
        if error == 0 and late:
            error = ERROR_TIMEOUT
        if error != 0:
            abandon(graph_job, sequence, error, grace_ns(graph_job))
            return


@driver
def wait_host(graph_job: GraphJob) -> None:
    """Body of a CUDA host function: wait for the latest launch."""
    wait(graph_job)
    end_visit(graph_job)
