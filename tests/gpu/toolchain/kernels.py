"""Small kernels to compile: one that works, and one for each way in which a compiler ends."""

# No `from __future__ import annotations`: the DSL evaluates annotations.

import ctypes
import os
import time
from dataclasses import dataclass
from typing import Any

from hybrid_moe.gpu_kernels.definition import Argument, KernelDefinition


@dataclass(frozen=True)
class Scaling:
    """y[i] = x[i] * factor, `each` floats a thread.

    Attributes:
        trouble: what happens instead of a compilation.
    """

    each: int = 4
    threads: int = 128
    trouble: str = ""


def _trouble(kind: str) -> None:
    if kind == "segmentation fault":
        ctypes.string_at(0)
    if kind == "exit":
        print("I have had enough", flush=True)
        os._exit(3)
    if kind == "error":
        raise ValueError("no such instruction")
    if kind == "endless":
        time.sleep(3600)


def _kernel(config: Scaling) -> Any:
    _trouble(config.trouble)
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float32, Int32, Int64

    class Scale:
        def __init__(self, config: Scaling):
            self.config = config

        @cute.kernel
        def kernel(self, x: cute.Pointer, y: cute.Pointer, n: Int32, factor: Float32):
            thread, _, _ = cute.arch.thread_idx()
            block, _, _ = cute.arch.block_idx()
            i = (Int64(block) * self.config.threads + thread) * self.config.each
            if i < n:
                values = cute.make_rmem_tensor(cute.make_layout(self.config.each), Float32)
                cute.autovec_copy(
                    cute.make_tensor(x + i, cute.make_layout(self.config.each)), values
                )
                for j in cutlass.range_constexpr(self.config.each):
                    values[j] = values[j] * factor
                cute.autovec_copy(
                    values, cute.make_tensor(y + i, cute.make_layout(self.config.each))
                )

        @cute.jit
        def __call__(self, x: cute.Pointer, y: cute.Pointer, n: Int32, factor: Float32, stream):
            self.kernel(x, y, n, factor).launch(
                grid=[1, 1, 1], block=[self.config.threads, 1, 1], stream=stream
            )

    return Scale(config)


def scaling(shared_bytes: int = 0, **choices: Any) -> KernelDefinition:
    """The definition; `shared_bytes` are asked for and not used."""
    config = Scaling(**choices)
    arguments = (
        Argument("x", "f32", 16),
        Argument("y", "f32", 16),
        Argument("n", "i32"),
        Argument("factor", "f32"),
    )
    return KernelDefinition("scale", config, _kernel, arguments, config.threads, shared_bytes)
