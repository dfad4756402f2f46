"""The three phases of a layer, one task at a time.

    encode    input rows -> encoded rows                                    (large batches only)
    gate/up   block of 32 intermediate rows of one expert -> encoded rows of h, all its tokens
    down      strips of 32 hidden rows, all experts in ascending id -> output, all tokens

A down task owns its output rows, so experts are summed without conflicts and no buffer of
tokens x k x hidden exists. Between phases all tasks must be finished: two barriers a layer.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import call, driver, load_acquire
from hybrid_moe.cpu_kernels.drivers.records import (
    DOWN,
    ENCODE,
    GATE_UP,
    MAX_STRIPS,
    DotKernel,
    Entry,
    Layer,
    Phase,
    StripSizes,
)
from hybrid_moe.cpu_kernels.drivers.route import encode_tokens
from hybrid_moe.cpu_kernels.jit.records import Array


@driver
def dot_tokens(
    kernels: Array[DotKernel],
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
    index = 0
    while done < count:
        dot = kernels[index]
        if count - done < dot.least:
            index += 1
            continue
        tokens = min(count - done, dot.most)
        call(
            dot.kernel,
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
    layer: Layer,
    sizes: StripSizes,
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
    groups = sizes.groups
    strip_bytes = sizes.strip_bytes
    if count <= layer.direct_limit:
        for s in range(strips):
            codes = strip + s * strip_bytes
            scales = codes + sizes.scale_offset
            dot_tokens(
                layer.direct, codes, scales, rows, count, sums + s * sums_bytes, 0, groups, groups
            )
        return
    tile = layer.tiled[0].most
    unpack = layer.unpack
    chunk = layer.chunk_groups
    chunk_bytes = chunk * layer.chunk_group_bytes
    begin = 0
    while begin < groups:
        end = min(groups, begin + chunk)
        if unpack != 0:
            for s in range(strips):
                codes = strip + s * strip_bytes + begin * sizes.code_bytes
                call(unpack, codes, unpacked + s * chunk_bytes, end - begin)
        first = 0
        while first < count:
            tokens = min(tile, count - first)
            for s in range(strips):
                codes = strip + s * strip_bytes + begin * sizes.code_bytes
                scales = strip + s * strip_bytes + sizes.scale_offset + begin * sizes.scale_bytes
                if unpack != 0:
                    codes = unpacked + s * chunk_bytes
                dot_tokens(
                    layer.tiled,
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
def gate_up_task(entry: Entry, phase: Phase, pool: int, task: int, scratch: int) -> None:
    job = entry.job
    layer = job.layer
    first_block = layer.blocks[pool]
    last_block = layer.blocks[pool + 1]
    per_task = phase.per_task
    tasks_per_expert = (last_block - first_block + per_task - 1) // per_task
    index = task // tasks_per_expert
    begin = first_block + (task - index * tasks_per_expert) * per_task
    end = min(last_block, begin + per_task)

    expert = job.active_expert[index]
    start = job.active_start[index]
    count = job.active_start[index + 1] - start
    base = load_acquire(layer.gate_up[pool * layer.experts + expert])
    sizes = layer.gate_up_strips
    rows = job.pair_x.address + 8 * start
    h_rows = job.pair_h.address + 8 * start
    sums_bytes = job.sums_bytes
    unpacked = scratch + job.unpacked_offset
    block = begin
    while block < end:
        blocks = min(MAX_STRIPS // 2, end - block)
        strip = base + 2 * (block - first_block) * sizes.strip_bytes
        dot_strips(layer, sizes, strip, 2 * blocks, rows, count, scratch, sums_bytes, unpacked)
        for b in range(blocks):
            call(
                layer.activate,
                scratch + 2 * b * sums_bytes,
                scratch + (2 * b + 1) * sums_bytes,
                count,
                h_rows,
                block + b,
                layer.down_strips.groups,
                layer.gate_bias[expert] + 128 * (block + b),
                layer.up_bias[expert] + 128 * (block + b),
                layer.parameters,
            )
        block += blocks


@driver
def down_task(entry: Entry, phase: Phase, pool: int, task: int, scratch: int) -> None:
    job = entry.job
    layer = job.layer
    first_strip = layer.strips[pool]
    last_strip = layer.strips[pool + 1]
    begin = first_strip + task * phase.per_task
    end = min(last_strip, begin + phase.per_task)
    tokens = job.tokens
    sizes = layer.down_strips
    sums_bytes = job.sums_bytes
    unpacked = scratch + job.unpacked_offset
    out = scratch + job.out_rows_offset
    call(layer.clear, out, tokens * (end - begin))
    for index in range(entry.active):
        expert = job.active_expert[index]
        start = job.active_start[index]
        count = job.active_start[index + 1] - start
        rows = job.pair_h.address + 8 * start
        base = layer.down[pool * layer.experts + expert]
        codes = base + (begin - first_strip) * sizes.strip_bytes
        dot_strips(layer, sizes, codes, end - begin, rows, count, scratch, sums_bytes, unpacked)
        for strip in range(begin, end):
            call(
                layer.combine,
                scratch + (strip - begin) * sums_bytes,
                count,
                job.pair_token.address + 4 * start,
                job.pair_weight.address + 4 * start,
                out + 128 * tokens * (strip - begin),
                layer.down_bias[expert] + 128 * strip,
            )
    for strip in range(begin, end):
        call(
            layer.finish,
            out + 128 * tokens * (strip - begin),
            tokens,
            # pairs with the release in `host.withdraw`: a job that is given up writes elsewhere
            load_acquire(job.out) + 64 * strip,
            2 * layer.hidden,
        )


@driver
def run_task(entry: Entry, phase: Phase, pool: int, task: int, worker: int) -> None:
    job = entry.job
    scratch = job.scratch + worker * job.scratch_bytes
    if phase.kind == ENCODE:
        begin = task * phase.per_task
        encode_tokens(job, begin, min(job.tokens, begin + phase.per_task))
    elif phase.kind == GATE_UP:
        gate_up_task(entry, phase, pool, task, scratch)
    elif phase.kind == DOWN:
        down_task(entry, phase, pool, task, scratch)
