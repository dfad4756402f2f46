"""The three phases of a layer, one task at a time.

    encode    input rows -> encoded rows                                    (large batches only)
    gate/up   block of 32 intermediate rows of one expert -> encoded rows of h, all its tokens
    down      strips of 32 hidden rows, all experts in ascending id -> output, all tokens

A down task owns its output rows, so experts are summed without conflicts and no buffer of
tokens x k x hidden exists. Between phases all tasks must be finished: two barriers a layer.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.drivers.intrinsics import (
    call2,
    call3,
    call4,
    call6,
    call8,
    call9,
    driver,
    load32,
    load64,
)
from hybrid_moe.cpu_kernels.drivers.route import encode_tokens, get


@driver
def dot_tokens(
    kernels: int,
    codes: int,
    scales: int,
    rows: int,
    count: int,
    sums: int,
    begin: int,
    end: int,
    groups: int,
) -> None:
    """Dot `count` rows by the largest kernels that fit, from a table in descending order."""
    done = 0
    kernel = kernels
    while done < count:
        if count - done < get(kernel, f.DOT_LEAST):
            kernel += 8 * f.DOT_SLOTS
            continue
        tokens = min(count - done, get(kernel, f.DOT_MOST))
        call8(
            get(kernel, f.DOT_ADDRESS),
            codes,
            scales,
            rows + 8 * done,
            tokens,
            sums + 128 * done,
            begin,
            end,
            groups,
        )
        done += tokens


@driver
def dot_strips(
    layer: int,
    layout: int,
    strip: int,
    strips: int,
    rows: int,
    count: int,
    sums: int,
    sums_bytes: int,
    unpacked: int,
) -> None:
    """sums[s] [count][32] = strip s x rows, for `strips` neighbouring strips.

    Few tokens read the codes as they stream from memory, one strip after the other. Many take a
    chunk of K at a time: its codes are unpacked once into the cache, and a tile of tokens meets
    all strips before the next tile, so that the tokens too are read once for all strips.
    """
    groups = get(layer, layout + f.LAYOUT_GROUPS)
    code_bytes = get(layer, layout + f.LAYOUT_CODE_BYTES)
    scale_bytes = get(layer, layout + f.LAYOUT_SCALE_BYTES)
    scale_offset = get(layer, layout + f.LAYOUT_SCALE_OFFSET)
    strip_bytes = get(layer, layout + f.LAYOUT_STRIP_BYTES)
    if count <= get(layer, f.L_DIRECT_LIMIT):
        kernels = layer + 8 * f.L_DIRECT
        for s in range(strips):
            codes = strip + s * strip_bytes
            scales = codes + scale_offset
            dot_tokens(
                kernels, codes, scales, rows, count, sums + s * sums_bytes, 0, groups, groups
            )
        return
    kernels = layer + 8 * f.L_TILED
    tile = get(kernels, f.DOT_MOST)
    unpack = get(layer, f.L_UNPACK)
    chunk = get(layer, f.L_CHUNK_GROUPS)
    chunk_bytes = chunk * get(layer, f.L_CHUNK_GROUP_BYTES)
    begin = 0
    while begin < groups:
        end = min(groups, begin + chunk)
        if unpack != 0:
            for s in range(strips):
                codes = strip + s * strip_bytes + begin * code_bytes
                call3(unpack, codes, unpacked + s * chunk_bytes, end - begin)
        first = 0
        while first < count:
            tokens = min(tile, count - first)
            for s in range(strips):
                codes = strip + s * strip_bytes + begin * code_bytes
                scales = strip + s * strip_bytes + scale_offset + begin * scale_bytes
                if unpack != 0:
                    codes = unpacked + s * chunk_bytes
                dot_tokens(
                    kernels,
                    codes,
                    scales,
                    rows + 8 * first,
                    tokens,
                    sums + s * sums_bytes + 128 * first,
                    begin,
                    end,
                    groups,
                )
            first += tokens
        begin = end


@driver
def gate_up_task(job: int, layer: int, pool: int, task: int, scratch: int) -> None:
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
    strip_bytes = get(layer, f.L_GU_LAYOUT + f.LAYOUT_STRIP_BYTES)
    gate_bias = load64(get(layer, f.L_GATE_BIAS) + 8 * expert)
    up_bias = load64(get(layer, f.L_UP_BIAS) + 8 * expert)
    rows = get(job, f.J_PAIR_X) + 8 * start
    h_rows = get(job, f.J_PAIR_H) + 8 * start
    sums = scratch + get(job, f.J_SCRATCH_SUMS)
    sums_bytes = get(job, f.J_SUMS_BYTES)
    unpacked = scratch + get(job, f.J_SCRATCH_UNPACKED)
    block = begin
    while block < end:
        blocks = min(f.MAX_STRIPS // 2, end - block)
        strip = base + 2 * (block - first_block) * strip_bytes
        dot_strips(layer, f.L_GU_LAYOUT, strip, 2 * blocks, rows, count, sums, sums_bytes, unpacked)
        for b in range(blocks):
            call9(
                get(layer, f.L_ACTIVATE),
                sums + 2 * b * sums_bytes,
                sums + (2 * b + 1) * sums_bytes,
                count,
                h_rows,
                block + b,
                get(layer, f.L_DN_LAYOUT + f.LAYOUT_GROUPS),
                gate_bias + 128 * (block + b),
                up_bias + 128 * (block + b),
                get(layer, f.L_PARAMETERS),
            )
        block += blocks


@driver
def down_task(job: int, layer: int, pool: int, task: int, scratch: int) -> None:
    first_strip = load64(get(layer, f.L_STRIPS) + 8 * pool)
    last_strip = load64(get(layer, f.L_STRIPS) + 8 * (pool + 1))
    per_task = get(job, f.J_STRIPS_PER_TASK)
    begin = first_strip + task * per_task
    end = min(last_strip, begin + per_task)
    tokens = get(job, f.J_TOKENS)
    experts = get(layer, f.L_EXPERTS)
    strip_bytes = get(layer, f.L_DN_LAYOUT + f.LAYOUT_STRIP_BYTES)
    sums = scratch + get(job, f.J_SCRATCH_SUMS)
    sums_bytes = get(job, f.J_SUMS_BYTES)
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
        codes = base + (begin - first_strip) * strip_bytes
        dot_strips(
            layer, f.L_DN_LAYOUT, codes, end - begin, rows, count, sums, sums_bytes, unpacked
        )
        for strip in range(begin, end):
            call6(
                get(layer, f.L_COMBINE),
                sums + (strip - begin) * sums_bytes,
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
def run_task(job: int, phase: int, pool: int, task: int, worker: int) -> None:
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
