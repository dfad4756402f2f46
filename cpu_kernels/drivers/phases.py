"""The three phases of a layer, one task at a time.

    encode    input rows -> encoded rows                                    (large batches only)
    gate/up   block of 32 intermediate rows of one expert -> encoded rows of h, all its tokens
    down      strips of 32 hidden rows, all experts in ascending id -> output, all tokens

A down task owns its output rows, so experts are summed without conflicts and no buffer of
tokens x k x hidden exists. Between phases all tasks must be finished: two barriers a layer.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.drivers.memory import (
    call2,
    call3,
    call4,
    call6,
    call7,
    call9,
    driver,
    load32,
    load64,
)
from hybrid_moe.cpu_kernels.drivers.route import encode_tokens, get


@driver
def dot_tokens(kernels, codes, scales, rows, count, sums, begin, end, groups):  # type: ignore[no-untyped-def]
    """Dot `count` rows by the largest kernels that fit; `kernels` is a descending (M, address)."""
    done = 0
    size = 0
    while done < count:
        tokens = load64(kernels + 16 * size)
        if count - done < tokens:
            size += 1
            continue
        call7(
            load64(kernels + 16 * size + 8),
            codes,
            scales,
            rows + 8 * done,
            sums + 128 * done,
            begin,
            end,
            groups,
        )
        done += tokens


@driver
def dot_strip(layer, layout, strip, rows, count, sums, unpacked):  # type: ignore[no-untyped-def]
    """sums [count][32] = strip x rows. Few tokens read the codes as they stream from memory; many
    take a chunk of K at a time, unpacked once into the cache and used by every token."""
    groups = get(layer, layout)
    code_bytes = get(layer, layout + 1)
    scale_bytes = get(layer, layout + 2)
    scales = strip + get(layer, layout + 3)
    if count <= get(layer, f.L_DIRECT_LIMIT):
        kernels = layer + 8 * f.L_DIRECT
        dot_tokens(kernels, strip, scales, rows, count, sums, 0, groups, groups)
        return
    kernels = layer + 8 * f.L_TILED
    unpack = get(layer, f.L_UNPACK)
    chunk = get(layer, f.L_CHUNK_GROUPS)
    begin = 0
    while begin < groups:
        end = min(groups, begin + chunk)
        codes = strip + begin * code_bytes
        if unpack != 0:
            call3(unpack, codes, unpacked, end - begin)
            codes = unpacked
        at = scales + begin * scale_bytes
        dot_tokens(kernels, codes, at, rows, count, sums, begin, end, groups)
        begin = end


@driver
def gate_up_task(job, layer, pool, task, scratch):  # type: ignore[no-untyped-def]
    first_block = load64(get(layer, f.L_BLOCKS) + 8 * pool)
    last_block = load64(get(layer, f.L_BLOCKS) + 8 * (pool + 1))
    per_task = get(job, f.J_BLOCKS_PER_TASK)
    tasks_per_expert = (last_block - first_block + per_task - 1) // per_task
    index = task // tasks_per_expert
    begin = first_block + (task - index * tasks_per_expert) * per_task
    end = min(last_block, begin + per_task)

    expert = load32(get(job, f.J_ACTIVE_EXPERT) + 4 * index)
    start = load32(get(job, f.J_ACTIVE_START) + 4 * index)
    count = load32(get(job, f.J_ACTIVE_START) + 4 * index + 4) - start
    experts = get(layer, f.L_EXPERTS)
    base = load64(get(layer, f.L_GATE_UP) + 8 * (pool * experts + expert))
    strip_bytes = get(layer, f.L_GU_STRIP_BYTES)
    gate_bias = load64(get(layer, f.L_GATE_BIAS) + 8 * expert)
    up_bias = load64(get(layer, f.L_UP_BIAS) + 8 * expert)
    rows = get(job, f.J_PAIR_X) + 8 * start
    h_rows = get(job, f.J_PAIR_H) + 8 * start
    sums0 = scratch + get(job, f.J_SCRATCH_SUMS)
    sums1 = scratch + get(job, f.J_SCRATCH_SUMS2)
    unpacked = scratch + get(job, f.J_SCRATCH_UNPACKED)
    for block in range(begin, end):
        strip = base + 2 * (block - first_block) * strip_bytes
        dot_strip(layer, f.L_GU_GROUPS, strip, rows, count, sums0, unpacked)
        dot_strip(layer, f.L_GU_GROUPS, strip + strip_bytes, rows, count, sums1, unpacked)
        call9(
            get(layer, f.L_ACTIVATE),
            sums0,
            sums1,
            count,
            h_rows,
            block,
            get(layer, f.L_DN_GROUPS),
            gate_bias + 128 * block,
            up_bias + 128 * block,
            get(layer, f.L_PARAMETERS),
        )


@driver
def down_task(job, layer, pool, task, scratch):  # type: ignore[no-untyped-def]
    first_strip = load64(get(layer, f.L_STRIPS) + 8 * pool)
    last_strip = load64(get(layer, f.L_STRIPS) + 8 * (pool + 1))
    per_task = get(job, f.J_STRIPS_PER_TASK)
    begin = first_strip + task * per_task
    end = min(last_strip, begin + per_task)
    tokens = get(job, f.J_TOKENS)
    experts = get(layer, f.L_EXPERTS)
    strip_bytes = get(layer, f.L_DN_STRIP_BYTES)
    sums = scratch + get(job, f.J_SCRATCH_SUMS)
    unpacked = scratch + get(job, f.J_SCRATCH_UNPACKED)
    out = scratch + get(job, f.J_SCRATCH_OUT)
    call2(get(layer, f.L_CLEAR), out, tokens * (end - begin))
    for index in range(get(job, f.J_ACTIVE)):
        expert = load32(get(job, f.J_ACTIVE_EXPERT) + 4 * index)
        start = load32(get(job, f.J_ACTIVE_START) + 4 * index)
        count = load32(get(job, f.J_ACTIVE_START) + 4 * index + 4) - start
        base = load64(get(layer, f.L_DOWN) + 8 * (pool * experts + expert))
        bias = load64(get(layer, f.L_DOWN_BIAS) + 8 * expert)
        rows = get(job, f.J_PAIR_H) + 8 * start
        for strip in range(begin, end):
            codes = base + (strip - first_strip) * strip_bytes
            dot_strip(layer, f.L_DN_GROUPS, codes, rows, count, sums, unpacked)
            call6(
                get(layer, f.L_COMBINE),
                sums,
                count,
                get(job, f.J_PAIR_TOKEN) + 4 * start,
                get(job, f.J_PAIR_WEIGHT) + 4 * start,
                out + 128 * tokens * (strip - begin),
                bias + 128 * strip,
            )
    hidden_bytes = 2 * get(layer, f.L_HIDDEN)
    for strip in range(begin, end):
        call4(
            get(layer, f.L_FINISH),
            out + 128 * tokens * (strip - begin),
            tokens,
            get(job, f.J_OUT) + 64 * strip,
            hidden_bytes,
        )


@driver
def run_task(job, phase, pool, task, worker):  # type: ignore[no-untyped-def]
    layer = get(job, f.J_LAYER)
    scratch = get(job, f.J_SCRATCH) + worker * get(job, f.J_SCRATCH_BYTES)
    if phase == f.PHASE_ENCODE:
        per_task = get(job, f.J_ENCODE_TOKENS)
        begin = task * per_task
        encode_tokens(job, layer, begin, min(get(job, f.J_TOKENS), begin + per_task))
    elif phase == f.PHASE_GATE_UP:
        gate_up_task(job, layer, pool, task, scratch)
    else:
        down_task(job, layer, pool, task, scratch)
