"""Which kernels a weight format has: the kernel side of the table in `hybrid_moe.formats.table`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

from hybrid_moe.cpu_kernels import tuning
from hybrid_moe.cpu_kernels.dsl.emit import KernelBody
from hybrid_moe.cpu_kernels.dsl.tiles import TileConfig
from hybrid_moe.cpu_kernels.kernels import bf16_dot, e4m3_dot, integer_dot, order, tile_dot
from hybrid_moe.cpu_kernels.kernels.e4m3_tile_dot import e4m3_tile_dot
from hybrid_moe.cpu_kernels.kernels.encode import BF16_PAIRS, BYTE_PAIRS, Encoding, integer_encoding
from hybrid_moe.cpu_kernels.kernels.group_dot import group_dot
from hybrid_moe.cpu_kernels.kernels.order import Order
from hybrid_moe.cpu_kernels.kernels.scalings import SCALINGS
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
    """The kernels of one format, and of activations of 16 or of 8 bits.

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


def _integer_kernels(fmt: WeightFormat, activation_bits: int) -> FormatKernels:
    packed = integer_dot.packed_source(fmt, activation_bits)
    looked_up = fmt.code.bits < 8
    unpacked = integer_dot.unpacked_source(fmt, activation_bits) if looked_up else None
    encoding = integer_dot.encoding_of(fmt, activation_bits)
    planes = len(encoding.planes)
    return FormatKernels(
        encoding=integer_encoding(encoding),
        most=partial(order.fixed15_most, planes=planes),
        order=partial(order.fixed15_order, planes=planes),
        direct=partial(group_dot, packed),
        tiled=None if unpacked is None else partial(group_dot, unpacked),
        unpack=integer_dot.unpack(fmt) if looked_up else None,
        unpacked_group_bytes=0 if unpacked is None else unpacked.layout.block_bytes,
        chunk_groups=tuning.chunk_groups(packed.layout),
        tile=TileKernels(
            config=tile_dot.integer_config(encoding),
            dots={16: tile_dot.integer_tile_dot(fmt, activation_bits)},
            unpack=integer_dot.unpack(fmt, 0) if looked_up else None,
            from_tokens=tuning.MXFP4_BLOCKS_FROM if looked_up else tuning.INT8_BLOCKS_FROM,
        ),
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
        tile=TileKernels(
            config=tile_dot.BF16_CONFIG,
            dots={m: e4m3_tile_dot(fmt, m) for m in (32, 16)},
            unpack=e4m3_dot.unpack(fmt),
            from_tokens=tuning.E4M3_BLOCKS_FROM,
        ),
    )


@lru_cache(maxsize=128)
def format_kernels(fmt: WeightFormat, activation_bits: int = 16) -> FormatKernels:
    """The kernels of a format.

    Args:
        fmt: of the weights.
        activation_bits: of the activations as they enter the products: 16 or 8.

    Raises:
        ValueError: 8 bits, and products that are not of integers.
        NotImplementedError: it has none.
    """
    if activation_bits not in (8, 16):
        raise ValueError(f"activations of {activation_bits} bits: must be 8 or 16")
    if sums_integers(fmt):
        return _integer_kernels(fmt, activation_bits)
    if activation_bits == 8:
        raise ValueError(
            f"8-bit activations are for weights that are integers: those of {fmt.name} are not"
        )
    if fmt is BF16:
        return _BF16
    if fmt.scaling in SCALINGS:
        return _e4m3_kernels(fmt)
    raise NotImplementedError(f"{fmt.name} has no kernels for processors")


def sums_integers(fmt: WeightFormat) -> bool:
    """Whether codes are integers, so that products sum whole numbers, with the same bits on every
    tier, and activations may have 8 bits."""
    return fmt.scaling in SCALINGS and fmt.code is not E4M3_CODE


def has_kernels(fmt: WeightFormat) -> bool:
    """Whether processors compute with a format."""
    return fmt is BF16 or fmt.scaling in SCALINGS
