"""The two ceilings of every kernel here: how fast memory is copied, how fast `mma.sync` multiplies.

    python -m bench.gpu_check.ceilings [--points FILE]

Copy counts bytes read and bytes written. The mma rate is that of 16 independent chains a warp and
16 warps a multiprocessor without any loads; torch's bf16 GEMM (wgmma, tcgen05) stands beside it.
"""

from __future__ import annotations

import argparse
import functools

import torch

from bench.gpu_check import mma_rate
from bench.gpu_check.clock import device, on_gpu, time_us
from bench.gpu_check.points import Points


@functools.cache
def copy_rate(nbytes: int = 1 << 30) -> float | None:
    """Bytes a second, read and written; None without a GPU."""
    size = nbytes if on_gpu() else 1 << 16
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    us = time_us([lambda: target.copy_(source)] * 4)
    return None if us is None else size / us * 1e6


@functools.cache
def mma_flops() -> float | None:
    """Floating-point operations a second of `mma.sync`; None without a GPU or our kernels."""
    from hybrid_moe.gpu_kernels.toolchain import availability

    if not availability().usable:
        return None
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    done = mma_rate.run(2 * processors, 4096, device())
    us = time_us([lambda: mma_rate.run(2 * processors, 4096, device())] * 2)
    return None if us is None else done / us * 1e6


def gemm_flops(n: int = 8192) -> float | None:
    """The same of torch's bf16 GEMM."""
    size = n if on_gpu() else 64
    a = torch.randn((size, size), device=device()).bfloat16()
    us = time_us([lambda: a @ a] * 2)
    return None if us is None else 2 * size**3 / us * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", help="write JSON lines there")
    points = Points(parser.parse_args().points)
    for name, unit, measure in (
        ("copy", "bytes/s", copy_rate),
        ("mma.sync", "flop/s", mma_flops),
        ("torch GEMM", "flop/s", gemm_flops),
    ):
        points.add("ceilings", name=name, unit=unit, rate=measure())
    print("ceilings measured" if on_gpu() else "rehearsed: not measured without a GPU")


if __name__ == "__main__":
    main()
