"""How long a pool may show no sign of life before those who wait for it give up.

A pool is alive as long as it ends tasks. One task is run by one thread, so nothing can be said of a
pool before the largest task of the job that it is at would be over on a slow thread:

    patience = H_TIMEOUT_NS + NS_PER_MAC * (multiply-adds of the job's largest task)

NS_PER_MAC is 1e8 multiply-adds a second: the portable tier does 1.2e9 on one thread of the slowest
machine that has been measured, at one token; batches are faster. So a batch of any length passes,
and a dead pool is found after a minute at decode sizes, and some ten at the longest prefills.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.drivers.intrinsics import driver, load32, load_acquire, nanoseconds
from hybrid_moe.cpu_kernels.drivers.route import ceil_div, get, put, units_of
from hybrid_moe.formats.strips import STRIP_ROWS

NS_PER_MAC = 10


@driver
def largest(units: int, tasks: int) -> int:
    """Units of the largest of so many even tasks, or 0 if there are none."""
    return 0 if tasks == 0 else ceil_div(units, tasks)


@driver
def task_nanoseconds(job: int) -> int:
    """What the largest task of a routed job takes a slow thread.

    A gate/up task has strips of 64 rows for the tokens of one expert at a time; so has a down task,
    or it has them for all pairs of token and expert.
    """
    layer = get(job, f.J_LAYER)
    active = get(job, f.J_ACTIVE)
    pairs = load32(get(job, f.J_ACTIVE_START) + 4 * active)
    most = 0
    for p in range(get(job, f.J_POOLS)):
        strips = active * units_of(get(layer, f.L_BLOCKS), p)
        tasks = get(job, f.J_TASKS + f.PHASE_GATE_UP * f.MAX_POOLS + p)
        most = max(most, largest(strips, tasks) * get(job, f.J_MOST) * get(layer, f.L_HIDDEN))
        strips = units_of(get(layer, f.L_STRIPS), p)
        tokens = pairs
        if get(job, f.J_LAST_PHASE) == f.PHASE_COMBINE:
            strips, tokens = active * strips, get(job, f.J_MOST)
        tasks = get(job, f.J_TASKS + f.PHASE_DOWN * f.MAX_POOLS + p)
        most = max(most, largest(strips, tasks) * tokens * get(layer, f.L_INTERMEDIATE))
    return NS_PER_MAC * STRIP_ROWS * most


@driver
def head_of(group: int) -> int:
    """The ring's entry of the job that the pool is at."""
    sequence = load_acquire(group + 8 * f.G_COMPLETED) + 1
    return group + 8 * (f.G_RING + (sequence % f.RING) * f.JOB_SLOTS)


@driver
def progress(group: int) -> int:
    """A number that changes whenever the pool ends a task."""
    job = head_of(group)
    ended = 0
    for phase in range(f.PHASES):
        ended += load_acquire(job + 8 * (f.J_DONE + phase * f.LINE_SLOTS))
    return (load_acquire(group + 8 * f.G_COMPLETED) << 32) + ended


@driver
def patience(host: int) -> int:
    """Nanoseconds without progress after which the job that a slot waits for is given up. Only the
    ring is read: what a job of others points at may be gone."""
    return get(host, f.H_TIMEOUT_NS) + get(head_of(get(host, f.H_GROUP)), f.J_TASK_NS)


@driver
def start_clock(host: int) -> None:
    """A visit of a slot begins to wait."""
    put(host, f.H_SEEN, progress(get(host, f.H_GROUP)))
    put(host, f.H_SINCE, nanoseconds())


@driver
def is_late(host: int) -> bool:
    """Whether the pool has made no progress for as long as the slot has patience."""
    now = progress(get(host, f.H_GROUP))
    if now != get(host, f.H_SEEN):
        put(host, f.H_SEEN, now)
        put(host, f.H_SINCE, nanoseconds())
        return False
    return nanoseconds() - get(host, f.H_SINCE) > patience(host)
