"""How tokens are cut into tiles, and the products of a strip with them."""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import call, driver
from hybrid_moe.cpu_kernels.drivers.records import Products, TilePlan
from hybrid_moe.cpu_kernels.tuning import SHARE_BYTES
from hybrid_moe.formats.strips import SUMS_BYTES


@driver
def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


@driver
def part(total: int, parts: int, index: int) -> int:
    """Where part `index` of `parts` nearly equal ones begins."""
    return total * index // parts


@driver
def tiles_for(products: Products, count: int) -> TilePlan:
    """How `count` tokens of one expert are cut into tiles, see `library.Tiling`."""
    if count < products.tiled_from:
        return products.direct
    return products.tiled


@driver
def tile_count(tiles: TilePlan, count: int) -> int:
    return ceil_div(count, tiles.most)


@driver
def tile_start(tiles: TilePlan, count: int, index: int) -> int:
    """First token of a tile, or `count` for the index past the last."""
    units = ceil_div(count, tiles.unit)
    return min(count, tiles.unit * part(units, tile_count(tiles, count), index))


@driver
def dot_tiles(products: Products, strip: int, x: int, count: int, sums: int, unpacked: int) -> None:
    """sums [count][64] = one strip x the tiles of `count` encoded tokens at `x`.

    One tile reads the codes as they stream from memory. Several take a chunk of K at a time, which
    comes from memory once and meets every tile while it is in the cache, unpacked first if that
    pays; and each tile fetches a share of the chunk that follows.
    """
    groups = products.strips.groups
    strip_bytes = products.strips.strip_bytes
    row_bytes = products.row_bytes
    tiles = tiles_for(products, count)
    number = tile_count(tiles, count)
    chunk = groups
    if number > 1 or tiles.unpack != 0:
        chunk = tiles.groups
    begin = 0
    while begin < groups:
        end = min(groups, begin + chunk)
        at = strip
        after = strip + end * strip_bytes // groups  # of a strip with blocks about there
        if tiles.unpack != 0:
            call(tiles.unpack, strip, unpacked, begin, end)
            at = unpacked
        for i in range(number):
            first = tile_start(tiles, count, i)
            tokens = tile_start(tiles, count, i + 1) - first
            call(
                tiles.kernels[tokens - 1],
                at,
                after + (i * SHARE_BYTES) % (chunk * strip_bytes // groups),
                x + first * row_bytes,
                tokens,
                sums + first * SUMS_BYTES,
                begin,
                end,
            )
        begin = end
