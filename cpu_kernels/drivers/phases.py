"""The three phases of a layer, one task at a time.

    encode    input rows -> encoded rows                                    (large batches only)
    gate/up   strips of 32 intermediate rows of one expert -> encoded h of all its tokens, in tiles
    down      strips of 64 hidden rows, all experts in ascending id -> output, all tokens
    zero      in place of all three, where no expert is active

A down task owns its output rows, so experts are summed without conflicts and no buffer of
tokens x k x hidden exists. Between phases all tasks must be finished: two barriers a layer.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import call, driver, load_acquire
from hybrid_moe.cpu_kernels.drivers.records import (
    BATCH_TOKENS,
    DOWN,
    ENCODE,
    GATE_UP,
    SHARE_BYTES,
    STRIPS_AT_ONCE,
    ZERO,
    Entry,
    Job,
    Layer,
    Phase,
    StripSizes,
    TilePlan,
)
from hybrid_moe.cpu_kernels.drivers.route import ceil_div, encode_tokens
from hybrid_moe.cpu_kernels.jit.records import LINE, i64
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS, SUMS_BYTES


@driver
def part(total: int, parts: int, index: int) -> int:
    """Where part `index` of `parts` nearly equal ones begins."""
    return total * index // parts


@driver
def tiles_for(layer: Layer, count: int) -> TilePlan:
    """How `count` tokens of one expert are cut into tiles, see `library.Tiling`."""
    if count < layer.tiled_from:
        return layer.direct
    return layer.tiled


@driver
def tile_count(tiles: TilePlan, count: int) -> int:
    return ceil_div(count, tiles.most)


@driver
def tile_start(tiles: TilePlan, count: int, index: int) -> int:
    """First token of a tile, or `count` for the index past the last."""
    units = ceil_div(count, tiles.unit)
    return min(count, tiles.unit * part(units, tile_count(tiles, count), index))


@driver
def dot_tiles(
    layer: Layer, sizes: StripSizes, codes: int, x: int, count: int, sums: int, unpacked: int
) -> None:
    """sums [count][64] = one strip x the tiles of `count` encoded tokens at `x`.

    One tile reads the codes as they stream from memory. Several take a chunk of K at a time, which
    comes from memory once and meets every tile while it is in the cache, unpacked first if that
    pays; and each tile fetches a share of the chunk that follows.
    """
    groups = sizes.groups
    group_bytes = sizes.group_bytes
    row_bytes = groups * layer.encoded_bytes
    tiles = tiles_for(layer, count)
    number = tile_count(tiles, count)
    chunk = groups
    if number > 1 or tiles.unpack != 0:
        chunk = tiles.groups
    begin = 0
    while begin < groups:
        end = min(groups, begin + chunk)
        at = codes + begin * group_bytes
        after = codes + end * group_bytes
        if tiles.unpack != 0:
            call(tiles.unpack, at, unpacked, end - begin)
            at = unpacked
        for i in range(number):
            first = tile_start(tiles, count, i)
            tokens = tile_start(tiles, count, i + 1) - first
            call(
                tiles.kernels[tokens - 1],
                at,
                after + (i * SHARE_BYTES) % (chunk * group_bytes),
                x + first * row_bytes,
                tokens,
                sums + first * SUMS_BYTES,
                begin,
                end,
            )
        begin = end


@driver
def gather_tiles(layer: Layer, rows: int, count: int, out: int) -> None:
    """The encoded inputs at addresses rows[count] -> tiles."""
    tiles = tiles_for(layer, count)
    for i in range(tile_count(tiles, count)):
        first = tile_start(tiles, count, i)
        tokens = tile_start(tiles, count, i + 1) - first
        call(
            layer.gather,
            rows + 8 * first,
            tokens,
            out + first * layer.x_row_bytes,
            layer.gate_up_strips.groups,
        )


@driver
def activate_tiles(
    layer: Layer, sums: int, count: int, h: int, block: int, gate_bias: int, up_bias: int
) -> None:
    """One strip's gates and ups -> group `block` of the tiles of h."""
    tiles = tiles_for(layer, count)
    for i in range(tile_count(tiles, count)):
        first = tile_start(tiles, count, i)
        tokens = tile_start(tiles, count, i + 1) - first
        tile = h + first * layer.h_row_bytes
        call(
            layer.activate,
            sums + first * SUMS_BYTES,
            tokens,
            tile + block * tokens * layer.encoded_bytes,
            gate_bias,
            up_bias,
            layer.parameters,
        )


