"""Which kernels a weight format has: the kernel side of the table in `hybrid_moe.formats.table`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hybrid_moe.cpu_kernels.dsl.emit import KernelBody
from hybrid_moe.cpu_kernels.dsl.ops import BYTE_DOT_OFFSET
from hybrid_moe.cpu_kernels.dsl.tiles import TileConfig
from hybrid_moe.cpu_kernels.kernels import dot, tile_dot
from hybrid_moe.cpu_kernels.kernels.encode import BF16_PAIRS, FIXED15, Encoding
from hybrid_moe.formats.strips import MOST_BLOCK_TOKENS


@dataclass(frozen=True)
class TileKernels:
    """The kernels of one format for tiers with a matrix unit.

    Attributes:
        config: of the tile registers, for all of them.
        dots: M -> dot kernel for 1 to M tokens.
        unpack: kernel that unpacks codes for them; None where packed codes are as good.
        always: they serve any number of tokens. If not, an expert with few tokens uses the
            `direct` kernels, which must have the same arithmetic.
        pass_tokens: an expert with up to as many tokens meets a strip in one pass over all of K.
    """

    config: TileConfig
    dots: Mapping[int, KernelBody]
    unpack: KernelBody | None
    always: bool
    pass_tokens: int

    def __post_init__(self) -> None:
        if max(self.dots) > MOST_BLOCK_TOKENS:
            raise ValueError(
                f"a block of {max(self.dots)} tokens is beyond the sums' room for "
                f"{MOST_BLOCK_TOKENS}: raise panels.MOST_BLOCK_TOKENS"
            )


@dataclass(frozen=True)
class FormatKernels:
    """The kernels of one format.

    Attributes:
        encoding: of the activations.
        direct: M -> dot kernel over packed codes.
        tiled: M -> dot kernel over unpacked codes; None where packed codes are as good.
        unpack: kernel that unpacks codes; None with `tiled`.
        chunk_group_bytes: bytes of one group of a strip as the tiled kernels read it.
        reserved_registers: registers that a dot kernel needs beside its accumulators.
        tile: kernels for a matrix unit.
        chunk_bytes: codes that a pass over many tokens keeps in the cache, of each strip.
    """

    encoding: Encoding
    direct: Callable[[int], KernelBody]
    tiled: Callable[[int], KernelBody] | None
    unpack: KernelBody | None
    chunk_group_bytes: int
    reserved_registers: int
    tile: TileKernels
    chunk_bytes: int = 16 << 10  # half of a 32 KiB first-level cache


FORMAT_KERNELS: Mapping[str, FormatKernels] = MappingProxyType(
    {
        "MXFP4": FormatKernels(
            encoding=FIXED15,
            direct=lambda m: dot.mxfp4_dot(m, unpacked=False),
            tiled=lambda m: dot.mxfp4_dot(m, unpacked=True),
            unpack=dot.mxfp4_unpack(BYTE_DOT_OFFSET),
            chunk_group_bytes=dot.MXFP4_UNPACKED_GROUP_BYTES,
            reserved_registers=4,
            # Cycles for a group of a panel: the matrix unit takes 16 for each plane, whatever the
            # count; vectors take 16 byte products a token, two at a time. They meet at 4 tokens;
            # unpacking through memory and storing the registers cost the blocks as much again.
            tile=TileKernels(
                config=tile_dot.MXFP4_CONFIG,
                dots={16: tile_dot.mxfp4_tile_dot},
                unpack=dot.mxfp4_unpack(0),
                always=False,
                pass_tokens=8,
            ),
        ),
        "BF16": FormatKernels(
            encoding=BF16_PAIRS,
            direct=dot.bf16_dot,
            tiled=None,
            unpack=None,
            chunk_group_bytes=dot.BF16_GROUP_BYTES,
            reserved_registers=8,  # without a bf16 dot product, pairs are widened before they meet
            # Even one token: 16 cycles for 1 KiB of weights is faster than any memory.
            tile=TileKernels(
                config=tile_dot.BF16_CONFIG,
                dots={m: tile_dot.bf16_tile_dot(m) for m in (32, 16)},
                unpack=None,
                always=True,
                pass_tokens=32,
            ),
        ),
    }
)
"""By the name of the format. A new format is a new row here."""
