"""Which kernels a weight format has: the kernel side of the table in `hybrid_moe.formats.table`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType

from hybrid_moe.cpu_kernels import tuning
from hybrid_moe.cpu_kernels.dsl.emit import KernelBody
from hybrid_moe.cpu_kernels.dsl.tiles import TileConfig
from hybrid_moe.cpu_kernels.kernels import bf16_dot, e4m3_dot, integer_dot, order, tile_dot
from hybrid_moe.cpu_kernels.kernels.encode import BF16_PAIRS, BYTE_PAIRS, Encoding, integer_encoding
from hybrid_moe.cpu_kernels.kernels.group_dot import group_dot
from hybrid_moe.cpu_kernels.kernels.order import Order
from hybrid_moe.cpu_kernels.kernels.scalings import SCALINGS
from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.strips import MOST_BLOCK_TOKENS
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.weight_format import E4M3_CODE, WeightFormat


@dataclass(frozen=True)
class TileKernels:
    """The kernels of one format for tiers with a matrix unit.

    Attributes:
        config: of the tile registers, for all of them.
        dots: M -> dot kernel for 1 to M tokens.
        unpack: kernel that unpacks codes for them; None where packed codes are as good.
        from_tokens: an expert with fewer tokens uses the `direct` kernels, which must have the same
            arithmetic; 1: they serve any number of tokens.
    """

    config: TileConfig
    dots: Mapping[int, KernelBody]
    unpack: KernelBody | None
    from_tokens: int

    def __post_init__(self) -> None:
        if max(self.dots) > MOST_BLOCK_TOKENS:
            raise ValueError(
                f"a block of {max(self.dots)} tokens is beyond the sums' room for "
                f"{MOST_BLOCK_TOKENS}: raise strips.MOST_BLOCK_TOKENS"
            )


@dataclass(frozen=True)
class FormatKernels:
    """The kernels of one format.

    Attributes:
        encoding: of the activations.
        most: (registers, registers of a panel) -> tokens of the largest tile.
        order: (tokens, registers, registers of a panel) -> how that kernel goes.
        direct: (tokens, order) -> dot kernel over packed codes.
        tiled: (tokens, order) -> dot kernel over unpacked codes; None where packed codes are as
            good.
        unpack: kernel that unpacks codes; None with `tiled`.
        unpacked_group_bytes: of one group of a strip, unpacked; 0 with `tiled`.
        chunk_groups: groups of a strip that several tiles meet in turn, while they are in the
            second-level cache.
        tile: kernels for a matrix unit; None where vectors do its work there too.
    """

    encoding: Encoding
    most: Callable[[int, int], int]
    order: Callable[[int, int, int], Order]
    direct: Callable[[int, Order], KernelBody]
    tiled: Callable[[int, Order], KernelBody] | None
    unpack: KernelBody | None
    unpacked_group_bytes: int
    chunk_groups: int
    tile: TileKernels | None

    @property
    def unpacked_bytes(self) -> int:
        """Of the groups that are unpacked at a time."""
        return tuning.UNPACK_GROUPS * self.unpacked_group_bytes


_BF16 = FormatKernels(
    encoding=BF16_PAIRS,
    most=order.bf16_most,
    order=order.bf16_order,
    direct=bf16_dot.bf16_dot,
    tiled=None,
    unpack=None,
    unpacked_group_bytes=0,
    chunk_groups=tuning.BF16_CHUNK_GROUPS,
    tile=TileKernels(
        config=tile_dot.BF16_CONFIG,
        dots={m: tile_dot.bf16_tile_dot(m) for m in (32, 16)},
        unpack=None,
        from_tokens=tuning.BF16_BLOCKS_FROM,
    ),
)


def _mxfp4_tiles() -> TileKernels:
    return TileKernels(
        config=tile_dot.FIXED15_CONFIG,
        dots={16: tile_dot.mxfp4_tile_dot},
        unpack=integer_dot.unpack(MXFP4, 0),
        from_tokens=tuning.MXFP4_BLOCKS_FROM,
    )


def _int8_tiles() -> TileKernels:
    return TileKernels(
        config=tile_dot.FIXED15_CONFIG,
        dots={16: tile_dot.int8_tile_dot},
        unpack=None,
        from_tokens=tuning.INT8_BLOCKS_FROM,
    )


_TILES: Mapping[str, Callable[[], TileKernels]] = MappingProxyType(
    {MXFP4.name: _mxfp4_tiles, INT8.name: _int8_tiles}
)
"""Formats of integer codes with kernels for a matrix unit; the others use vectors there."""


def _integer_kernels(fmt: WeightFormat) -> FormatKernels:
    packed = integer_dot.packed_source(fmt)
    looked_up = fmt.code.bits < 8
    unpacked = integer_dot.unpacked_source(fmt) if looked_up else None
    tiles = _TILES.get(fmt.name)
    return FormatKernels(
        encoding=integer_encoding(integer_dot.encoding_of(fmt)),
        most=order.fixed15_most,
        order=order.fixed15_order,
        direct=partial(group_dot, packed),
        tiled=None if unpacked is None else partial(group_dot, unpacked),
        unpack=integer_dot.unpack(fmt) if looked_up else None,
        unpacked_group_bytes=0 if unpacked is None else unpacked.layout.block_bytes,
        chunk_groups=tuning.chunk_groups(packed.layout),
        tile=None if tiles is None else tiles(),
    )


def _e4m3_kernels(fmt: WeightFormat) -> FormatKernels:
    packed, unpacked = e4m3_dot.packed_source(fmt), e4m3_dot.unpacked_source(fmt)
    return FormatKernels(
        encoding=BYTE_PAIRS,
        most=order.e4m3_most,
        order=order.e4m3_order,
        direct=partial(e4m3_dot.e4m3_dot, packed),
        tiled=partial(e4m3_dot.e4m3_dot, unpacked),
        unpack=e4m3_dot.unpack(fmt),
        unpacked_group_bytes=unpacked.layout.block_bytes,
        chunk_groups=tuning.chunk_groups(packed.layout),
        tile=None,
    )


@lru_cache(maxsize=64)
def format_kernels(fmt: WeightFormat) -> FormatKernels:
    """The kernels of a format.

    Raises:
        NotImplementedError: it has none.
    """
    if fmt is BF16:
        return _BF16
    if fmt.scaling in SCALINGS:
        return _e4m3_kernels(fmt) if fmt.code is E4M3_CODE else _integer_kernels(fmt)
    raise NotImplementedError(f"{fmt.name} has no kernels for processors")


def has_kernels(fmt: WeightFormat) -> bool:
    """Whether processors compute with a format."""
    return fmt is BF16 or fmt.scaling in SCALINGS
