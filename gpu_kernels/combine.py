"""Add up each token's experts, with their weights, in the order that the CPU adds them: `combine`.

    out[t] = bf16( sum over hot pairs (e, j) of t, ascending in e, then j: weight * y  + cold[t] )

All in float32 and unfused, as on the CPU (docs/numerics.md): the sum starts at 0, a product is
rounded before it is added, and the CPU's part comes last. The only other rounding is the output's.

A block has one token and some of its columns. The lanes of its first warp hold the token's pairs
and rank them by comparing all with all (k <= 16). Then every thread loads four columns of all hot
rows, 16 bytes each, none waiting for another, and adds them in order.
"""

# No `from __future__ import annotations`: the DSL reads annotations as objects.

import functools
from dataclasses import dataclass
from typing import Any

import torch

from hybrid_moe.formats.strips import GROUP
from hybrid_moe.gpu_kernels.definition import Argument, KernelDefinition, Launch
from hybrid_moe.gpu_kernels.expert_tiles import check_tensor
from hybrid_moe.gpu_kernels.lane_memory import at, vector
from hybrid_moe.gpu_kernels.lane_memory import rounded as rounded_product
from hybrid_moe.gpu_kernels.pack_tokens import check_routing
from hybrid_moe.gpu_kernels.toolchain import has_pdl, launch

Tensor = torch.Tensor


COLUMNS = 4
"""Of a thread: float32 rows are then read in 16-byte loads, 512 bytes a warp in one piece."""


@dataclass(frozen=True)
class CombineConfig:
    """What the kernel is compiled for.

    Attributes:
        k: experts of a token.
        wide_ids: ids are int64, else int32.
        cold: the CPU's part is added.
        threads: of a block: a multiple of 32.
        rounded: the output is bf16, else the float32 sum.
        pdl: launched before the kernel in front has ended (sm_90 and later).
    """

    k: int
    wide_ids: bool
    cold: bool
    threads: int = 128
    rounded: bool = True
    pdl: bool = False


