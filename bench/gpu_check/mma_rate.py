"""How many products the tensor cores give through `mma.sync`: a kernel that does nothing else."""

# No `from __future__ import annotations`: the DSL reads annotations as objects.

import functools
from dataclasses import dataclass
from typing import Any

import torch

from hybrid_moe.gpu_kernels.definition import Argument, KernelDefinition

FLOP = 2 * 16 * 8 * 16
"""Of one `mma.m16n8k16`."""


@dataclass(frozen=True)
class MmaRateConfig:
    """What the kernel is compiled for.

    Attributes:
        warps: of a block.
        chains: accumulators of a warp; an mma waits for the one before it in its chain.
    """

    warps: int = 8
    chains: int = 16


@functools.cache
def definition(config: MmaRateConfig) -> KernelDefinition:
    """The kernel. Grid: any; each block does rounds * chains * warps mma."""
    arguments = Argument("out", "f32", 4), Argument("rounds", "i32")
    return KernelDefinition("mma_rate", config, _kernel, arguments, threads=32 * config.warps)


def _kernel(config: MmaRateConfig) -> Any:
    import cutlass
    import cutlass.cute as cute
    from cutlass import BFloat16, Float32, Int32, Uint32
    from cutlass.cute.nvgpu import warp

    class MmaRate:
        @cute.kernel
        def kernel(self, out: cute.Pointer, rounds: Int32):
            thread = cute.arch.thread_idx()[0]
            block = cute.arch.block_idx()[0]
            mma = cute.make_mma_atom(warp.MmaF16BF16Op(BFloat16, Float32, (16, 8, 16)))
            a = cute.make_rmem_tensor(cute.make_layout(4), Uint32)
            b = cute.make_rmem_tensor(cute.make_layout(2), Uint32)
            for i in cutlass.range_constexpr(4):
                a[i] = Uint32(thread) * Uint32(0x9E3779B9) & Uint32(0x3F803F80)
            for i in cutlass.range_constexpr(2):
                b[i] = Uint32(thread + i) * Uint32(0x85EBCA6B) & Uint32(0x3F803F80)
            left = cute.make_tensor(
                cute.recast_ptr(a.iterator, dtype=BFloat16), cute.make_layout((8, 1))
            )
            right = cute.make_tensor(
                cute.recast_ptr(b.iterator, dtype=BFloat16), cute.make_layout((4, 1))
            )
            sums = cute.make_rmem_tensor(cute.make_layout((4, config.chains)), Float32)
            sums.fill(0.0)
            for _ in cutlass.range(rounds):
                for chain in cutlass.range_constexpr(config.chains):
                    c = cute.make_tensor(sums[None, chain].iterator, cute.make_layout((4, 1, 1)))
                    cute.gemm(mma, c, left, right, c)
            total = Float32(0)
            for chain in cutlass.range_constexpr(config.chains):
                for i in cutlass.range_constexpr(4):
                    total = total + sums[i, chain]
            place = out + (block * (32 * config.warps) + thread)
            cute.make_tensor(place, cute.make_layout(1))[0] = total

        @cute.jit
        def __call__(self, out: cute.Pointer, rounds: Int32, stream):
            self.kernel(out, rounds).launch(
                grid=[1, 1, 1], block=[32 * config.warps, 1, 1], stream=stream
            )

    return MmaRate()


def run(blocks: int, rounds: int, device: torch.device) -> float:
    """Launch it; returns the floating-point operations of the launch."""
    from hybrid_moe.gpu_kernels.toolchain import launch

    config = MmaRateConfig()
    out = torch.empty(blocks * 32 * config.warps, device=device)
    launch(definition(config), (out, rounds), blocks)
    return float(blocks * config.warps * rounds * config.chains * FLOP)
