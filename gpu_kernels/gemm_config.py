"""How the grouped GEMMs are cut: K ranges, which fix a token's bits, and what is for speed."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from hybrid_moe.formats.strips import GROUP, strip_layout
from hybrid_moe.formats.table import FORMATS
from hybrid_moe.gpu_kernels.weight_codes.objects import check_kernels, strip_codes

RANGE_INPUTS = 512
"""Most inputs of a K range."""
TOKEN_TILES = (8, 16, 32, 64)
"""Pairs of a tile. With 8 and 16 K is split over warps, with 32 and 64 warps share activations."""
STAGE_GROUPS = 2
"""Groups of activations of a stage: 128 bytes a token, all banks of shared memory once."""
ROW_TILES = 2
"""Tiles of 16 rows in half a strip."""
SHARE_REGISTERS = 64
"""Of a lane, for weights on their way where K is split."""
MOST_SHARED_BYTES = 99 << 10
"""Of a block on sm_86, sm_89 and sm_120, the least of all architectures."""


def k_ranges(K: int) -> int:
    """Ranges that K inputs are cut into. A product is summed over each range from zero, and these
    sums are added in ascending order: by every kernel, so that a token's bits depend on the shape
    alone and not on which kernel had how many tokens."""
    return -(-K // RANGE_INPUTS)


def range_bounds(K: int) -> list[int]:
    """First group of each range, and the number of groups. Ranges are whole stages of two groups,
    as equal as possible."""
    groups, ranges = K // GROUP, k_ranges(K)
    stages = -(-groups // STAGE_GROUPS)
    return [min(STAGE_GROUPS * (r * stages // ranges), groups) for r in range(ranges + 1)]


@functools.lru_cache(maxsize=128)
def groups_with_room(format: str) -> int:
    """Groups of weights that `SHARE_REGISTERS` hold: what a lane loads ahead for both halves of
    each, beside what is in use: the factors of its eight rows and a tile's products, where those
    are not folded into the codes; their offsets; upper bits being put in their places; fields that
    are not loaded ahead. MXFP4 has room for the first in its loop for wide experts, MXFP8 has not.
    """
    fmt = FORMATS[format]
    codes = strip_codes(fmt, strip_layout(fmt, max(GROUP, fmt.k_multiple)))
    apart = codes.ways == (False,) or (False in codes.ways and fmt.bits == 8)
    used = 16 * apart + 8 * codes.has_offsets + 16 * (fmt.code.high_bits > 0)
    used += 0 if codes.fields_ahead else 16
    return (SHARE_REGISTERS - used) // (2 * codes.registers)


@dataclass(frozen=True)
class GemmConfig:
    """All that is decided before a grouped GEMM is compiled.

    Attributes:
        format: name of the weights' format.
        tile: pairs of a tile, of `TOKEN_TILES`.
        ranges: `k_ranges` of the inputs that it is for.
        strips: of a block.
        k_warps: warps that share a strip's K ranges, each with both halves; 0 where a strip has two
            warps, one for each half, and activations go through shared memory.
        stages: of activations in shared memory; 0 where every warp reads its own.
        depth: groups of weights on their way to a warp's registers.
        biases: of the experts.
        pdl: wait for the kernel before, and let the next one start, by programmatic dependent
            launch (sm_90 and later).
    """

    format: str
    tile: int
    ranges: int
    strips: int
    k_warps: int
    stages: int
    depth: int
    biases: bool
    pdl: bool = False

    def __post_init__(self) -> None:
        check_kernels(FORMATS[self.format])
        if self.tile not in TOKEN_TILES:
            raise ValueError(f"tile is {self.tile}, must be in {TOKEN_TILES}")
        if self.staged != (self.k_warps == 0) or self.stages not in (0, 2, 4, 8):
            raise ValueError(f"stages is {self.stages} with {self.k_warps} warps along K")
        if self.shared_bytes > MOST_SHARED_BYTES:
            raise ValueError(
                f"K = {RANGE_INPUTS * self.ranges} with tiles of {self.tile} needs "
                f"{self.shared_bytes} bytes of shared memory, a block has {MOST_SHARED_BYTES}"
            )
        if self.staged and (self.depth != STAGE_GROUPS or self.tile * 8 % self.threads):
            raise ValueError(f"a block of {self.threads} threads cannot copy {self.tile} tokens")

    @property
    def staged(self) -> bool:
        """Whether activations go through shared memory."""
        return self.stages > 0

    @property
    def halves(self) -> int:
        """Halves of a strip that a warp multiplies."""
        return 1 if self.staged else 2

    @property
    def columns(self) -> int:
        """Columns of mma, of 8 tokens each."""
        return self.tile // 8

    @property
    def strip_warps(self) -> int:
        """Warps of a strip."""
        return self.k_warps or 2

    @property
    def warps(self) -> int:
        """Of a block."""
        return self.strips * self.strip_warps

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def ahead(self) -> int:
        """With stages: groups from the one that is multiplied to one that L2 is asked for. Of 8
        warps with half a strip each, 6 groups of 544 bytes (MXFP4), 4 of 1056 (MXFP8) or 2 of 2048
        (BF16), beside the two that are on their way to registers: 26 KB an SM, 34 KB, 32 KB."""
        return {16: 4, 8: 6}.get(FORMATS[self.format].bits, 8)

    @property
    def resident(self) -> int:
        """Blocks that an SM must have registers for; the compiler then uses no more than that
        leaves. A quarter of an SM has 16384, for 3 warps of 168 each (tile 8, two groups of weights
        in `SHARE_REGISTERS`) or 2 of 255."""
        three = self.tile == 8 and groups_with_room(self.format) >= 2
        return max(1, (12 if three else 8) // self.warps)

    def grid(self, strips: int, tiles: int) -> tuple[int, int]:
        """Blocks for a matrix of `strips` strips and at most `tiles` tiles. Strips come first: the
        activations of some tiles stay in L2 while an expert's weights stream by."""
        return -(-strips // self.strips), tiles

    @property
    def fragments(self) -> int:
        """C fragments of a strip: of halves, row tiles and columns."""
        return 2 * ROW_TILES * self.columns

    @property
    def stage_bytes(self) -> int:
        """Of activations."""
        return self.tile * STAGE_GROUPS * GROUP * 2

    @property
    def shared_bytes(self) -> int:
        """Sums of ranges, 16 bytes a lane and fragment; or stages, whose place is taken in the end
        by what the two warps of a gate/up strip exchange: half the fragments of each."""
        if not self.staged:
            return self.strips * self.ranges * self.fragments * 512
        return max(self.stages * self.stage_bytes, self.strips * self.fragments // 2 * 512)


def token_tile(pairs: int, experts: int) -> int:
    """Pairs of a tile, from what the host knows: how many pairs there are, and experts to choose.

    The smallest tile that `pairs / experts` rows fill to 90 % at most (Marlin's rule): rows that
    are missing cost tensor-core time only, while an expert that needs a second tile has its weights
    read again, from L2 at best.
    """
    for tile in TOKEN_TILES:
        if pairs <= 0.9 * tile * experts:
            return tile
    return TOKEN_TILES[-1]


def gemm_config(format: str, K: int, tile: int, *, biases: bool, pdl: bool = False) -> GemmConfig:
    """The choice for a matrix of `format` with K inputs.

    Decode (tiles of 8 and 16) waits for memory. What an SM must have on its way is its share of
    bandwidth times latency: 5 KB (RTX 4090) to 18 KB (H100, 3.35 TB/s * 0.7 us / 132). A warp has
    `depth` groups on their way, a group being 1088 bytes (MXFP4) or 4096 (BF16). One token of
    Qwen3-30B has 8 experts * 24 gate/up strips * 4 ranges: 5.8 warps an SM of an H100, which with 4
    groups each are 25 KB; its down projection, 32 strips * 2 ranges, 3.9 warps, so 6 groups: 25 KB.
    Registers have room for so many groups of the formats with few fields, and for two at least.
    A warp has one range if a block of up to 8 warps can hold them all, else as few as can be equal.

    Prefill (32 and 64) computes. A block of 8 warps has 4 strips, 256 rows: for each group it reads
    4 * 1088 bytes of weights and 64 * tile of activations from L2, for 256 * 32 * tile products. Of
    a tile of 64 that is 62 products a byte, where an SM of an H100 multiplies about 1300 and reads
    24 bytes a clock. Half a strip times 64 tokens needs 64 registers for a range's sum and 64 for
    the total, and leaves room for two groups of weights: some 700 clocks of multiplying, enough for
    L2's latency. L2 is asked for them before (`GemmConfig.ahead`).
    """
    ranges = k_ranges(K)
    if tile >= 32 or (tile == 16 and ranges > 24):  # whose sums would not fit shared memory
        strips = min(4, tile // 8)  # as many threads as copy a stage
        return GemmConfig(format, tile, ranges, strips, 0, 4, STAGE_GROUPS, biases, pdl)
    k_warps = -(-ranges // -(-ranges // 8))
    strips = max(1, 4 // k_warps)
    depth = max(2, min(groups_with_room(format), 4 if ranges > 2 else 6))
    return GemmConfig(format, tile, ranges, strips, k_warps, 0, depth, biases, pdl)
