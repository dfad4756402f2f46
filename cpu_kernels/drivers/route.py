"""Before a job is published: its inputs are taken in, and its phases are planned. Those of an
expert layer follow from routing: token x slot ids -> pairs grouped by expert."""

from __future__ import annotations

from hybrid_moe.cpu_kernels import tuning
from hybrid_moe.cpu_kernels.drivers.attention_tasks import attend_units, merge_units, unit_macs
from hybrid_moe.cpu_kernels.drivers.dense_tasks import encode_tiles, linear_macs, linear_strips
from hybrid_moe.cpu_kernels.drivers.intrinsics import (
    call,
    driver,
    fetch_add,
    load_acquire,
    restore_float_environment,
    set_float_environment,
    store_release,
)
from hybrid_moe.cpu_kernels.drivers.patience import NS_PER_MAC
from hybrid_moe.cpu_kernels.drivers.records import (
    ATTEND,
    COMBINE,
    DOWN,
    DOWN_BY_PAIR,
    ENCODE,
    GATE_UP,
    LINEAR,
    MERGE,
    ON_GPU,
    ZERO,
    Entry,
    Job,
    Phase,
)
from hybrid_moe.cpu_kernels.drivers.tiling import ceil_div, part
from hybrid_moe.cpu_kernels.jit.record import i64
from hybrid_moe.formats.strips import STRIP_ROWS, SUMS_BYTES

COMPUTED, SKIPPED, NOT_LOADED = 1, 0, -1


@driver
def expert_state(job: Job, expert: int) -> int:
    """Whether an expert's pairs are computed here, belong elsewhere, or cannot be computed."""
    if job.skip.address != 0 and job.skip[expert] != 0:
        return SKIPPED
    # pairs with the release of `publish.publish_word`
    strips = load_acquire(job.layer.packed[expert * job.pools].gate_up)
    return COMPUTED if strips != 0 else NOT_LOADED


@driver
def count_pairs(job: Job) -> None:
    """Pairs of each expert, and of all that the mask puts on the GPU; ids out of range are
    counted and contribute nothing.

    What is routed to each expert is added up over calls too, wherever the expert is: of a pair, 20
    cycles. Python reads it to see which experts are in use, also where graphs are replayed."""
    experts = job.layer.experts
    counts = job.counts
    routed = job.layer.routed
    for e in range(experts):
        counts[e] = 0
    ignored = 0
    missing = 0
    hot = 0
    for i in range(job.tokens * job.top_k):
        e = job.ids[i]
        if e < 0 or e >= experts:
            ignored += 1
            continue
        if routed.address != 0:
            fetch_add(routed[e], 1)  # nothing is handed over
        state = expert_state(job, e)
        if state == COMPUTED:
            counts[e] += 1
        elif state == NOT_LOADED:
            missing = e + 1
        elif job.skip[e] == ON_GPU:
            hot += 1
    job.hot = hot
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
    job.pairs = start

    top_k = job.top_k
    x_rows, x_bytes = job.x_rows, job.layer.gate_up.row_bytes
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


encode_tasks = driver(tuning.encode_tasks)
expert_tasks = driver(tuning.expert_tasks)
row_tasks = driver(tuning.row_tasks)
attention_tasks = driver(tuning.attention_tasks)


@driver
def append_phase(entry: Entry, kind: int) -> Phase:
    """A phase behind those that the job has, without tasks as yet."""
    index = load_acquire(entry.phase_count)  # this thread's own: it holds the ring's lock
    phase = entry.phases[index]
    phase.kind = kind
    store_release(phase.total, 0)
    for pool in range(entry.job.pools):
        store_release(phase.tasks[pool], 0)
    store_release(entry.phase_count, index + 1)
    return phase


@driver
def add_tasks(entry: Entry, phase: Phase, pool: int, units: int, tasks: int, macs: int) -> None:
    """Tasks that share units of work evenly, each of at most so many multiply-adds."""
    if tasks == 0:
        return
    phase.units[pool] = units
    # readers check a claim word (`claim`) or the sequence number (`phase_is_done`) as well
    store_release(phase.tasks[pool], tasks)
    store_release(phase.total, load_acquire(phase.total) + tasks)
    task_ns = NS_PER_MAC * macs * ceil_div(units, tasks)  # see `patience`
    store_release(entry.task_ns, max(load_acquire(entry.task_ns), task_ns))


@driver
def append_encode(entry: Entry) -> None:
    """The phase that encodes the inputs, unless that is done."""
    job = entry.job
    if job.inline_encode == 0:
        phase = append_phase(entry, ENCODE)
        add_tasks(entry, phase, 0, job.tokens, encode_tasks(job.tokens, job.layer.workers[0]), 0)