def _kernel(config: CombineConfig) -> Any:
    import cutlass
    import cutlass.cute as cute
    from cutlass import BFloat16, Float32, Int32, Int64
    from cutlass.cute import Pointer, arch

    class Combine:
        def __init__(self, config: CombineConfig) -> None:
            self.config = config

        @cute.jit
        def order(
            self,
            ids: Pointer,
            weights: Pointer,
            slot_of: Pointer,
            token: Int32,
            experts: Int32,
            order: cute.Tensor,
            factors: cute.Tensor,
        ) -> None:
            """One warp: the token's hot pairs in the order of the sum, and their weights; order[k]
            is how many. Behind them stands the first one again: its row is read in vain, but from
            the cache, and a pair that is not hot has no row."""
            lane = arch.thread_idx()[0]
            k = self.config.k
            key = Int32(2**31 - 1)
            factor = Float32(0)
            if lane < k:
                place = Int64(token) * k + lane
                given = at(ids, place)[0]
                factor = at(weights, place)[0]
                if given >= 0 and given < experts:
                    expert = Int32(given)
                    if at(slot_of, expert)[0] >= 0:
                        key = expert
            rank = Int32(0)
            hot = Int32(0)
            least = Int32(2**31 - 1)
            first = Int32(0)
            for j in cutlass.range_constexpr(k):
                other = arch.shuffle_sync(key, j)
                rank = rank + Int32(other < key or (other == key and j < lane))
                hot = hot + Int32(other < 2**31 - 1)
                first = Int32(j) if other < least else first
                least = cutlass.min(other, least)
            if lane < k:
                order[rank] = lane if key < 2**31 - 1 else first
                factors[rank] = factor
            if lane == 0:
                order[k] = hot

        @cute.kernel
        def kernel(
            self,
            y: Pointer,
            ids: Pointer,
            weights: Pointer,
            slot_of: Pointer,
            cold: Pointer,
            out: Pointer,
            H: Int32,
            experts: Int32,
        ) -> None:
            thread = arch.thread_idx()[0]
            token, part, _ = arch.block_idx()
            k = self.config.k
            memory = cutlass.memory.SmemAllocator()
            order = memory.allocate_tensor(Int32, cute.make_layout(k + 1), byte_alignment=16)
            factors = memory.allocate_tensor(Float32, cute.make_layout(k), byte_alignment=16)
            if cutlass.const_expr(self.config.pdl):
                arch.griddepcontrol_wait()
                arch.griddepcontrol_launch_dependents()
            if thread < 32:
                self.order(ids, weights, slot_of, token, experts, order, factors)
            arch.sync_threads()
            column = (part * self.config.threads + thread) * COLUMNS
            if column < H:
                total = cute.make_rmem_tensor(cute.make_layout(COLUMNS), Float32)
                total.fill(0.0)
                hot = order[k]
                if hot > 0:
                    rows = cute.make_rmem_tensor(cute.make_layout((COLUMNS, k)), Float32)
                    for place in cutlass.range_constexpr(k):
                        row = (Int64(token) * k + order[place]) * (H // COLUMNS)
                        at_row = y + (row + column // COLUMNS) * COLUMNS
                        cute.autovec_copy(vector(at_row, COLUMNS), rows[None, place])
                    for place in cutlass.range_constexpr(k):
                        factor = factors[place]
                        for i in cutlass.range_constexpr(COLUMNS):
                            added = total[i] + rounded_product(factor, rows[i, place])
                            total[i] = added if place < hot else total[i]
                if cutlass.const_expr(self.config.cold):
                    extra = cute.make_rmem_tensor(cute.make_layout(COLUMNS), Float32)
                    row = Int64(token) * (H // COLUMNS) + column // COLUMNS
                    cute.autovec_copy(vector(cold + row * COLUMNS, COLUMNS), extra)
                    for i in cutlass.range_constexpr(COLUMNS):
                        total[i] = total[i] + extra[i]
                row = Int64(token) * (H // COLUMNS) + column // COLUMNS
                if cutlass.const_expr(self.config.rounded):
                    rounded = cute.make_rmem_tensor(cute.make_layout(COLUMNS), BFloat16)
                    rounded.store(total.load().to(BFloat16))
                    cute.autovec_copy(rounded, vector(out + row * COLUMNS, COLUMNS))
                else:
                    cute.autovec_copy(total, vector(out + row * COLUMNS, COLUMNS))

        @cute.jit
        def __call__(
            self,
            y: Pointer,
            ids: Pointer,
            weights: Pointer,
            slot_of: Pointer,
            cold: Pointer,
            out: Pointer,
            H: Int32,
            experts: Int32,
            stream: Any,
        ) -> None:
            self.kernel(y, ids, weights, slot_of, cold, out, H, experts).launch(
                grid=[1, 1, 1], block=[config.threads, 1, 1], stream=stream
            )

    return Combine(config)


@functools.lru_cache(maxsize=64)
def combine_definition(config: CombineConfig) -> KernelDefinition:
    """The kernel, grid (tokens, ceil(H / (4 * threads))). Without `config.cold`, `cold` is null."""
    arguments = (
        Argument("y", "f32", 16),
        Argument("ids", "i64", 8) if config.wide_ids else Argument("ids", "i32", 4),
        Argument("weights", "f32", 4),
        Argument("slot_of", "i32", 4),
        Argument("cold", "f32", 16),
        Argument("out", "bf16" if config.rounded else "f32", 16),
        Argument("H", "i32"),
        Argument("experts", "i32"),
    )
    shared_bytes = 16 * (-(-(config.k + 1) // 4)) + 4 * config.k
    return KernelDefinition("combine", config, _kernel, arguments, config.threads, shared_bytes)


def combine_ref(
    y: Tensor,
    ids: Tensor,
    weights: Tensor,
    slot_of: Tensor,
    cold: Tensor | None = None,
    *,
    rounded: bool = True,
) -> Tensor:
    """`combine` in torch: any device, no value read by the host, bit for bit.

    Raises:
        TypeError, ValueError: see `combine`.
    """
    _check(y, ids, weights, slot_of, cold)
    (tokens, k), experts, H = ids.shape, len(slot_of), y.shape[1]
    known = (ids >= 0) & (ids < experts)
    hot = known & (slot_of[ids.long().clamp(0, experts - 1)] >= 0)
    # Stable: of equal ids the smaller j comes first. What does not count comes last.
    order = torch.where(hot, ids.long(), experts).sort(dim=1, stable=True).indices
    first_pair = torch.arange(tokens, device=y.device) * k
    total = torch.zeros(tokens, H, dtype=torch.float32, device=y.device)
    for place in range(k):
        j = order[:, place : place + 1]
        part = weights.gather(1, j) * y[first_pair + j[:, 0]]  # rounded: not fused with the sum
        # Rows of pairs that do not count were never written, and may be NaN.
        total = torch.where(hot.gather(1, j), total + part, total)
    total = total if cold is None else total + cold
    return total.to(torch.bfloat16) if rounded else total


def _check(y: Tensor, ids: Tensor, weights: Tensor, slot_of: Tensor, cold: Tensor | None) -> None:
    tokens = ids.shape[0] if ids.dim() else 0
    check_routing(ids, slot_of, tokens, y.device)
    H = y.shape[1] if y.dim() == 2 else 0
    if not H or H % GROUP:
        raise ValueError(
            f"y has shape {tuple(y.shape)}, must be ({ids.numel()}, H), a row for each of ids, H a "
            f"positive multiple of {GROUP}"
        )
    check_tensor("y", y, torch.float32, (ids.numel(), H), y.device)
    check_tensor("weights", weights, torch.float32, tuple(ids.shape), y.device)
    if cold is not None:
        check_tensor("cold", cold, torch.float32, (tokens, H), y.device)


def combine_launch(
    y: Tensor,
    ids: Tensor,
    weights: Tensor,
    slot_of: Tensor,
    cold: Tensor | None,
    out: Tensor,
    *,
    threads: int = 128,
    pdl: bool = False,
) -> Launch:
    """The launch that fills `out`, bf16 or float32 [T, H].

    With 128 threads a block has 512 columns, so that one token of H = 4096 has 8 blocks, each
    with k rows of 2 KB on their way: few bytes on few SMs, but each waits about once. More blocks
    sort the token's pairs more often.
    """
    (tokens, k), H = ids.shape, y.shape[1]
    rounded = out.dtype == torch.bfloat16
    config = CombineConfig(k, ids.dtype == torch.int64, cold is not None, threads, rounded, pdl)
    values = (y, ids, weights, slot_of, cold, out, H, len(slot_of))
    return Launch(combine_definition(config), values, (tokens, -(-H // (threads * COLUMNS))))


def combine(
    y: Tensor,
    ids: Tensor,
    weights: Tensor,
    slot_of: Tensor,
    cold: Tensor | None = None,
    *,
    rounded: bool = True,
) -> Tensor:
    """Add up the hot experts of each token and the CPU's part: bf16 [T, H].

    Args:
        y: float32 [T * k, H], H a multiple of 32: the row of each pair, not yet weighted. Rows of
            pairs whose expert has no slot are not read.
        ids: int32 or int64 [T, k], k up to 16.
        weights: float32 [T, k].
        slot_of: int32 [E]: the slot of each expert, -1 if it has none.
        cold: float32 [T, H], the sum of the other experts, or None.
        rounded: False returns the sum in float32, to which more is to be added.

    All tensors are contiguous and on one device.

    Raises:
        TypeError, ValueError: naming the argument, before anything is allocated.
    """
    if y.device.type != "cuda":
        return combine_ref(y, ids, weights, slot_of, cold, rounded=rounded)
    _check(y, ids, weights, slot_of, cold)
    dtype = torch.bfloat16 if rounded else torch.float32
    out = y.new_empty((ids.shape[0], y.shape[1]), dtype=dtype)
    pdl = has_pdl(y.device)
    launch(*combine_launch(y, ids, weights, slot_of, cold, out, pdl=pdl), pdl=pdl)
    return out
