"""Soft MoE (Puigcerver et al., 2023): every slot is a mixture of all tokens, and every token of all
slots' results.

    dispatch = softmax of the logits over tokens       a slot's input  = sum of dispatch * token
    combine  = softmax of the logits over slots        a token's output = sum of combine * slot

One kernel for both axes. Softmax over slots: a warp takes a token's row. Softmax over tokens: a
block takes 32 columns, one a lane, and its warps take every WARPS-th token. Each thread keeps the
largest logit so far and the sum of exponentials relative to it; shuffles or shared memory join
theirs in a fixed order. The mixtures themselves are matrix products, which torch does.
"""

# The DSL evaluates annotations in the module's globals: they must not be strings.

import functools
from dataclasses import dataclass
from typing import Any

import torch

from hybrid_moe.gpu_kernels.definition import Argument, KernelDefinition
from hybrid_moe.gpu_kernels.toolchain import launch

Tensor = torch.Tensor

WARPS = 8
"""Of a block."""


@dataclass(frozen=True)
class SoftRouting:
    """Weights between T tokens and the experts' slots, of B sequences.

    Attributes:
        dispatch: float32 [B, T, slots]; over the tokens they sum to 1.
        combine: float32 [B, T, slots]; over the slots they sum to 1.
    """

    dispatch: Tensor
    combine: Tensor

    def slots(self, x: Tensor) -> Tensor:
        """Inputs of the slots, [B, slots, H], from tokens [B, T, H]; in the dtype of `x`."""
        return torch.matmul(self.dispatch.mT.to(x.dtype), x)

    def tokens(self, y: Tensor) -> Tensor:
        """Outputs of the tokens, [B, T, H], from the slots' [B, slots, H]; in the dtype of `y`."""
        return torch.matmul(self.combine.to(y.dtype), y)


@dataclass(frozen=True)
class SoftConfig:
    """What the kernel is compiled for.

    Attributes:
        over_tokens: the softmax is over tokens (dispatch), else over slots (combine).
        logits: their type, "f32" or "bf16".
    """

    over_tokens: bool
    logits: str


@functools.cache
def definition(config: SoftConfig) -> KernelDefinition:
    """The kernel. Grid: ceil(T / WARPS) by B blocks; over tokens, ceil(slots / 32) by B."""
    return KernelDefinition(
        "gating_soft",
        config,
        _kernel,
        (
            Argument("logits", config.logits, 2 if config.logits == "bf16" else 4),  # [B, T, slots]
            Argument("weights", "f32", 4),  # [B, T, slots]
            Argument("tokens", "i32"),
            Argument("slots", "i32"),
        ),
        threads=32 * WARPS,
        shared_bytes=2 * 4 * 32 * WARPS,
    )


def _kernel(config: SoftConfig) -> Any:
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float32, Int32, Int64, const_expr, range_constexpr

    LOWEST = -3.4028234663852886e38  # finite: its difference to itself is 0

    @cute.jit
    def at(pointer: cute.Pointer, place: Int64) -> cute.Tensor:
        return cute.make_tensor(pointer + place, cute.make_layout(1))

    @cute.jit
    def joined(most: Float32, total: Float32, other: Float32, its: Float32) -> Any:
        """Two parts of a softmax as one: the largest logit, and the sum relative to it."""
        top = most
        if other > top or other != other:
            top = other
        return top, total * cute.math.exp(most - top) + its * cute.math.exp(other - top)

    class GatingSoft:
        @cute.kernel
        def kernel(
            self, logits: cute.Pointer, weights: cute.Pointer, tokens: Int32, slots: Int32
        ) -> None:
            thread = cute.arch.thread_idx()[0]
            lane, warp = thread % 32, thread // 32
            block, batch, _ = cute.arch.block_idx()
            first = Int64(batch) * tokens * slots
            begin, end = Int32(0), Int32(0)  # of this thread's part of a line, in tokens or slots
            if const_expr(config.over_tokens):
                column = block * 32 + lane
                if column < slots:
                    begin, end = warp, tokens
                first = first + column
            else:
                token = block * WARPS + warp
                if token < tokens:
                    begin, end = lane, slots
                first = first + Int64(token) * slots
            stride = Int64(slots) if const_expr(config.over_tokens) else Int64(1)
            step = WARPS if const_expr(config.over_tokens) else 32

            most, total = Float32(LOWEST), Float32(0.0)
            for i in cutlass.range(begin, end, step):
                logit = at(logits, first + i * stride)[0].to(Float32)
                most, total = joined(most, total, logit, Float32(1.0))
            if const_expr(config.over_tokens):
                memory = cutlass.memory.SmemAllocator()
                tops = memory.allocate_tensor(Float32, cute.make_layout(32 * WARPS))
                sums = memory.allocate_tensor(Float32, cute.make_layout(32 * WARPS))
                tops[thread] = most
                sums[thread] = total
                cute.arch.sync_threads()
                most, total = Float32(LOWEST), Float32(0.0)
                for other in range_constexpr(WARPS):
                    place = 32 * other + lane
                    most, total = joined(most, total, tops[place], sums[place])
            else:
                for bit in range_constexpr(5):
                    other = cute.arch.shuffle_sync_bfly(most, 1 << bit)
                    its = cute.arch.shuffle_sync_bfly(total, 1 << bit)
                    most, total = joined(most, total, other, its)
            for i in cutlass.range(begin, end, step):
                logit = at(logits, first + i * stride)[0].to(Float32)
                at(weights, first + i * stride)[0] = cute.math.exp(logit - most) / total

        @cute.jit
        def __call__(
            self,
            logits: cute.Pointer,
            weights: cute.Pointer,
            tokens: Int32,
            slots: Int32,
            stream: Any,
        ) -> None:
            self.kernel(logits, weights, tokens, slots).launch(
                grid=[1, 1, 1],
                block=[32 * WARPS, 1, 1],
                smem=2 * 4 * 32 * WARPS,
                stream=stream,
            )

    return GatingSoft()


def gating_soft_ref(logits: Tensor) -> SoftRouting:
    """`gating_soft` in torch."""
    _check(logits)
    values = logits.float()
    return SoftRouting(values.softmax(1), values.softmax(2))


def gating_soft(logits: Tensor) -> SoftRouting:
    """The weights of a soft mixture.

    Args:
        logits: float32 or bf16 [B, T, slots], contiguous; slots = experts x slots of an expert.

    Raises:
        TypeError, ValueError: naming the argument, before anything is allocated.
    """
    _check(logits)
    if not logits.is_cuda:
        return gating_soft_ref(logits)
    return _launched(logits)


def _launched(logits: Tensor) -> SoftRouting:
    B, T, slots = logits.shape
    kind = "bf16" if logits.dtype == torch.bfloat16 else "f32"
    found = []
    for over_tokens, lines in ((True, -(-slots // 32)), (False, -(-T // WARPS))):
        weights = torch.empty_like(logits, dtype=torch.float32)
        values = (logits, weights, T, slots)
        launch(definition(SoftConfig(over_tokens, kind)), values, (lines, B))
        found.append(weights)
    return SoftRouting(*found)


def _check(logits: Tensor) -> None:
    if logits.ndim != 3 or logits.shape[2] < 1:
        raise ValueError(f"logits have shape {list(logits.shape)}, must be [batch, tokens, slots]")
    if logits.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"logits are {logits.dtype}, must be float32 or bfloat16")
    if not logits.is_contiguous():
        raise ValueError("logits must be contiguous")
    if logits.shape[0] > 65535:
        raise ValueError(f"logits are of {logits.shape[0]} sequences, must be of at most 65535")
