"""The tasks of a dense layer: strips of its matrices times all tokens.

Tokens are cut as those of an expert are: into batches, whose sums stay in the cache, and these into
tiles, [group][token] each. Since every task meets the same tokens, inputs are encoded right into
the tiles, which lie one behind the other: token t's tile begins at its first token's row.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import call, driver, load_acquire
from hybrid_moe.cpu_kernels.drivers.records import Entry, Job, MatrixShare
from hybrid_moe.cpu_kernels.drivers.tiling import (
    ceil_div,
    dot_tiles,
    part,
    tile_count,
    tile_start,
    tiles_for,
)
from hybrid_moe.cpu_kernels.tuning import BATCH_TOKENS, STRIPS_AT_ONCE
from hybrid_moe.formats.strips import STRIP_ROWS, SUMS_BYTES


@driver
def share_of(job: Job, pool: int, index: int) -> MatrixShare:
    """What a pool has of a matrix; for the index past the last, what tells where that one ends."""
    return job.layer.shares[pool * (job.layer.matrices + 1) + index]


@driver
def linear_strips(job: Job, pool: int) -> int:
    """Strips of all matrices that a pool has."""
    return share_of(job, pool, job.layer.matrices).units


@driver
def linear_macs(job: Job) -> int:
    """Multiply-adds of one strip with all tokens."""
    return STRIP_ROWS * job.tokens * job.layer.hidden


@driver
def encode_tile(job: Job, begin: int, end: int, first: int, last: int) -> None:
    """Encode those of the tokens begin..end-1 that are in the tile first..last-1."""
    layer = job.layer
    products = layer.gate_up
    x_bytes = 2 * layer.hidden
    low = max(begin, first)
    high = min(end, last)
    if low < high:
        tile = job.x_rows + first * products.row_bytes
        call(
            layer.encode,
            job.x + low * x_bytes,
            x_bytes,
            tile + (low - first) * products.encoded_bytes,
            products.encoded_bytes,
            high - low,
            products.strips.groups,
            (last - first) * products.encoded_bytes,
        )


@driver
def encode_tiles(job: Job, begin: int, end: int) -> None:
    """Encode input rows begin..end-1, each to its place in a tile."""
    batches = ceil_div(job.tokens, BATCH_TOKENS)
    for b in range(batches):
        first = part(job.tokens, batches, b)
        count = part(job.tokens, batches, b + 1) - first
        tiles = tiles_for(job.layer.gate_up, count)
        for i in range(tile_count(tiles, count)):
            of_tile = first + tile_start(tiles, count, i)
            encode_tile(job, begin, end, of_tile, first + tile_start(tiles, count, i + 1))


@driver
def deliver_strip(
    job: Job, share: MatrixShare, strip: int, first: int, count: int, sums: int
) -> None:
    """The sums of a strip, float32 [count][64], of tokens first..first+count-1 -> the output."""
    row = STRIP_ROWS * (share.first + strip)
    token = job.out_first + first
    call(
        job.layer.deliver,
        sums,
        count,
        # pairs with the release in `host.withdraw`, as in `phases.finish_strip`
        load_acquire(job.out) + 2 * (job.out_tokens * share.column + token * share.rows + row),
        2 * share.rows,
        min(STRIP_ROWS, share.rows - row),
        share.bias + 4 * row,
    )


@driver
def linear_run(job: Job, share: MatrixShare, begin: int, end: int, scratch: int) -> None:
    """Strips begin..end-1 of a share times all tokens. With several batches a strip meets all of
    them before the next: it comes from memory once."""
    layer = job.layer
    products = layer.gate_up
    strip_bytes = products.strips.strip_bytes
    tokens = job.tokens
    sums = scratch + job.sums_offset
    unpacked = scratch + job.unpacked_offset
    batches = ceil_div(tokens, BATCH_TOKENS)
    # some strips, then their epilogues, see `tuning.STRIPS_AT_ONCE`
    some = max(1, min(STRIPS_AT_ONCE, BATCH_TOKENS // tokens))
    strip = begin
    while strip < end:
        last = min(end, strip + some)
        for b in range(batches):
            first = part(tokens, batches, b)
            count = part(tokens, batches, b + 1) - first
            x = job.x_rows + first * products.row_bytes
            for i in range(strip, last):
                to = sums + (i - strip) * count * SUMS_BYTES
                dot_tiles(products, share.strips + i * strip_bytes, x, count, to, unpacked)
            for i in range(strip, last):
                deliver_strip(job, share, i, first, count, sums + (i - strip) * count * SUMS_BYTES)
        strip = last


@driver
def linear_task(entry: Entry, pool: int, begin: int, end: int, scratch: int) -> None:
    """Units begin..end-1: strips of all matrices, one matrix behind the other."""
    job = entry.job
    for index in range(job.layer.matrices):
        share = share_of(job, pool, index)
        low = max(begin, share.units)
        high = min(end, share_of(job, pool, index + 1).units)
        if low < high:
            linear_run(job, share, low - share.units, high - share.units, scratch)
