"""Mailboxes through which a GPU's stream posts and awaits jobs, and the thread that reads them.

A stream writes the address of a graph job into `posted` and waits until `done` is 1; `watch` is the
thread on the other side. It alone answers, in this order: clear `posted`, run the job, set `done`.
The stream clears `done` after its wait and before its next post. Whatever a graph has captured is a
constant, so a captured number could not tell one replay from the next; words that go back to zero
can: when a stream waits for a job, its own post comes after its own clearing of `done`, and nobody
but the watcher's answer to that post sets it again.

    word     released by             acquired by          what it hands over
    posted   the stream's write      look                 the inputs, copied before
    posted   accept (0)              the stream           nothing: it posts again after `done` only
    done     complete                the stream's wait    the output
    count    Watcher.add in Python   watch_once           the address in the post
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.host import (
    abandon,
    end_visit,
    fail,
    grace_ns,
    group_error,
    is_withdrawn,
    launch,
    withdraw,
)
from hybrid_moe.cpu_kernels.drivers.intrinsics import (
    driver,
    load_acquire,
    nanoseconds,
    pause,
    store_release,
    system_call,
)
from hybrid_moe.cpu_kernels.drivers.patience import is_late, start_clock
from hybrid_moe.cpu_kernels.drivers.records import (
    ERROR_STOPPED,
    ERROR_TIMEOUT,
    NO_ROOM,
    GraphJob,
    Mailbox,
    Post,
    Watcher,
)
from hybrid_moe.cpu_kernels.drivers.worker import FUTEX_WAIT_PRIVATE, has_room


@driver
def mailbox_of(post: Post) -> Mailbox:
    # pairs with the release of `count`, behind which Python has written the address
    return Mailbox.at(load_acquire(post.mailbox))


@driver
def complete(post: Post) -> None:
    """Release the stream that waits at a mailbox."""
    graph_job = post.graph_job
    post.graph_job = GraphJob.at(0)
    # behind the job's output; pairs with the stream's wait for the value
    store_release(mailbox_of(post).done, 1)
    end_visit(graph_job)


@driver
def accept(post: Post, graph_job: GraphJob) -> None:
    """Take a post out of the mailbox."""
    # the stream posts no more before it has seen `done`, so nothing is lost
    store_release(mailbox_of(post).posted, 0)
    post.sequence = 0
    post.error = 0
    start_clock(graph_job)
    post.graph_job = graph_job


@driver
def give_up(post: Post, graph_job: GraphJob) -> None:
    """End a post whose job is withdrawn: once nobody writes to its output, or some time later."""
    late = nanoseconds() - graph_job.seen_at > grace_ns(graph_job)
    if late or is_withdrawn(graph_job, post.sequence):
        fail(graph_job, post.error)
        complete(post)


@driver
def advance(post: Post, graph_job: GraphJob) -> None:
    """Bring the job of a post one step further; never waits."""
    if post.error != 0:
        give_up(post, graph_job)
        return
    group = graph_job.group
    sequence = post.sequence
    if sequence != 0 and load_acquire(group.completed) >= sequence:
        complete(post)
        return
    error = group_error(group)
    if error == 0 and sequence == 0 and has_room(group):
        launched = launch(graph_job)
        if launched == 0:
            complete(post)
            return
        if launched != NO_ROOM:
            post.sequence = launched
            return
    if error == 0 and is_late(graph_job):
        error = ERROR_TIMEOUT
    if error == 0:
        return
    if sequence == 0:
        fail(graph_job, error)
        complete(post)
        return
    withdraw(graph_job, sequence)
    post.error = error
    graph_job.seen_at = nanoseconds()
    give_up(post, graph_job)


@driver
def look(post: Post) -> GraphJob:
    """The graph job that a mailbox is busy with, which may have just been posted; or 0."""
    if mailbox_of(post).address != 0 and post.graph_job.address == 0:
        # pairs with the stream's write: the inputs are there
        posted = load_acquire(mailbox_of(post).posted)
        if posted != 0:
            accept(post, GraphJob.at(posted))
    return post.graph_job


@driver
def watch_once(watcher: Watcher) -> int:
    """Look at every mailbox once; how many of them are in use at the moment."""
    busy = 0
    for i in range(load_acquire(watcher.count)):  # pairs with Python's store behind a new post
        post = watcher.posts[i]
        graph_job = look(post)
        if graph_job.address != 0:
            advance(post, graph_job)
            busy += 1
    return busy


@driver
def release_all(watcher: Watcher) -> None:
    """Fail what is under way, so that no stream waits for a watcher that is gone."""
    for i in range(load_acquire(watcher.count)):
        post = watcher.posts[i]
        graph_job = look(post)
        if graph_job.address == 0:
            continue
        if post.sequence == 0:
            fail(graph_job, ERROR_STOPPED)
        else:
            abandon(graph_job, post.sequence, ERROR_STOPPED, 0)
        complete(post)


@driver
def watch(watcher: Watcher) -> None:
    """The watcher's loop: spins while there is work and `hot_ns` longer, then naps between looks.
    Returns when it is told to stop."""
    last = nanoseconds()
    while load_acquire(watcher.stop) == 0:
        if watch_once(watcher) > 0:
            last = nanoseconds()
        elif nanoseconds() - last > watcher.hot_ns:
            word = watcher.nap_word
            seen = load_acquire(word)
            system_call(watcher.futex, word.address, FUTEX_WAIT_PRIVATE, seen, watcher.nap.address)
        pause()
    release_all(watcher)