@driver
def append_linear(entry: Entry) -> None:
    """The phases of a dense layer, whose matrices are to a task what one active expert is."""
    job = entry.job
    append_encode(entry)
    phase = append_phase(entry, LINEAR)
    for p in range(job.pools):
        strips = linear_strips(job, p)
        tasks = expert_tasks(1, strips, job.tokens, job.layer.workers[p])
        add_tasks(entry, phase, p, strips, tasks, linear_macs(job))


@driver
def append_attention(entry: Entry) -> None:
    """The phases of an attention job."""
    job = entry.job
    attention = job.attention
    workers = attention.workers
    phase = append_phase(entry, ATTEND)
    units = attend_units(attention)
    for p in range(job.pools):
        share = part(units, job.pools, p + 1) - part(units, job.pools, p)
        add_tasks(entry, phase, p, share, attention_tasks(share, workers[p]), unit_macs(attention))
    if attention.splits == 1:
        return
    phase = append_phase(entry, MERGE)
    units = merge_units(attention)
    macs = attention.splits * attention.value_dim
    for p in range(job.pools):
        share = part(units, job.pools, p + 1) - part(units, job.pools, p)
        add_tasks(entry, phase, p, share, min(share, workers[p]), macs)


@driver
def append_phases(entry: Entry) -> None:
    """The phases of a job, see `phases` for what each does and `tuning` for its tasks."""
    store_release(entry.phase_count, 0)
    store_release(entry.task_ns, 0)
    if entry.job.attention.address != 0:
        append_attention(entry)
    elif entry.job.layer.matrices != 0:
        append_linear(entry)
    else:
        append_expert_phases(entry)


@driver
def append_expert_phases(entry: Entry) -> None:
    """The phases of an expert layer."""
    job = entry.job
    layer = job.layer
    active, pairs, workers = job.active, job.pairs, layer.workers
    fetch_add(layer.hot, job.hot)  # for Python's figures; nothing is handed over
    fetch_add(layer.cold, pairs)
    fetch_add(layer.launches, 1)
    fetch_add(layer.tokens, job.tokens)
    fetch_add(layer.read_experts, active)
    if active == 0:
        units = ceil_div(job.out_size * job.tokens * layer.hidden, SUMS_BYTES)
        # a task even where there are no tokens: the last one to end is what completes a job
        tasks = max(1, min(units, workers[0]))
        add_tasks(entry, append_phase(entry, ZERO), 0, units, tasks, 0)
        return
    append_encode(entry)

    phase = append_phase(entry, GATE_UP)
    macs = STRIP_ROWS * job.most * layer.hidden
    for p in range(job.pools):
        strips = layer.blocks[p + 1] - layer.blocks[p]
        tasks = expert_tasks(active, strips, pairs, workers[p])
        add_tasks(entry, phase, p, active * strips, tasks, macs)

    if job.pair_rows != 0 and job.tokens <= tuning.PAIR_TOKENS:
        phase = append_phase(entry, DOWN_BY_PAIR)
        macs = STRIP_ROWS * job.most * layer.intermediate
        for p in range(job.pools):
            strips = layer.strips[p + 1] - layer.strips[p]
            tasks = expert_tasks(active, strips, pairs, workers[p])
            add_tasks(entry, phase, p, active * strips, tasks, macs)
        phase = append_phase(entry, COMBINE)
        for p in range(job.pools):
            strips = layer.strips[p + 1] - layer.strips[p]
            add_tasks(entry, phase, p, strips, min(strips, workers[p]), STRIP_ROWS * pairs)
    else:
        phase = append_phase(entry, DOWN)
        macs = STRIP_ROWS * pairs * layer.intermediate
        for p in range(job.pools):
            strips = layer.strips[p + 1] - layer.strips[p]
            tasks = row_tasks(active, strips, pairs, job.tokens, workers[p])
            add_tasks(entry, phase, p, strips, tasks, macs)


@driver
def encode_tokens(job: Job, begin: int, end: int) -> None:
    """Encode input rows begin..end-1."""
    layer = job.layer
    if layer.matrices != 0:
        encode_tiles(job, begin, end)
        return
    x_bytes = 2 * layer.hidden
    products = layer.gate_up
    row_bytes = products.row_bytes
    call(
        layer.encode,
        job.x + begin * x_bytes,
        x_bytes,
        job.x_rows + begin * row_bytes,
        row_bytes,
        end - begin,
        products.strips.groups,
        products.encoded_bytes,
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
    """Group the pairs of a job and take in its inputs. Returns 1 + an expert that is neither loaded
    nor skipped, or 0. A dense layer has nothing to route: its job says that one "expert" is
    active."""
    if job.attention.address != 0:
        return 0
    if job.layer.matrices == 0:
        count_pairs(job)
        place_pairs(job)
    if job.missing == 0:
        take_in(job)
    return job.missing
