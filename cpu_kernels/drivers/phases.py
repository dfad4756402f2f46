"""The three phases of a layer, one task at a time.

    encode    input rows -> encoded rows                                    (large batches only)
    gate/up   strips of 32 intermediate rows of one expert -> encoded h of all its tokens, in tiles
    down      strips of 64 hidden rows, all experts in ascending id -> output, all tokens

A down task owns its output rows, so experts are summed without conflicts and no buffer of
tokens x k x hidden exists. Between phases all tasks must be finished: two barriers a layer.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.drivers.intrinsics import (
    call2,
    call3,
    call4,
    call5,
    call6,
    call7,
    driver,
    load32,
    load64,
)
from hybrid_moe.cpu_kernels.drivers.route import ceil_div, encode_tokens, get
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS, SUMS_BYTES


@driver
def part(total: int, parts: int, index: int) -> int:
    """Where part `index` of `parts` nearly equal ones begins."""
    return total * index // parts


@driver
def tiling_of(layer: int, count: int) -> int:
    """How `count` tokens of one expert are cut into tiles, see `library.Tiling`."""
    slot = f.L_DIRECT if count < get(layer, f.L_TILED_FROM) else f.L_TILED
    return layer + 8 * slot


@driver
def tiles_of(tiling: int, count: int) -> int:
    return ceil_div(count, get(tiling, f.TILES_MOST))


@driver
def tile_start(tiling: int, count: int, index: int) -> int:
    """First token of a tile, or `count` for the index past the last."""
    unit = get(tiling, f.TILES_UNIT)
    units = ceil_div(count, unit)
    return min(count, unit * part(units, tiles_of(tiling, count), index))


@driver
def dot_tiles(
    layer: int, layout: int, codes: int, x: int, count: int, sums: int, unpacked: int
) -> None:
    """sums [count][64] = one strip x the tiles of `count` encoded tokens at `x`.

    One tile reads the codes as they stream from memory. Several take a chunk of K at a time, which
    comes from memory once and meets every tile while it is in the cache, unpacked first if that
    pays; and each tile fetches a share of the chunk that follows.
    """
    groups = get(layer, layout + f.LAYOUT_GROUPS)
    group_bytes = get(layer, layout + f.LAYOUT_GROUP_BYTES)
    row_bytes = groups * get(layer, f.L_ENCODED_BYTES)
    tiling = tiling_of(layer, count)
    tiles = tiles_of(tiling, count)
    unpack = get(tiling, f.TILES_UNPACK)
    chunk = groups
    if tiles > 1 or unpack != 0:
        chunk = get(tiling, f.TILES_GROUPS)
    begin = 0
    while begin < groups:
        end = min(groups, begin + chunk)
        at = codes + begin * group_bytes
        after = codes + end * group_bytes
        if unpack != 0:
            call3(unpack, at, unpacked, end - begin)
            at = unpacked
        for i in range(tiles):
            first = tile_start(tiling, count, i)
            tokens = tile_start(tiling, count, i + 1) - first
            call7(
                get(tiling, f.TILES_KERNELS + tokens - 1),
                at,
                after + (i * f.SHARE_BYTES) % (chunk * group_bytes),
                x + first * row_bytes,
                tokens,
                sums + first * SUMS_BYTES,
                begin,
                end,
            )
        begin = end


@driver
def gather_tiles(layer: int, rows: int, count: int, out: int) -> None:
    """The encoded inputs at addresses rows[count] -> tiles."""
    tiling = tiling_of(layer, count)
    for i in range(tiles_of(tiling, count)):
        first = tile_start(tiling, count, i)
        tokens = tile_start(tiling, count, i + 1) - first
        call4(
            get(layer, f.L_GATHER),
            rows + 8 * first,
            tokens,
            out + first * get(layer, f.L_X_ROW_BYTES),
            get(layer, f.L_GU_LAYOUT + f.LAYOUT_GROUPS),
        )


@driver
def activate_tiles(
    layer: int, sums: int, count: int, h: int, block: int, gate_bias: int, up_bias: int
) -> None:
    """One strip's gates and ups -> group `block` of the tiles of h."""
    tiling = tiling_of(layer, count)
    for i in range(tiles_of(tiling, count)):
        first = tile_start(tiling, count, i)
        tokens = tile_start(tiling, count, i + 1) - first
        tile = h + first * get(layer, f.L_H_ROW_BYTES)
        call6(
            get(layer, f.L_ACTIVATE),
            sums + first * SUMS_BYTES,
            tokens,
            tile + block * tokens * get(layer, f.L_ENCODED_BYTES),
            gate_bias,
            up_bias,
            get(layer, f.L_PARAMETERS),
        )


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
    sums = scratch + get(job, f.J_SCRATCH_SUMS)
    unpacked = scratch + get(job, f.J_SCRATCH_UNPACKED)
    batches = ceil_div(count, f.BATCH_TOKENS)
    for b in range(batches):
        first = part(count, batches, b)
        tokens = part(count, batches, b + 1) - first
        rows = get(job, f.J_PAIR_X) + 8 * (start + first)
        h = get(job, f.J_H_ROWS) + (start + first) * get(layer, f.L_H_ROW_BYTES)
        x = load64(rows)
        if tokens > 1:
            x = scratch + get(job, f.J_SCRATCH_X)
            gather_tiles(layer, rows, tokens, x)
        # some strips, then their activations: what interrupts the stream, interrupts it rarely
        some = min(f.STRIPS_AT_ONCE, f.BATCH_TOKENS // tokens)
        block = begin
        while block < end:
            blocks = min(some, end - block)
            for i in range(blocks):
                strip = base + (block + i - first_block) * strip_bytes
                to = sums + i * tokens * SUMS_BYTES
                dot_tiles(layer, f.L_GU_LAYOUT, strip, x, tokens, to, unpacked)
            for i in range(blocks):
                bias = 4 * GROUP * (block + i)
                activate_tiles(
                    layer,
                    sums + i * tokens * SUMS_BYTES,
                    tokens,
                    h,
                    block + i,
                    gate_bias + bias,
                    up_bias + bias,
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
    unpacked = scratch + get(job, f.J_SCRATCH_UNPACKED)
    out = scratch + get(job, f.J_SCRATCH_OUT)
    call2(get(layer, f.L_CLEAR), out, tokens * (end - begin))
    for index in range(get(job, f.J_ACTIVE)):
        expert = load32(get(job, f.J_ACTIVE_EXPERT) + 4 * index)
        start = load32(get(job, f.J_ACTIVE_START) + 4 * index)
        count = load32(get(job, f.J_ACTIVE_START) + 4 * index + 4) - start
        base = load64(get(layer, f.L_DOWN) + 8 * (pool * experts + expert))
        bias = load64(get(layer, f.L_DOWN_BIAS) + 8 * expert)
        batches = ceil_div(count, f.BATCH_TOKENS)
        for strip in range(begin, end):
            codes = base + (strip - first_strip) * strip_bytes
            for b in range(batches):
                first = start + part(count, batches, b)
                some = start + part(count, batches, b + 1) - first
                h = get(job, f.J_H_ROWS) + first * get(layer, f.L_H_ROW_BYTES)
                dot_tiles(layer, f.L_DN_LAYOUT, codes, h, some, sums, unpacked)
                call6(
                    get(layer, f.L_COMBINE),
                    sums,
                    some,
                    get(job, f.J_PAIR_TOKEN) + 4 * first,
                    get(job, f.J_PAIR_WEIGHT) + 4 * first,
                    out + SUMS_BYTES * tokens * (strip - begin),
                    bias + SUMS_BYTES * strip,
                )
    hidden = get(layer, f.L_HIDDEN)
    for strip in range(begin, end):
        call5(
            get(layer, f.L_FINISH),
            out + SUMS_BYTES * tokens * (strip - begin),
            tokens,
            get(job, f.J_OUT) + 2 * STRIP_ROWS * strip,
            2 * hidden,
            min(STRIP_ROWS, hidden - STRIP_ROWS * strip),
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
