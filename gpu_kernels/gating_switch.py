"""Switch routing: every token takes its likeliest expert, and an expert takes so many tokens.

`gating_topk` chooses. The kernel here keeps what fits, as SwitchTransformersTop1Router of
Transformers does: of a sequence's tokens that chose an expert, the first `capacity` keep it. A
thread owns an expert and walks along the sequence's choices, which lie in shared memory, where one
address for a whole warp costs one access. So counts need no atomics and depend on nothing else.
"""

# The DSL evaluates annotations in the module's globals: they must not be strings.

import functools
from dataclasses import dataclass
from typing import Any

import torch

from hybrid_moe.gpu_kernels.definition import Argument, KernelDefinition
from hybrid_moe.gpu_kernels.gating import Gating
from hybrid_moe.gpu_kernels.gating_topk import gating_topk
from hybrid_moe.gpu_kernels.toolchain import launch

Tensor = torch.Tensor

TOP_1 = Gating("switch", top_k=1)

CHUNK = 1024
"""Choices that lie in shared memory at a time."""

STEP = 4
"""Choices of one load."""


@dataclass(frozen=True)
class SwitchRouting:
    """Where the tokens of B sequences of S tokens go.

    Attributes:
        ids: int32 [B, S], the token's expert, -1 for a token that was dropped.
        probabilities: float32 [B, S] of the token's likeliest expert, dropped or not; values of
            the model's dtype.
        routed: int32 [B, E], tokens that chose an expert.
        kept: int32 [B, E], of these, tokens that it takes.
    """

    ids: Tensor
    probabilities: Tensor
    routed: Tensor
    kept: Tensor

    @property
    def dropped(self) -> Tensor:
        """int64 [B], tokens of a sequence without an expert."""
        return (self.routed - self.kept).sum(-1)


@dataclass(frozen=True)
class SwitchConfig:
    """What the kernel is compiled for.

    Attributes:
        experts: E, a thread each.
    """

    experts: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return -(-self.experts // 32) * 32


@functools.cache
def definition(config: SwitchConfig) -> KernelDefinition:
    """The kernel. Grid: B blocks, one a sequence."""
    return KernelDefinition(
        "gating_switch",
        config,
        _kernel,
        (
            Argument("ids", "i32", 4),  # [B, S], choices; dropped ones become -1
            Argument("routed", "i32", 4),  # [B, E]
            Argument("tokens", "i32"),  # S
            Argument("capacity", "i32"),
        ),
        threads=config.threads,
        shared_bytes=4 * CHUNK,
    )


def _kernel(config: SwitchConfig) -> Any:
    import cutlass
    import cutlass.cute as cute
    from cutlass import Int32, Int64, range_constexpr

    class GatingSwitch:
        @cute.kernel
        def kernel(
            self, ids: cute.Pointer, routed: cute.Pointer, tokens: Int32, capacity: Int32
        ) -> None:
            expert = cute.arch.thread_idx()[0]
            sequence = Int64(cute.arch.block_idx()[0])
            memory = cutlass.memory.SmemAllocator()
            choices = memory.allocate_tensor(Int32, cute.make_layout(CHUNK), byte_alignment=16)
            count = Int32(0)
            for start in cutlass.range(0, tokens, CHUNK):
                row = cute.make_tensor(ids + sequence * tokens + start, cute.make_layout(CHUNK))
                for i in cutlass.range(expert, CHUNK, config.threads):
                    choice = Int32(-1)
                    if start + i < tokens:
                        choice = row[i]
                    choices[i] = choice
                cute.arch.sync_threads()
                several = cute.make_rmem_tensor(cute.make_layout(STEP), Int32)
                for i in cutlass.range(0, CHUNK, STEP):
                    place = cute.make_tensor(choices.iterator + i, cute.make_layout(STEP))
                    cute.autovec_copy(place, several)
                    for j in range_constexpr(STEP):
                        if several[j] == expert:
                            count = count + 1
                            if count > capacity:
                                row[i + j] = Int32(-1)
                cute.arch.sync_threads()
            if expert < config.experts:
                place = routed + sequence * config.experts + expert
                cute.make_tensor(place, cute.make_layout(1))[0] = count

        @cute.jit
        def __call__(
            self,
            ids: cute.Pointer,
            routed: cute.Pointer,
            tokens: Int32,
            capacity: Int32,
            stream: Any,
        ) -> None:
            self.kernel(ids, routed, tokens, capacity).launch(
                grid=[1, 1, 1],
                block=[config.threads, 1, 1],
                smem=4 * CHUNK,
                stream=stream,
            )

    return GatingSwitch()


def gating_switch_ref(
    logits: Tensor, capacity: int, dtype: torch.dtype | None = None
) -> SwitchRouting:
    """`gating_switch` in torch."""
    B, S, E = _check(logits, capacity)
    choice, weights = gating_topk(logits.flatten(0, 1), TOP_1, dtype=dtype)
    ids = choice.view(B, S)
    one_hot = torch.nn.functional.one_hot(ids.long(), E)
    place = one_hot.cumsum(1).gather(2, ids.long()[..., None])[..., 0]
    routed = one_hot.sum(1).int()
    ids = ids.masked_fill(place > capacity, -1)
    return SwitchRouting(ids, weights.view(B, S), routed, routed.clamp_max(capacity))


def gating_switch(logits: Tensor, capacity: int, dtype: torch.dtype | None = None) -> SwitchRouting:
    """The expert of every token, within the experts' capacity.

    Args:
        logits: float32 or bf16 [B, S, E], contiguous.
        capacity: tokens of a sequence that an expert takes, 0 or more.
        dtype: the model's, to which probabilities are rounded before the choice; None for that of
            the logits.

    Raises:
        TypeError, ValueError: naming the argument, before anything is allocated.
    """
    _check(logits, capacity)
    if not logits.is_cuda:
        return gating_switch_ref(logits, capacity, dtype)
    return _launched(logits, capacity, dtype)


def _launched(logits: Tensor, capacity: int, dtype: torch.dtype | None) -> SwitchRouting:
    B, S, E = logits.shape
    choice, weights = gating_topk(logits.flatten(0, 1), TOP_1, dtype=dtype)
    routed = torch.empty(B, E, dtype=torch.int32, device=logits.device)
    launch(definition(SwitchConfig(E)), (choice, routed, S, min(capacity, S)), B)
    return SwitchRouting(choice.view(B, S), weights.view(B, S), routed, routed.clamp_max(capacity))


def _check(logits: Tensor, capacity: int) -> tuple[int, int, int]:
    if logits.ndim != 3:
        raise ValueError(
            f"logits have shape {list(logits.shape)}, must be [sequences, tokens, experts]"
        )
    if not logits.is_contiguous():
        raise ValueError("logits must be contiguous")
    TOP_1.check(logits.shape[-1])
    if capacity < 0:
        raise ValueError(f"capacity is {capacity}, must be 0 or more")
    B, S, E = logits.shape
    return B, S, E
