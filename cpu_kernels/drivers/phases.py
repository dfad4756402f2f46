"""The phases of a job, one task at a time. Those of an expert layer:

    encode        input rows -> encoded rows                               (large batches only)
    gate/up       strips of 32 intermediate rows of one expert -> encoded h of its tokens, in tiles
    down          strips of 64 hidden rows, all experts in ascending id -> output, all tokens
or
    down by pair  strips of 64 hidden rows of one expert -> a float32 row for each of its pairs
    combine       strips of those rows, pairs in ascending expert -> output, all tokens
or, where no expert is active, nothing but
    zero          rows of the output

A down task owns its output rows, so experts are summed without conflicts and no buffer of
tokens x k x hidden exists. Few tokens on many workers want smaller tasks than that gives: they keep
such a buffer, and add the same numbers in the same order. Between phases all tasks must be
finished: two or three barriers a layer. A dense layer's are encode, and `linear`;
those of attention are in `attention_tasks`.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.attention_tasks import attend_task, merge_task
from hybrid_moe.cpu_kernels.drivers.dense_tasks import linear_task
from hybrid_moe.cpu_kernels.drivers.intrinsics import call, driver, load_acquire
from hybrid_moe.cpu_kernels.drivers.records import (
    ATTEND,
    COMBINE,
    DOWN,
    DOWN_BY_PAIR,
    ENCODE,
    GATE_UP,
    LINEAR,
    MERGE,
    ZERO,
    Entry,
    Job,
    Layer,
    Phase,
)
from hybrid_moe.cpu_kernels.drivers.route import encode_tokens
from hybrid_moe.cpu_kernels.drivers.tiling import (
    ceil_div,
    dot_tiles,
    part,
    tile_count,
    tile_start,
    tiles_for,
)
from hybrid_moe.cpu_kernels.jit.record import LINE, i64
from hybrid_moe.cpu_kernels.tuning import BATCH_TOKENS, STRIPS_AT_ONCE
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS, SUMS_BYTES


@driver
def gather_tiles(layer: Layer, rows: int, count: int, out: int) -> None:
    """The encoded inputs at addresses rows[count] -> tiles."""
    products = layer.gate_up
    tiles = tiles_for(products, count)
    for i in range(tile_count(tiles, count)):
        first = tile_start(tiles, count, i)
        tokens = tile_start(tiles, count, i + 1) - first
        call(
            products.gather,
            rows + 8 * first,
            tokens,
            out + first * products.row_bytes,
            products.strips.groups,
        )


@driver
def activate_tiles(
    layer: Layer, sums: int, count: int, h: int, block: int, gate_bias: int, up_bias: int
) -> None:
    """One strip's gates and ups -> group `block` of the tiles of h."""
    products = layer.down
    tiles = tiles_for(products, count)
    for i in range(tile_count(tiles, count)):
        first = tile_start(tiles, count, i)
        tokens = tile_start(tiles, count, i + 1) - first
        tile = h + first * products.row_bytes
        call(
            layer.activate,
            sums + first * SUMS_BYTES,
            tokens,
            tile + block * tokens * products.encoded_bytes,
            gate_bias,
            up_bias,
            layer.parameters,
        )