@driver
def gate_up_task(entry: Entry, phase: Phase, pool: int, task: int, scratch: int) -> None:
    job = entry.job
    layer = job.layer
    first_block = layer.blocks[pool]
    last_block = layer.blocks[pool + 1]
    per_task = phase.per_task
    tasks_per_expert = ceil_div(last_block - first_block, per_task)
    index = task // tasks_per_expert
    begin = first_block + (task - index * tasks_per_expert) * per_task
    end = min(last_block, begin + per_task)

    expert = job.active_expert[index]
    start = job.active_start[index]
    count = job.active_start[index + 1] - start
    packed = layer.packed[expert * job.pools + pool]
    base = load_acquire(packed.gate_up)
    sizes = layer.gate_up_strips
    sums = scratch + job.sums_offset
    unpacked = scratch + job.unpacked_offset
    batches = ceil_div(count, BATCH_TOKENS)
    for b in range(batches):
        first = part(count, batches, b)
        tokens = part(count, batches, b + 1) - first
        h = job.h_rows + (start + first) * layer.h_row_bytes
        x = job.pair_x[start + first]
        if tokens > 1:
            x = scratch + job.x_offset
            gather_tiles(layer, job.pair_x.address + 8 * (start + first), tokens, x)
        # some strips, then their activations: what interrupts the stream, interrupts it rarely
        some = min(STRIPS_AT_ONCE, BATCH_TOKENS // tokens)
        block = begin
        while block < end:
            blocks = min(some, end - block)
            for i in range(blocks):
                strip = base + (block + i - first_block) * sizes.strip_bytes
                to = sums + i * tokens * SUMS_BYTES
                dot_tiles(layer, sizes, strip, x, tokens, to, unpacked)
            for i in range(blocks):
                bias = 4 * GROUP * (block + i)
                activate_tiles(
                    layer,
                    sums + i * tokens * SUMS_BYTES,
                    tokens,
                    h,
                    block + i,
                    packed.gate_bias + bias,
                    packed.up_bias + bias,
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
    sums = scratch + job.sums_offset
    unpacked = scratch + job.unpacked_offset
    out = scratch + job.out_offset
    call(layer.clear, out, tokens * (end - begin))
    for index in range(job.active):
        expert = job.active_expert[index]
        start = job.active_start[index]
        count = job.active_start[index + 1] - start
        packed = layer.packed[expert * job.pools + pool]
        batches = ceil_div(count, BATCH_TOKENS)
        for strip in range(begin, end):
            codes = packed.down + (strip - first_strip) * sizes.strip_bytes
            for b in range(batches):
                first = start + part(count, batches, b)
                some = start + part(count, batches, b + 1) - first
                h = job.h_rows + first * layer.h_row_bytes
                dot_tiles(layer, sizes, codes, h, some, sums, unpacked)
                call(
                    layer.combine,
                    sums,
                    some,
                    job.pair_token.address + 4 * first,
                    job.pair_weight.address + 4 * first,
                    out + SUMS_BYTES * tokens * (strip - begin),
                    packed.down_bias + SUMS_BYTES * strip,
                )
    for strip in range(begin, end):
        call(
            layer.finish,
            out + SUMS_BYTES * tokens * (strip - begin),
            tokens,
            # pairs with the release in `host.withdraw`: a job that is given up writes elsewhere
            load_acquire(job.out) + 2 * STRIP_ROWS * strip,
            2 * layer.hidden,
            min(STRIP_ROWS, layer.hidden - STRIP_ROWS * strip),
        )


@driver
def zero_words(begin: int, end: int) -> None:
    words = i64.at(begin)
    for i in range((end - begin) // 8):
        words[i] = 0


@driver
def zero_task(job: Job, phase: Phase, task: int) -> None:
    """Output of tokens for which nothing is computed here, in rows of `clear`: float32 [64] on a
    cache line. What is left of the output at both ends is less than a row and a line."""
    out = load_acquire(job.out)
    end = out + 2 * job.tokens * job.layer.hidden
    first = (out + LINE - 1) // LINE * LINE
    rows = max(0, end - first) // SUMS_BYTES
    begin = min(rows, task * phase.per_task)
    count = min(rows - begin, phase.per_task)
    if count > 0:
        call(job.layer.clear, first + SUMS_BYTES * begin, count)
    if task == 0:
        zero_words(out, min(first, end))
        zero_words(first + SUMS_BYTES * rows, end)


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
    elif phase.kind == ZERO:
        zero_task(job, phase, task)
