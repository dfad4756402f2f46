"""Which kernels a weight format has: the kernel side of the table in `hybrid_moe.formats`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hybrid_moe.cpu_kernels.dsl.emit import KernelBody
from hybrid_moe.cpu_kernels.kernels import dot
from hybrid_moe.cpu_kernels.kernels.encode import BF16_PAIRS, FIXED15, Encoding


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
    """

    encoding: Encoding
    direct: Callable[[int], KernelBody]
    tiled: Callable[[int], KernelBody] | None
    unpack: KernelBody | None
    chunk_group_bytes: int
    reserved_registers: int


FORMAT_KERNELS: Mapping[str, FormatKernels] = MappingProxyType(
    {
        "MXFP4": FormatKernels(
            encoding=FIXED15,
            direct=lambda m: dot.mxfp4_dot(m, unpacked=False),
            tiled=lambda m: dot.mxfp4_dot(m, unpacked=True),
            unpack=dot.mxfp4_unpack,
            chunk_group_bytes=dot.MXFP4_UNPACKED_GROUP_BYTES,
            reserved_registers=4,
        ),
        "BF16": FormatKernels(
            encoding=BF16_PAIRS,
            direct=dot.bf16_dot,
            tiled=None,
            unpack=None,
            chunk_group_bytes=dot.BF16_GROUP_BYTES,
            reserved_registers=8,  # without a bf16 dot product, pairs are widened before they meet
        ),
    }
)
"""By the name of the format. A new format is a new row here."""
