"""Activations in FP8 (E4M3), one scale for 128 inputs of a token.

The arithmetic of DeepSeek's `act_quant` (inference/kernel.py of DeepSeek-V3.1, V3.2 and V4; V3's is
the same without the floor, and divides 0 by 0):

    s = max(max|x|, 1e-4) / 448             scale_fmt="ue8m0": the next power of two
    y = e4m3(x / s)                         nearest, ties to even

Division rounds correctly, so y and s have the same bits on a CPU and on every GPU. V3.2 and V4
multiply by a rounded 1/448 where V3 and V3.1 divide, as we do: their s may be the next float32.

With a power of two as scale y * s has four significant bits, and bf16 holds it exactly. So a bf16
GEMM of `fp8_rounded` inputs computes what W8A8 with such scales does, product for product. This is
what the kernel writes in place of codes where `values` is set, as V4's with `inplace=True`.
"""

# The DSL evaluates annotations in the module's globals: they must not be strings.

import functools
from dataclasses import dataclass
from typing import Any

import torch

from hybrid_moe.gpu_kernels.definition import Argument, KernelDefinition
from hybrid_moe.gpu_kernels.toolchain import launch

Tensor = torch.Tensor

BLOCK = 128
"""Inputs that share a scale."""

LARGEST = 448.0
"""Of E4M3."""

FLOOR = 1e-4
"""What max|x| is taken for where it is less."""

PER_LANE = 8
"""Inputs of a lane, 16 bytes in bf16; 16 lanes have a block."""


@dataclass(frozen=True)
class ActQuantConfig:
    """What the kernel is compiled for.

    Attributes:
        inputs: H.
        x: type of the activations, "f32" or "bf16".
        power_of_two: scales are rounded up to one.
        warps: of a thread block.
        values: y * s is written, in the type of x, and no s.
    """

    inputs: int
    x: str
    power_of_two: bool
    warps: int
    values: bool = False


