"""How long a pool may show no sign of life before those who wait for it give up.

A pool is alive as long as it ends tasks. One task is run by one thread, so nothing can be said of a
pool before the largest task of the job that it is at would be over on a slow thread:

    patience = GraphJob.timeout_ns + NS_PER_MAC * (multiply-adds of the job's largest task)

NS_PER_MAC is 1e8 multiply-adds a second: the portable tier does 1.2e9 on one thread of the slowest
machine that has been measured, at one token; batches are faster. So a batch of any length passes,
and a dead pool is found after a minute at decode sizes, and some ten at the longest prefills.
`route.add_tasks` writes the product into `Entry.task_ns`.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import driver, load_acquire, nanoseconds
from hybrid_moe.cpu_kernels.drivers.records import RING, Entry, GraphJob, Group

NS_PER_MAC = 10


@driver
def ring_entry(group: Group, sequence: int) -> Entry:
    """The entry of a job."""
    return group.ring[sequence % RING]


@driver
def oldest_entry(group: Group) -> Entry:
    """The entry of the job that the pool is at."""
    return ring_entry(group, load_acquire(group.completed) + 1)


@driver
def progress(group: Group) -> int:
    """A number that changes whenever the pool ends a task."""
    entry = oldest_entry(group)
    ended = 0
    for index in range(load_acquire(entry.phase_count)):
        ended += load_acquire(entry.phases[index].done)
    return (load_acquire(group.completed) << 32) + ended


@driver
def patience_ns(graph_job: GraphJob) -> int:
    """Nanoseconds without progress after which the job that a visit waits for is given up. Only the
    ring is read: what a job of others points at may be gone."""
    return graph_job.timeout_ns + load_acquire(oldest_entry(graph_job.group).task_ns)


@driver
def start_clock(graph_job: GraphJob) -> None:
    """A visit of a job begins to wait."""
    graph_job.seen_progress = progress(graph_job.group)
    graph_job.seen_at = nanoseconds()


@driver
def is_late(graph_job: GraphJob) -> bool:
    """Whether the pool has made no progress for as long as its patience lasts."""
    now = progress(graph_job.group)
    if now != graph_job.seen_progress:
        graph_job.seen_progress = now
        graph_job.seen_at = nanoseconds()
        return False
    return nanoseconds() - graph_job.seen_at > patience_ns(graph_job)
