"""Routing: token x slot ids -> pairs grouped by expert, and the phases of the job."""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import (
    call,
    driver,
    load_acquire,
    restore_float_environment,
    set_float_environment,
    store_release,
)
from hybrid_moe.cpu_kernels.drivers.patience import NS_PER_MAC
from hybrid_moe.cpu_kernels.drivers.records import (
    DOWN,
    ENCODE,
    GATE_UP,
    MAX_STRIPS,
    ZERO,
    Entry,
    Job,
    Phase,
)
from hybrid_moe.cpu_kernels.jit.records import i64
from hybrid_moe.formats.strips import STRIP_ROWS, SUMS_BYTES

COMPUTED, SKIPPED, NOT_LOADED = 1, 0, -1


@driver
def expert_state(job: Job, expert: int) -> int:
    """Whether an expert's pairs are computed here, belong elsewhere, or cannot be computed."""
    if job.skip.address != 0 and job.skip[expert] != 0:
        return SKIPPED
    # pairs with the release of `pack_strips.publish_word`
    strips = load_acquire(job.layer.packed[expert * job.pools].gate_up)
    return COMPUTED if strips != 0 else NOT_LOADED


@driver
def count_pairs(job: Job) -> None:
    """Pairs of each expert; ids out of range are counted and contribute nothing."""
    experts = job.layer.experts
    counts = job.counts
    for e in range(experts):
        counts[e] = 0
    ignored = 0
    missing = 0
    for i in range(job.tokens * job.top_k):
        e = job.ids[i]
        if e < 0 or e >= experts:
            ignored += 1
            continue
        state = expert_state(job, e)
        if state == COMPUTED:
            counts[e] += 1
        elif state == NOT_LOADED:
            missing = e + 1
    job.ignored = ignored
    job.missing = missing


@driver
def place_pairs(job: Job) -> None:
    """Group pairs by ascending expert; within one, by token, then slot."""
    experts = job.layer.experts
    counts = job.counts
    active = 0
    start = 0
    most = 0
    for e in range(experts):
        n = counts[e]
        if n > 0:
            job.active_expert[active] = e
            job.active_start[active] = start
            counts[e] = start  # now: where the expert's next pair goes
            start += n
            active += 1
            most = max(most, n)
        else:
            counts[e] = -1
    job.active_start[active] = start
    job.active = active
    job.most = most

    top_k = job.top_k
    x_rows, x_bytes = job.x_rows, job.layer.x_row_bytes
    for t in range(job.tokens):
        for slot in range(top_k):
            i = t * top_k + slot
            e = job.ids[i]
            if e < 0 or e >= experts:
                continue
            pair = counts[e]
            if pair < 0:
                continue
            counts[e] = pair + 1
            job.pair_token[pair] = t
            job.pair_weight[pair] = job.weights[i]
            job.pair_x[pair] = x_rows + t * x_bytes


@driver
def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


@driver
def share(units: int, target: int) -> int:
    """Units per task so that there are about `target` tasks, at least one."""
    return max(1, units // max(1, target))


@driver
def append_phase(entry: Entry, kind: int, per_task: int, macs: int) -> Phase:
    """A phase behind those that the job has, without tasks as yet.

    Args:
        per_task: what its tasks have of, see `Phase`.
        macs: multiply-adds of its largest task.
    """
    index = load_acquire(entry.phase_count)  # this thread's own: it holds the ring's lock
    phase = entry.phases[index]
    phase.kind = kind
    phase.per_task = per_task
    store_release(phase.total, 0)
    for pool in range(entry.job.pools):
        store_release(phase.tasks[pool], 0)
    task_ns = max(load_acquire(entry.task_ns), NS_PER_MAC * macs)
    store_release(entry.task_ns, task_ns)  # for whoever watches the pool, see `patience`
    store_release(entry.phase_count, index + 1)
    return phase


@driver
def add_tasks(phase: Phase, pool: int, count: int) -> None:
    # who reads these reads a claim word or the entry's number as well: `claim`, `phase_is_done`
    store_release(phase.tasks[pool], count)
    store_release(phase.total, load_acquire(phase.total) + count)


@driver
def append_phases(entry: Entry) -> None:
    """The phases of an expert layer: rows of tokens, rows of one expert (gate/up), rows of all. Or
    zeros, where no expert is active."""
    job = entry.job
    layer = job.layer
    blocks = layer.blocks
    strips = layer.strips
    store_release(entry.phase_count, 0)
    store_release(entry.task_ns, 0)
    if job.active == 0:
        per_task = ceil_div(2 * job.tokens * layer.hidden, SUMS_BYTES * job.workers)
        phase = append_phase(entry, ZERO, per_task, 0)
        add_tasks(phase, 0, job.workers)
        return
    if job.inline_encode == 0:
        phase = append_phase(entry, ENCODE, job.encode_tokens, 0)
        add_tasks(phase, 0, ceil_div(job.tokens, job.encode_tokens))

    most_blocks = 0
    most_strips = 0
    for p in range(job.pools):
        most_blocks = max(most_blocks, blocks[p + 1] - blocks[p])
        most_strips = max(most_strips, strips[p + 1] - strips[p])
    target = job.target_tasks
    per_task = share(most_blocks, ceil_div(target, max(1, job.active)))
    # 32 rows of gate and of up, for the tokens of one expert
    phase = append_phase(entry, GATE_UP, per_task, job.most * 64 * per_task * layer.hidden)
    for p in range(job.pools):
        add_tasks(phase, p, job.active * ceil_div(blocks[p + 1] - blocks[p], per_task))

    per_task = min(share(most_strips, target), MAX_STRIPS)
    # 64 rows, for all pairs of token and expert
    macs = job.tokens * job.top_k * STRIP_ROWS * per_task * layer.intermediate
    phase = append_phase(entry, DOWN, per_task, macs)
    for p in range(job.pools):
        add_tasks(phase, p, ceil_div(strips[p + 1] - strips[p], per_task))


@driver
def encode_tokens(job: Job, begin: int, end: int) -> None:
    """Encode input rows begin..end-1."""
    layer = job.layer
    x_bytes = 2 * layer.hidden
    row_bytes = layer.x_row_bytes
    call(
        layer.encode,
        job.x + begin * x_bytes,
        x_bytes,
        job.x_rows + begin * row_bytes,
        row_bytes,
        end - begin,
        layer.gate_up_strips.groups,
    )


@driver
def take_in(job: Job) -> None:
    """Encode the rows of x, or copy them where the workers are to encode them, so that the caller's
    memory is free when the job has been launched. Nobody needs them if no expert is active."""
    if job.active == 0:
        return
    if job.inline_encode != 0:
        before = set_float_environment()  # the caller's may flush subnormals
        encode_tokens(job, 0, job.tokens)
        restore_float_environment(before)
    elif job.x_copy != 0:
        x = i64.at(job.x)
        copy = i64.at(job.x_copy)
        for i in range(job.tokens * job.layer.hidden // 4):
            copy[i] = x[i]
        job.x = job.x_copy


@driver
def route(job: Job) -> int:
    """Group the pairs of a job and take in its inputs. Returns its missing."""
    count_pairs(job)
    place_pairs(job)
    if job.missing == 0:
        take_in(job)
    return job.missing