@driver
def gate_up_strips(entry: Entry, pool: int, index: int, begin: int, end: int, scratch: int) -> None:
    """Strips begin..end-1 of the pool, of the active expert at `index`."""
    job = entry.job
    layer = job.layer
    expert = job.active_expert[index]
    start = job.active_start[index]
    count = job.active_start[index + 1] - start
    packed = layer.packed[expert * job.pools + pool]
    first_block = layer.blocks[pool]
    products = layer.gate_up
    strip_bytes = products.strips.strip_bytes
    if products.enter != 0:
        call(products.enter)
    # pairs with the release of `publish.publish_word`, which routing has seen already
    strips = load_acquire(packed.gate_up)
    sums = scratch + job.sums_offset
    unpacked = scratch + job.unpacked_offset
    batches = ceil_div(count, BATCH_TOKENS)
    for b in range(batches):
        first = start + part(count, batches, b)
        tokens = start + part(count, batches, b + 1) - first
        h = job.h_rows + first * layer.down.row_bytes
        x = job.pair_x[first]
        if tokens > 1:
            x = scratch + job.x_offset
            gather_tiles(layer, job.pair_x.address + 8 * first, tokens, x)
        # some strips, then their activations, see `tuning.STRIPS_AT_ONCE`
        some = min(STRIPS_AT_ONCE, BATCH_TOKENS // tokens)
        strip = begin
        while strip < end:
            last = min(end, strip + some)
            for i in range(strip, last):
                to = sums + (i - strip) * tokens * SUMS_BYTES
                dot_tiles(products, strips + i * strip_bytes, x, tokens, to, unpacked)
            for i in range(strip, last):
                block = first_block + i
                bias = 4 * GROUP * block
                activate_tiles(
                    layer,
                    sums + (i - strip) * tokens * SUMS_BYTES,
                    tokens,
                    h,
                    block,
                    packed.gate_bias + bias,
                    packed.up_bias + bias,
                )
            strip = last


@driver
def gate_up_task(entry: Entry, pool: int, begin: int, end: int, scratch: int) -> None:
    """Units begin..end-1: strips of all active experts, one expert behind the other."""
    blocks = entry.job.layer.blocks
    strips = blocks[pool + 1] - blocks[pool]
    while begin < end:
        index = begin // strips
        first = begin - index * strips
        last = min(strips, first + end - begin)
        gate_up_strips(entry, pool, index, first, last, scratch)
        begin += last - first


@driver
def pair_rows(entry: Entry, row: int) -> int:
    """float32 [pairs][64]: what each pair adds to rows 64 * `row` to 64 * `row` + 63 of its
    token."""
    return entry.job.pair_rows + SUMS_BYTES * entry.job.pairs * row


@driver
def down_strips(
    entry: Entry, pool: int, index: int, begin: int, end: int, out: int, scratch: int
) -> None:
    """Strips begin..end-1 of the pool, of the active expert at `index`, times the h of its pairs:
    weighted, and added to `out`, float32 [end - begin][T][64]; or if that is 0, left in
    `pair_rows`."""
    job = entry.job
    layer = job.layer
    expert = job.active_expert[index]
    start = job.active_start[index]
    count = job.active_start[index + 1] - start
    products = layer.down
    strip_bytes = products.strips.strip_bytes
    if products.enter != 0:
        call(products.enter)
    packed = layer.packed[expert * job.pools + pool]
    strips = packed.down
    sums = scratch + job.sums_offset
    unpacked = scratch + job.unpacked_offset
    batches = ceil_div(count, BATCH_TOKENS)
    for b in range(batches):
        first = start + part(count, batches, b)
        tokens = start + part(count, batches, b + 1) - first
        h = job.h_rows + first * layer.down.row_bytes
        weights = job.pair_weight.address + 4 * first
        some = min(STRIPS_AT_ONCE, BATCH_TOKENS // tokens)
        strip = begin
        while strip < end:
            last = min(end, strip + some)
            for i in range(strip, last):
                to = sums + (i - strip) * tokens * SUMS_BYTES
                dot_tiles(products, strips + i * strip_bytes, h, tokens, to, unpacked)
            for i in range(strip, last):
                of = sums + (i - strip) * tokens * SUMS_BYTES
                row = layer.strips[pool] + i
                bias = packed.down_bias + SUMS_BYTES * row
                if out != 0:
                    to = out + (i - begin) * job.tokens * SUMS_BYTES
                    pair_tokens = job.pair_token.address + 4 * first
                    call(layer.combine, of, tokens, pair_tokens, weights, to, bias)
                else:
                    to = pair_rows(entry, row) + SUMS_BYTES * first
                    call(layer.weigh, of, tokens, weights, bias, to)
            strip = last


@driver
def finish_strip(job: Job, row: int, out: int) -> None:
    """The sums of rows 64 * `row` to 64 * `row` + 63, float32 [T][64] -> the job's output."""
    layer = job.layer
    hidden = layer.hidden
    size = job.out_size
    call(
        layer.finish if size == 2 else layer.finish_float,
        out,
        job.tokens,
        # pairs with the release in `host.withdraw`: a job that is given up writes elsewhere
        load_acquire(job.out) + size * STRIP_ROWS * row,
        size * hidden,
        min(STRIP_ROWS, hidden - STRIP_ROWS * row),
    )


@driver
def down_task(entry: Entry, pool: int, begin: int, end: int, scratch: int) -> None:
    """Strips begin..end-1 of the pool, each of all active experts."""
    job = entry.job
    out = scratch + job.out_offset
    out_bytes = SUMS_BYTES * job.tokens
    call(job.layer.clear, out, job.tokens * (end - begin))
    for index in range(job.active):
        down_strips(entry, pool, index, begin, end, out, scratch)
    for strip in range(begin, end):
        finish_strip(job, job.layer.strips[pool] + strip, out + out_bytes * (strip - begin))


@driver
def down_by_pair_task(entry: Entry, pool: int, begin: int, end: int, scratch: int) -> None:
    """Units begin..end-1: strips of all active experts, one expert behind the other."""
    bounds = entry.job.layer.strips
    strips = bounds[pool + 1] - bounds[pool]
    while begin < end:
        index = begin // strips
        first = begin - index * strips
        last = min(strips, first + end - begin)
        down_strips(entry, pool, index, first, last, 0, scratch)
        begin += last - first


@driver
def combine_task(entry: Entry, pool: int, begin: int, end: int, scratch: int) -> None:
    """Strips begin..end-1 of the pool."""
    job = entry.job
    layer = job.layer
    out = scratch + job.out_offset
    for row in range(layer.strips[pool] + begin, layer.strips[pool] + end):
        call(layer.clear, out, job.tokens)
        call(layer.add, pair_rows(entry, row), entry.job.pairs, job.pair_token.address, out)
        finish_strip(job, row, out)


@driver
def zero_words(begin: int, end: int) -> None:
    words = i64.at(begin)
    for i in range((end - begin) // 8):
        words[i] = 0


@driver
def zero_task(job: Job, begin: int, end: int) -> None:
    """Output of tokens for which nothing is computed here, in units of `clear`: float32 [64] on a
    cache line. What is left of the output at both ends is less than a unit and a line, and comes
    with the first unit."""
    out = load_acquire(job.out)
    past = out + job.out_size * job.tokens * job.layer.hidden
    first = (out + LINE - 1) // LINE * LINE
    units = max(0, past - first) // SUMS_BYTES
    last = min(units, end)
    if last > begin:
        call(job.layer.clear, first + SUMS_BYTES * begin, last - begin)
    if begin == 0:
        zero_words(out, min(first, past))
        zero_words(first + SUMS_BYTES * units, past)


@driver
def run_task(entry: Entry, phase: Phase, pool: int, task: int, worker: int) -> None:
    job = entry.job
    scratch = job.scratch + worker * job.scratch_bytes
    tasks = load_acquire(phase.tasks[pool])  # of this job: the task has been claimed
    begin = part(phase.units[pool], tasks, task)
    end = part(phase.units[pool], tasks, task + 1)
    if phase.kind == ENCODE:
        encode_tokens(job, begin, end)
    elif phase.kind == GATE_UP:
        gate_up_task(entry, pool, begin, end, scratch)
    elif phase.kind == DOWN:
        down_task(entry, pool, begin, end, scratch)
    elif phase.kind == DOWN_BY_PAIR:
        down_by_pair_task(entry, pool, begin, end, scratch)
    elif phase.kind == COMBINE:
        combine_task(entry, pool, begin, end, scratch)
    elif phase.kind == LINEAR:
        linear_task(entry, pool, begin, end, scratch)
    elif phase.kind == ATTEND:
        attend_task(job, pool, begin, end, scratch)
    elif phase.kind == MERGE:
        merge_task(job, pool, begin, end)
    elif phase.kind == ZERO:
        zero_task(job, begin, end)
