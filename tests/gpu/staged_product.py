"""A small kernel that does what the grouped GEMMs do, for tests of the simulator that break it.

    c[m, n] = sum over k of a[rows[m], k] * b[n, k]         m of 16, n of 16 * blocks, float32

A block has two warps, 8 columns each. Rows of `a` come through shared memory, 64 inputs a stage, by
cp.async two stages ahead; chunk j of a row (16 bytes) lies at j ^ (row & 7), so that the lanes of a
fragment meet all 32 banks.
"""

# No `from __future__ import annotations`: the DSL reads annotations as objects.

from dataclasses import dataclass
from typing import Any

from hybrid_moe.gpu_kernels.definition import Argument, KernelDefinition

STAGES = 3
CHUNKS = 8
THREADS = 64


@dataclass(frozen=True)
class ProductConfig:
    """What may be wrong.

    Attributes:
        stored: where a chunk is put: j ^ (row & stored).
        loaded: where it is looked for.
        shift: added to the lane that a fragment's place is computed from.
        places: in shared memory; two stages are on their way while one is read.
    """

    stored: int = 7
    loaded: int = 7
    shift: int = 0
    places: int = STAGES


def definition(config: ProductConfig) -> KernelDefinition:
    """Grid: N / 16 blocks."""
    arguments = (
        Argument("a", "bf16", 16),
        Argument("rows", "i32", 4),
        Argument("b", "bf16", 16),
        Argument("c", "f32", 8),
        Argument("K", "i32"),
        Argument("N", "i32"),
    )
    return KernelDefinition("product", config, _kernel, arguments, THREADS, STAGES * 2048)


def _kernel(config: ProductConfig) -> Any:
    import cutlass
    import cutlass.cute as cute
    from cutlass import BFloat16, Float32, Int32, Int64, Uint32
    from cutlass.cute import arch
    from cutlass.cute.nvgpu import cpasync, warp

    Pointer = cute.Pointer

    class Product:
        @cute.jit
        def copy(
            self, a: Pointer, rows: Pointer, x: cute.Tensor, stage: Int32, stages: Int32, K: Int32
        ) -> None:
            atom = cute.make_copy_atom(
                cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL),
                BFloat16,
                num_bits_per_copy=128,
            )
            chunk, first = arch.thread_idx()[0] % CHUNKS, arch.thread_idx()[0] // CHUNKS
            if stage < stages:
                for i in cutlass.range_constexpr(2):
                    row = first + 8 * i
                    number = cute.make_tensor(rows + row, cute.make_layout(1))[0]
                    at = a.toint() + 2 * (Int64(number) * K + (stage * CHUNKS + chunk) * 8)
                    source = cute.make_ptr(BFloat16, at, cute.AddressSpace.gmem, assumed_align=16)
                    target = x[None, chunk ^ (row & config.stored), row, stage % config.places]
                    cute.copy(atom, cute.make_tensor(source, cute.make_layout(8)), target)
            arch.cp_async_commit_group()

        @cute.kernel
        def kernel(
            self, a: Pointer, rows: Pointer, b: Pointer, c: Pointer, K: Int32, N: Int32
        ) -> None:
            thread = arch.thread_idx()[0]
            lane = (thread + config.shift) % 32
            g, q = lane // 4, lane % 4
            column = arch.block_idx()[0] * 16 + thread // 32 * 8
            x = cutlass.memory.SmemAllocator().allocate_tensor(
                BFloat16, cute.make_layout((8, CHUNKS, 16, STAGES)), byte_alignment=128
            )
            mma = cute.make_mma_atom(warp.MmaF16BF16Op(BFloat16, Float32, (16, 8, 16)))
            sums = cute.make_rmem_tensor(cute.make_layout((4, 1, 1)), Float32)
            sums.fill(0.0)
            left = cute.make_rmem_tensor(cute.make_layout(4), Uint32)
            right = cute.make_rmem_tensor(cute.make_layout(2), Uint32)
            stages = K // 64
            self.copy(a, rows, x, Int32(0), stages, K)
            self.copy(a, rows, x, Int32(1), stages, K)
            for stage in cutlass.range(0, stages, 1, unroll=1):
                arch.cp_async_wait_group(STAGES - 2)
                arch.sync_threads()
                self.copy(a, rows, x, stage + 2, stages, K)
                for step in cutlass.range_constexpr(4):
                    for i in cutlass.range_constexpr(4):
                        row, chunk = g + 8 * (i & 1), 2 * step + i // 2
                        piece = x[None, chunk ^ (row & config.loaded), row, stage % config.places]
                        left[i] = cute.recast_tensor(piece, Uint32)[q]
                    for i in cutlass.range_constexpr(2):
                        at = (column + thread % 32 // 4) * K + stage * 64 + step * 16 + 8 * i
                        word = cute.recast_ptr(b, dtype=Uint32) + at // 2 + thread % 4
                        right[i] = cute.make_tensor(word, cute.make_layout(1))[0]
                    cute.gemm(
                        mma,
                        sums,
                        cute.make_tensor(
                            cute.recast_ptr(left.iterator, dtype=BFloat16), cute.make_layout((8, 1))
                        ),
                        cute.make_tensor(
                            cute.recast_ptr(right.iterator, dtype=BFloat16),
                            cute.make_layout((4, 1)),
                        ),
                        sums,
                    )
            for i in cutlass.range_constexpr(2):
                at = (thread % 32 // 4 + 8 * i) * N + column + 2 * (thread % 4)
                for e in cutlass.range_constexpr(2):
                    cute.make_tensor(c + (at + e), cute.make_layout(1))[0] = sums[2 * i + e, 0, 0]

        @cute.jit
        def __call__(
            self, a: Pointer, rows: Pointer, b: Pointer, c: Pointer, K: Int32, N: Int32, stream: Any
        ) -> None:
            self.kernel(a, rows, b, c, K, N).launch(
                grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream
            )

    return Product()
