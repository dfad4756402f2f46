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
from hybrid_moe.cpu_kernels.drivers.route import ceil_div, encode_tokens, get, units_of
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
def pairs_before(job: int, index: int) -> int:
    """Pairs of the active experts before the one at `index`."""
    return load32(get(job, f.J_ACTIVE_START) + 4 * index)


@driver
def gate_up_strips(
    job: int, layer: int, pool: int, index: int, begin: int, end: int, scratch: int
) -> None:
    """Strips begin..end-1 of the pool, of the active expert at `index`."""
    expert = load32(get(job, f.J_ACTIVE_EXPERT) + 4 * index)
    start = pairs_before(job, index)
    count = pairs_before(job, index + 1) - start
    first_block = load64(get(layer, f.L_BLOCKS) + 8 * pool)
    strips = load64(get(layer, f.L_GATE_UP) + 8 * (pool * get(layer, f.L_EXPERTS) + expert))
    strip_bytes = get(layer, f.L_GU_LAYOUT + f.LAYOUT_STRIP_BYTES)
    gate_bias = load64(get(layer, f.L_GATE_BIAS) + 8 * expert)
    up_bias = load64(get(layer, f.L_UP_BIAS) + 8 * expert)
    sums = scratch + get(job, f.J_SCRATCH_SUMS)
    unpacked = scratch + get(job, f.J_SCRATCH_UNPACKED)
    batches = ceil_div(count, f.BATCH_TOKENS)
    for b in range(batches):
        first = start + part(count, batches, b)
        tokens = start + part(count, batches, b + 1) - first
        rows = get(job, f.J_PAIR_X) + 8 * first
        h = get(job, f.J_H_ROWS) + first * get(layer, f.L_H_ROW_BYTES)
        x = load64(rows)
        if tokens > 1:
            x = scratch + get(job, f.J_SCRATCH_X)
            gather_tiles(layer, rows, tokens, x)
        # some strips, then their activations: what interrupts the stream, interrupts it rarely
        some = min(f.STRIPS_AT_ONCE, f.BATCH_TOKENS // tokens)
        strip = begin
        while strip < end:
            last = min(end, strip + some)
            for i in range(strip, last):
                to = sums + (i - strip) * tokens * SUMS_BYTES
                dot_tiles(
                    layer, f.L_GU_LAYOUT, strips + i * strip_bytes, x, tokens, to, unpacked
                )
            for i in range(strip, last):
                block = first_block + i
                activate_tiles(
                    layer,
                    sums + (i - strip) * tokens * SUMS_BYTES,
                    tokens,
                    h,
                    block,
                    gate_bias + 4 * GROUP * block,
                    up_bias + 4 * GROUP * block,
                )
            strip = last


@driver
def gate_up_task(job: int, layer: int, pool: int, task: int, scratch: int) -> None:
    strips = units_of(get(layer, f.L_BLOCKS), pool)
    tasks = get(job, f.J_TASKS + f.PHASE_GATE_UP * f.MAX_POOLS + pool)
    unit = part(get(job, f.J_ACTIVE) * strips, tasks, task)
    last = part(get(job, f.J_ACTIVE) * strips, tasks, task + 1)
    while unit < last:
        index = unit // strips
        begin = unit - index * strips
        end = min(strips, begin + last - unit)
        gate_up_strips(job, layer, pool, index, begin, end, scratch)
        unit += end - begin


@driver
def down_strip(
    job: int, layer: int, pool: int, index: int, strip: int, out: int, scratch: int
) -> None:
    """One strip of the active expert at `index`, times its pairs: weighted and added to `out`,
    float32 [T][64], or where the job keeps them by pair, left for `combine_task`."""
    expert = load32(get(job, f.J_ACTIVE_EXPERT) + 4 * index)
    start = pairs_before(job, index)
    count = pairs_before(job, index + 1) - start
    strips = load64(get(layer, f.L_DOWN) + 8 * (pool * get(layer, f.L_EXPERTS) + expert))
    codes = strips + strip * get(layer, f.L_DN_LAYOUT + f.LAYOUT_STRIP_BYTES)
    row = load64(get(layer, f.L_STRIPS) + 8 * pool) + strip
    bias = load64(get(layer, f.L_DOWN_BIAS) + 8 * expert) + SUMS_BYTES * row
    sums = scratch + get(job, f.J_SCRATCH_SUMS)
    unpacked = scratch + get(job, f.J_SCRATCH_UNPACKED)
    batches = ceil_div(count, f.BATCH_TOKENS)
    for b in range(batches):
        first = start + part(count, batches, b)
        tokens = start + part(count, batches, b + 1) - first
        h = get(job, f.J_H_ROWS) + first * get(layer, f.L_H_ROW_BYTES)
        weights = get(job, f.J_PAIR_WEIGHT) + 4 * first
        dot_tiles(layer, f.L_DN_LAYOUT, codes, h, tokens, sums, unpacked)
        if out != 0:
            pair_tokens = get(job, f.J_PAIR_TOKEN) + 4 * first
            call6(get(layer, f.L_COMBINE), sums, tokens, pair_tokens, weights, out, bias)
        else:
            call5(
                get(layer, f.L_WEIGH), sums, tokens, weights, bias, pair_rows(job, row, first)
            )


@driver
def pair_rows(job: int, row: int, pair: int) -> int:
    """Where float32 [64] of a pair, those of strip `row` of the whole output, are kept."""
    pairs = pairs_before(job, get(job, f.J_ACTIVE))
    return get(job, f.J_PAIR_ROWS) + SUMS_BYTES * (row * pairs + pair)


@driver
def finish_strip(job: int, layer: int, pool: int, strip: int, out: int) -> None:
    """Sums of all tokens, float32 [T][64] -> their outputs."""
    row = STRIP_ROWS * (load64(get(layer, f.L_STRIPS) + 8 * pool) + strip)
    hidden = get(layer, f.L_HIDDEN)
    call5(
        get(layer, f.L_FINISH),
        out,
        get(job, f.J_TOKENS),
        get(job, f.J_OUT) + 2 * row,
        2 * hidden,
        min(STRIP_ROWS, hidden - row),
    )


@driver
def down_task(job: int, layer: int, pool: int, task: int, scratch: int) -> None:
    """Strips of the output, each of all experts."""
    strips = units_of(get(layer, f.L_STRIPS), pool)
    tasks = get(job, f.J_TASKS + f.PHASE_DOWN * f.MAX_POOLS + pool)
    begin = part(strips, tasks, task)
    end = part(strips, tasks, task + 1)
    out = scratch + get(job, f.J_SCRATCH_OUT)
    out_bytes = SUMS_BYTES * get(job, f.J_TOKENS)
    call2(get(layer, f.L_CLEAR), out, get(job, f.J_TOKENS) * (end - begin))
    for index in range(get(job, f.J_ACTIVE)):
        for i in range(begin, end):
            down_strip(job, layer, pool, index, i, out + out_bytes * (i - begin), scratch)
    for i in range(begin, end):
        finish_strip(job, layer, pool, i, out + out_bytes * (i - begin))


@driver
def down_pairs_task(job: int, layer: int, pool: int, task: int, scratch: int) -> None:
    """Strips of any expert, for `combine_task`."""
    strips = units_of(get(layer, f.L_STRIPS), pool)
    tasks = get(job, f.J_TASKS + f.PHASE_DOWN * f.MAX_POOLS + pool)
    units = get(job, f.J_ACTIVE) * strips
    for unit in range(part(units, tasks, task), part(units, tasks, task + 1)):
        index = unit // strips
        down_strip(job, layer, pool, index, unit - index * strips, 0, scratch)


@driver
def combine_task(job: int, layer: int, pool: int, task: int, scratch: int) -> None:
    """Strips of the output: what the pairs add to it, in ascending order of experts."""
    strips = units_of(get(layer, f.L_STRIPS), pool)
    tasks = get(job, f.J_TASKS + f.PHASE_COMBINE * f.MAX_POOLS + pool)
    out = scratch + get(job, f.J_SCRATCH_OUT)
    pairs = pairs_before(job, get(job, f.J_ACTIVE))
    first_strip = load64(get(layer, f.L_STRIPS) + 8 * pool)
    for i in range(part(strips, tasks, task), part(strips, tasks, task + 1)):
        call2(get(layer, f.L_CLEAR), out, get(job, f.J_TOKENS))
        rows = pair_rows(job, first_strip + i, 0)
        call4(get(layer, f.L_ADD), rows, pairs, get(job, f.J_PAIR_TOKEN), out)
        finish_strip(job, layer, pool, i, out)


@driver
def run_task(job: int, phase: int, pool: int, task: int, worker: int) -> None:
    layer = get(job, f.J_LAYER)
    scratch = get(job, f.J_SCRATCH) + worker * get(job, f.J_SCRATCH_BYTES)
    if phase == f.PHASE_ENCODE:
        tokens = get(job, f.J_TOKENS)
        tasks = get(job, f.J_TASKS + f.PHASE_ENCODE * f.MAX_POOLS)
        encode_tokens(job, layer, part(tokens, tasks, task), part(tokens, tasks, task + 1))
    elif phase == f.PHASE_GATE_UP:
        gate_up_task(job, layer, pool, task, scratch)
    elif phase == f.PHASE_COMBINE:
        combine_task(job, layer, pool, task, scratch)
    elif get(job, f.J_LAST_PHASE) == f.PHASE_COMBINE:
        down_pairs_task(job, layer, pool, task, scratch)
    else:
        down_task(job, layer, pool, task, scratch)
