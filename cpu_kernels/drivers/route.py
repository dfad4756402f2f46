"""Routing: token x slot ids -> pairs grouped by expert, and the sizes of each phase."""

from __future__ import annotations

from hybrid_moe.cpu_kernels import tuning
from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.drivers.intrinsics import (
    call6,
    driver,
    load8,
    load32,
    load64,
    load_acquire,
    restore_float_environment,
    set_float_environment,
    store32,
    store64,
)


@driver
def get(base: int, slot: int) -> int:
    return load64(base + 8 * slot)


@driver
def put(base: int, slot: int, value: int) -> None:
    store64(base + 8 * slot, value)


@driver
def is_here(job: int, layer: int, expert: int) -> int:
    """1 if the expert's pairs are computed here, 0 if they are skipped, -1 if it is not loaded.

    Pool 0's gate and up are what `ExpertLayer.load` publishes last: who finds them finds the rest.
    """
    skip = get(job, f.J_SKIP)
    if skip != 0 and load8(skip + expert) != 0:
        return 0
    return 1 if load_acquire(get(layer, f.L_GATE_UP) + 8 * expert) != 0 else -1


@driver
def count_pairs(job: int, layer: int) -> None:
    """Pairs of each expert; ids out of range are counted and contribute nothing."""
    experts = get(layer, f.L_EXPERTS)
    counts = get(job, f.J_COUNTS)
    ids = get(job, f.J_IDS)
    total = get(job, f.J_TOKENS) * get(job, f.J_TOP_K)
    for e in range(experts):
        store32(counts + 4 * e, 0)
    ignored = 0
    missing = 0
    for i in range(total):
        e = load64(ids + 8 * i)
        if e < 0 or e >= experts:
            ignored += 1
            continue
        here = is_here(job, layer, e)
        if here > 0:
            store32(counts + 4 * e, load32(counts + 4 * e) + 1)
        elif here < 0:
            missing = e + 1
    put(job, f.J_IGNORED, ignored)
    put(job, f.J_MISSING, missing)


@driver
def place_pairs(job: int, layer: int) -> None:
    """Group pairs by ascending expert; within one, by token, then slot."""
    experts = get(layer, f.L_EXPERTS)
    counts = get(job, f.J_COUNTS)
    active = 0
    start = 0
    most = 0
    for e in range(experts):
        n = load32(counts + 4 * e)
        if n > 0:
            store32(get(job, f.J_ACTIVE_EXPERT) + 4 * active, e)
            store32(get(job, f.J_ACTIVE_START) + 4 * active, start)
            store32(counts + 4 * e, start)  # now: where the expert's next pair goes
            start += n
            active += 1
            most = max(most, n)
        else:
            store32(counts + 4 * e, -1)
    store32(get(job, f.J_ACTIVE_START) + 4 * active, start)
    put(job, f.J_ACTIVE, active)
    put(job, f.J_MOST, most)

    ids = get(job, f.J_IDS)
    weights = get(job, f.J_WEIGHTS)
    top_k = get(job, f.J_TOP_K)
    x_rows, x_bytes = get(job, f.J_X_ROWS), get(layer, f.L_X_ROW_BYTES)
    for t in range(get(job, f.J_TOKENS)):
        for slot in range(top_k):
            i = t * top_k + slot
            e = load64(ids + 8 * i)
            if e < 0 or e >= experts:
                continue
            pair = load32(counts + 4 * e)
            if pair < 0:
                continue
            store32(counts + 4 * e, pair + 1)
            store32(get(job, f.J_PAIR_TOKEN) + 4 * pair, t)
            store32(get(job, f.J_PAIR_WEIGHT) + 4 * pair, load32(weights + 4 * i))
            store64(get(job, f.J_PAIR_X) + 8 * pair, x_rows + t * x_bytes)


encode_tasks = driver(tuning.encode_tasks)
expert_tasks = driver(tuning.expert_tasks)
row_tasks = driver(tuning.row_tasks)


@driver
def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


@driver
def units_of(firsts: int, pool: int) -> int:
    """Strips of a pool, by the first of each pool."""
    return load64(firsts + 8 * (pool + 1)) - load64(firsts + 8 * pool)


@driver
def size_phases(job: int, layer: int) -> None:
    """Tasks of each phase and pool, see `tuning`. Each task has an even part of the phase's units:

    encode   tokens
    gate/up  strips of all active experts, in ascending id
    down     strips, each of all experts and finished; or of all active experts, as in gate/up,
    combine  and strips to finish
    """
    active = get(job, f.J_ACTIVE)
    tokens = get(job, f.J_TOKENS)
    pairs = load32(get(job, f.J_ACTIVE_START) + 4 * active)
    workers = get(job, f.J_POOL_WORKERS)
    by_pair = get(job, f.J_PAIR_ROWS) != 0 and tokens <= tuning.PAIR_TOKENS
    put(job, f.J_LAST_PHASE, f.PHASE_COMBINE if by_pair else f.PHASE_DOWN)
    for phase in range(f.PHASES):
        total = 0
        for p in range(get(job, f.J_POOLS)):
            blocks = units_of(get(layer, f.L_BLOCKS), p)
            strips = units_of(get(layer, f.L_STRIPS), p)
            n = 0
            if phase == f.PHASE_ENCODE:
                if p == 0 and get(job, f.J_INLINE_ENCODE) == 0:
                    n = encode_tasks(tokens, workers)
            elif phase == f.PHASE_GATE_UP:
                n = expert_tasks(active, blocks, pairs, workers)
            elif phase == f.PHASE_DOWN:
                if by_pair:
                    n = expert_tasks(active, strips, pairs, workers)
                else:
                    n = row_tasks(active, strips, pairs, tokens, workers)
            elif by_pair:
                n = min(strips, workers)
            put(job, f.J_TASKS + phase * f.MAX_POOLS + p, n)
            total += n
        put(job, f.J_TOTAL + phase, total)


@driver
def encode_tokens(job: int, layer: int, begin: int, end: int) -> None:
    """Encode input rows begin..end-1."""
    x_bytes = 2 * get(layer, f.L_HIDDEN)
    row_bytes = get(layer, f.L_X_ROW_BYTES)
    call6(
        get(layer, f.L_ENCODE),
        get(job, f.J_X) + begin * x_bytes,
        x_bytes,
        get(job, f.J_X_ROWS) + begin * row_bytes,
        row_bytes,
        end - begin,
        get(layer, f.L_GU_LAYOUT + f.LAYOUT_GROUPS),
    )


@driver
def prepare(job: int) -> int:
    """Route a job and size its phases; a small one is encoded here too. Returns its missing."""
    layer = get(job, f.J_LAYER)
    count_pairs(job, layer)
    place_pairs(job, layer)
    size_phases(job, layer)
    if get(job, f.J_INLINE_ENCODE) != 0:
        before = set_float_environment()  # the caller's may flush subnormals
        encode_tokens(job, layer, 0, get(job, f.J_TOKENS))
        restore_float_environment(before)
    return get(job, f.J_MISSING)
