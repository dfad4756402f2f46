"""Weights of FP8 (E4M3) with one scale for 128 x 128: y = x * s.

The arithmetic of DeepSeek's `weight_dequant` (inference/kernel.py of DeepSeek-V3): the product in
float32, rounded once to the dtype of the result. Powers of two as scales (ue8m0) leave nothing to
round. The last blocks of a matrix may be short.
"""

# The DSL evaluates annotations in the module's globals: they must not be strings.

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from hybrid_moe.gpu_kernels.definition import Argument, KernelDefinition
from hybrid_moe.gpu_kernels.toolchain import launch

Tensor = torch.Tensor

BLOCK = 128
"""Rows, and columns, that share a scale."""

THREADS = 256

MOST_COLUMNS = 16
"""Of a thread: 16 bytes of codes."""


@dataclass(frozen=True)
class WeightDequantConfig:
    """What the kernel is compiled for.

    Attributes:
        columns: N.
        each: columns of a thread; divides N and a block.
        y: type of the result, "f32" or "bf16".
    """

    columns: int
    each: int
    y: str


def choose_config(columns: int, dtype: torch.dtype) -> WeightDequantConfig:
    """As many columns a thread as one load can bring, where rows are so aligned."""
    each = math.gcd(columns, MOST_COLUMNS)
    return WeightDequantConfig(columns, each, "bf16" if dtype == torch.bfloat16 else "f32")


@functools.cache
def definition(config: WeightDequantConfig) -> KernelDefinition:
    """The kernel. Grid: ceil(M * N / each / THREADS) blocks."""
    size = 2 if config.y == "bf16" else 4
    return KernelDefinition(
        "weight_dequant",
        config,
        _kernel,
        (
            Argument("x", "u8", config.each),  # [M, N], E4M3
            Argument("s", "f32", 4),  # [ceil(M / 128), ceil(N / 128)]
            Argument("y", config.y, min(16, size * config.each)),  # [M, N]
            Argument("rows", "i32"),
        ),
        threads=THREADS,
    )


def _kernel(config: WeightDequantConfig) -> Any:
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float32, Int32, Int64, Uint32, range_constexpr

    N, each = config.columns, config.each
    wide = -(-N // BLOCK)
    result = cutlass.BFloat16 if config.y == "bf16" else Float32

    @cute.jit
    def value_of(code: Uint32) -> Float32:
        """Its bits in the places of a float32's are 2^-120 of it, subnormals included."""
        sign = (code & Uint32(0x80)) << Uint32(24)
        magnitude = ((code & Uint32(0x7F)) << Uint32(20)).bitcast(Float32)
        bits = (magnitude * Float32(2.0**120)).bitcast(Uint32)
        if code & Uint32(0x7F) == Uint32(0x7F):
            bits = Uint32(0x7FC00000)  # NaN; there is no infinity
        return (bits | sign).bitcast(Float32)

    class WeightDequant:
        @cute.kernel
        def kernel(self, x: cute.Pointer, s: cute.Pointer, y: cute.Pointer, rows: Int32) -> None:
            block = Int64(cute.arch.block_idx()[0])
            at = (block * THREADS + cute.arch.thread_idx()[0]) * each
            row, column = at // N, at % N
            if row < rows:
                scale = cute.make_tensor(
                    s + (row // BLOCK * wide + column // BLOCK), cute.make_layout(1)
                )[0]
                source = cute.make_tensor(x + at, cute.make_layout(each))
                codes = cute.make_rmem_tensor_like(source)
                cute.autovec_copy(source, codes)
                values = cute.make_rmem_tensor(cute.make_layout(each), result)
                for i in range_constexpr(each):
                    values[i] = (value_of(codes[i].to(Uint32)) * scale).to(result)
                cute.autovec_copy(values, cute.make_tensor(y + at, cute.make_layout(each)))

        @cute.jit
        def __call__(
            self, x: cute.Pointer, s: cute.Pointer, y: cute.Pointer, rows: Int32, stream: Any
        ) -> None:
            self.kernel(x, s, y, rows).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)

    return WeightDequant()


def weight_dequant_ref(x: Tensor, s: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`weight_dequant` in torch, with the same bits."""
    _check(x, s, dtype)
    M, N = x.shape
    scales = s.float().repeat_interleave(BLOCK, 0)[:M].repeat_interleave(BLOCK, 1)[:, :N]
    return (x.view(torch.float8_e4m3fn).float() * scales).to(dtype)


def weight_dequant(x: Tensor, s: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Weights in float32 or bf16.

    Args:
        x: float8_e4m3fn (or its codes, uint8) [M, N], contiguous.
        s: float32 or float8_e8m0fnu [ceil(M / 128), ceil(N / 128)], contiguous.
        dtype: of the result.

    Returns:
        [M, N] of `dtype`, rounded once.

    Raises:
        TypeError, ValueError: naming the argument, before anything is allocated.
    """
    _check(x, s, dtype)
    if not x.is_cuda:
        return weight_dequant_ref(x, s, dtype)
    return _launched(x, s, dtype)


def _launched(x: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    M, N = x.shape
    config = choose_config(N, dtype)
    y = torch.empty(M, N, dtype=dtype, device=x.device)
    launch(definition(config), (x, s.float(), y, M), -(-M * N // (config.each * THREADS)))
    return y


def _check(x: Tensor, s: Tensor, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"dtype is {dtype}, must be float32 or bfloat16")
    if x.dtype not in (torch.float8_e4m3fn, torch.uint8):
        raise TypeError(f"x is {x.dtype}, must be float8_e4m3fn or uint8")
    if s.dtype not in (torch.float32, torch.float8_e8m0fnu):
        raise TypeError(f"s is {s.dtype}, must be float32 or float8_e8m0fnu")
    if x.ndim != 2:
        raise ValueError(f"x has shape {list(x.shape)}, must be [rows, columns]")
    blocks = [-(-size // BLOCK) for size in x.shape]
    if list(s.shape) != blocks or s.device != x.device:
        raise ValueError(
            f"s has shape {list(s.shape)} on {s.device}, must be {blocks} on {x.device}"
        )
    for name, tensor in (("x", x), ("s", s)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