def choose_config(
    inputs: int, x: torch.dtype, tokens: int, power_of_two: bool, values: bool = False
) -> ActQuantConfig:
    """A half warp takes a block. Four warps a thread block once there are enough of them for every
    SM to have two; until then single warps, which spread further."""
    half_warps = tokens * -(-inputs // BLOCK)
    return ActQuantConfig(
        inputs,
        "bf16" if x == torch.bfloat16 else "f32",
        power_of_two,
        4 if half_warps >= 2 * 4 * 2 * 132 else 1,
        values,
    )


@functools.cache
def definition(config: ActQuantConfig) -> KernelDefinition:
    """The kernel. Grid: ceil(T * ceil(H / 128) / (2 * warps)) thread blocks."""
    return KernelDefinition(
        "act_quant",
        config,
        _kernel,
        (
            Argument("x", config.x, 16),  # [T, H]
            Argument("y", config.x, 16) if config.values else Argument("y", "u8", 8),  # [T, H]
            Argument("s", "f32", 4),  # [T, ceil(H / 128)]; null with `values`
            Argument("tokens", "i32"),
        ),
        threads=32 * config.warps,
    )


def _kernel(config: ActQuantConfig) -> Any:
    import cutlass.cute as cute
    from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32, const_expr, range_constexpr

    H = config.inputs
    blocks = -(-H // BLOCK)
    result = {"bf16": BFloat16, "f32": Float32}[config.x] if config.values else Uint8

    @cute.jit
    def nearest(value: Float32) -> Float32:
        """The value of `e4m3(value)`."""
        bits = value.bitcast(Uint32)
        magnitude = bits & Uint32(0x7FFFFFFF)
        kept = magnitude + Uint32(0x7FFFF) + ((magnitude >> Uint32(20)) & Uint32(1))
        kept = kept & Uint32(0xFFF00000)
        if magnitude < Uint32((127 - 6) << 23):
            small = magnitude.bitcast(Float32) + Float32(16384.0)
            kept = (small - Float32(16384.0)).bitcast(Uint32)
        if magnitude > Uint32(0x7F800000):
            kept = magnitude
        return (kept | (bits & Uint32(0x80000000))).bitcast(Float32)

    @cute.jit
    def e4m3(value: Float32) -> Uint32:
        """The nearest code of |value| <= 464, ties to even, or NaN. As hardware before sm_89 lacks
        the conversion, it is the same integer arithmetic on all."""
        bits = value.bitcast(Uint32)
        magnitude = bits & Uint32(0x7FFFFFFF)
        # Normal (from 2^-6): round at bit 20, then the exponent's bias is 7, not 127.
        code = (magnitude + Uint32(0x7FFFF) + ((magnitude >> Uint32(20)) & Uint32(1))) >> Uint32(20)
        code = code - Uint32((127 - 7) << 3)
        if magnitude < Uint32((127 - 6) << 23):
            # Subnormal: the last place of 2^14 is 2^-9, so the sum rounds and holds the code.
            small = magnitude.bitcast(Float32) + Float32(16384.0)
            code = small.bitcast(Uint32) - Uint32((127 + 14) << 23)
        if magnitude > Uint32(0x7F800000):
            code = Uint32(0x7F)
        return code | ((bits >> Uint32(24)) & Uint32(0x80))

    class ActQuant:
        @cute.kernel
        def kernel(self, x: cute.Pointer, y: cute.Pointer, s: cute.Pointer, tokens: Int32) -> None:
            thread = cute.arch.thread_idx()[0]
            lane = thread % 16
            job = Int64(cute.arch.block_idx()[0]) * (2 * config.warps) + thread // 16
            first = Int32(job % blocks) * BLOCK + lane * PER_LANE
            at = job // blocks * H + first
            here = job < Int64(tokens) * blocks and first < H
            values = cute.make_rmem_tensor(cute.make_layout(PER_LANE), Float32)
            most = Uint32(0)  # as integers, magnitudes have their order and NaN is above infinity
            values.fill(0.0)
            if here:
                source = cute.make_tensor(x + at, cute.make_layout(PER_LANE))
                given = cute.make_rmem_tensor_like(source)
                cute.autovec_copy(source, given)
                for i in range_constexpr(PER_LANE):
                    values[i] = given[i].to(Float32)
                    magnitude = values[i].bitcast(Uint32) & Uint32(0x7FFFFFFF)
                    if magnitude > most:
                        most = magnitude
            for step in range_constexpr(4):
                other = cute.arch.shuffle_sync_bfly(most, 1 << step)
                if other > most:
                    most = other
            floor = Float32(FLOOR).bitcast(Uint32)
            if most < floor:
                most = floor
            scale = most.bitcast(Float32) / Float32(LARGEST)
            if const_expr(config.power_of_two):
                bits = scale.bitcast(Uint32)
                if bits < Uint32(0x7F800000):
                    scale = ((bits + Uint32(0x7FFFFF)) & Uint32(0x7F800000)).bitcast(Float32)
            target = cute.make_tensor(y + at, cute.make_layout(PER_LANE))
            results = cute.make_rmem_tensor_like(target)
            for i in range_constexpr(PER_LANE):
                if const_expr(config.values):
                    results[i] = (nearest(values[i] / scale) * scale).to(result)
                else:
                    results[i] = e4m3(values[i] / scale).to(result)
            if here:
                cute.autovec_copy(results, target)
                if const_expr(not config.values):  # noqa: SIM102 - one when compiling, one when running
                    if lane == 0:
                        cute.make_tensor(s + job, cute.make_layout(1))[0] = scale

        @cute.jit
        def __call__(
            self, x: cute.Pointer, y: cute.Pointer, s: cute.Pointer, tokens: Int32, stream: Any
        ) -> None:
            self.kernel(x, y, s, tokens).launch(
                grid=[1, 1, 1], block=[32 * config.warps, 1, 1], stream=stream
            )

    return ActQuant()


def act_quant_ref(x: Tensor, scale_fmt: str | None = None) -> tuple[Tensor, Tensor]:
    """`act_quant` in torch, with the same bits."""
    _check(x, scale_fmt)
    values = _blocks(x.float())
    s = values.abs().amax(-1).clamp_min(FLOOR) / LARGEST
    if scale_fmt is not None:
        fraction, exponent = torch.frexp(s)  # s = fraction * 2^exponent, fraction in [1/2, 1)
        power = torch.ldexp(torch.ones_like(s), exponent - (fraction == 0.5).int())
        s = torch.where(s.isfinite(), power, s)
    y = (values / s[..., None]).to(torch.float8_e4m3fn)
    return y.flatten(-2)[..., : x.shape[-1]].contiguous(), s


def _blocks(x: Tensor) -> Tensor:
    """[..., ceil(H / 128), 128], zeros behind the last."""
    padded: Tensor = torch.nn.functional.pad(x, (0, -x.shape[-1] % BLOCK))
    return padded.view(*x.shape[:-1], padded.shape[-1] // BLOCK, BLOCK)


def act_quant(x: Tensor, scale_fmt: str | None = None) -> tuple[Tensor, Tensor]:
    """Quantise activations to FP8.

    NaN makes its block NaN, in s too; so does infinity, but for its finite neighbours, which are 0.

    Args:
        x: float32 or bf16 [..., H], contiguous; H a multiple of 8. The last block of a token may be
            short of 128 inputs (DeepSeek's must not be).
        scale_fmt: None for float32 scales, "ue8m0" for powers of two.

    Returns:
        y: float8_e4m3fn [..., H].
        s: float32 [..., ceil(H / 128)]; x is about y * s.

    Raises:
        TypeError, ValueError: naming the argument, before anything is allocated.
    """
    _check(x, scale_fmt)
    if not x.is_cuda:
        return act_quant_ref(x, scale_fmt)
    return _quantised(x, power_of_two=scale_fmt is not None)


def _quantised(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    H = x.shape[-1]
    tokens, blocks = x.numel() // H, -(-H // BLOCK)
    config = choose_config(H, x.dtype, tokens, power_of_two)
    y = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    s = x.new_empty(*x.shape[:-1], blocks, dtype=torch.float32)
    launch(definition(config), (x, y, s, tokens), -(-tokens * blocks // (2 * config.warps)))
    return y, s


def fp8_rounded_ref(x: Tensor) -> Tensor:
    """`fp8_rounded` in torch, with the same bits."""
    y, s = act_quant_ref(x, "ue8m0")
    rounded = (_blocks(y.float()) * s[..., None]).flatten(-2)[..., : x.shape[-1]]
    return rounded.to(x.dtype).contiguous()


def rounding_kernel(inputs: int, x: torch.dtype, tokens: int) -> KernelDefinition:
    """The kernel that `fp8_rounded` launches for activations [tokens, inputs]."""
    return definition(choose_config(inputs, x, tokens, power_of_two=True, values=True))


def fp8_rounded(x: Tensor) -> Tensor:
    """Activations as W8A8 has them: quantised with scales that are powers of two, and multiplied
    back, which is exact.

    A rounding to four significant bits is off by at most 2^-4 of a value; below 2^-6 s, by at most
    2^-10 s, where s is at most max|x| / 224 of the block. Of random values that are normally
    distributed the error is 2.6 % (root of mean squares).

    Args:
        x: see `act_quant`.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        TypeError, ValueError: naming the argument, before anything is allocated.
    """
    _check(x, None)
    if not x.is_cuda:
        return fp8_rounded_ref(x)
    return _rounded(x)


def _rounded(x: Tensor) -> Tensor:
    H = x.shape[-1]
    tokens = x.numel() // H
    kernel = rounding_kernel(H, x.dtype, tokens)
    y = torch.empty_like(x)
    half_warps = tokens * -(-H // BLOCK)
    launch(kernel, (x, y, None, tokens), -(-half_warps // (kernel.threads // 16)))
    return y


def _check(x: Tensor, scale_fmt: str | None) -> None:
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"scale_fmt is {scale_fmt!r}, must be None or 'ue8m0'")
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"x is {x.dtype}, must be float32 or bfloat16")
    if x.ndim < 1 or x.shape[-1] < 1 or x.shape[-1] % PER_LANE:
        raise ValueError(
            f"x has shape {list(x.shape)}, its last size must be a multiple of {PER_LANE}"
        )
    if not x.is_contiguous():
        raise ValueError("x must be contiguous")
