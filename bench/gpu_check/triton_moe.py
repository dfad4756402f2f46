"""A grouped GEMM in Triton: the baseline, written as fused MoE kernels usually are.

A program has one tile of pairs of one expert and BLOCK_N output rows. BF16 weights go through
`tl.dot`; MXFP4 codes and scales, [E, N, K / 2] and [E, N, K / 32] as checkpoints have them, through
`tl.dot_scaled`. Tiles are made by the host before the time begins. The best of `CONFIGS` counts.
"""

# No `from __future__ import annotations`: Triton reads annotations as objects.

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from bench.gpu_check.workload import Batch, Model
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout

Tensor = torch.Tensor

CONFIGS = ((64, 64, 4, 3), (128, 64, 4, 4), (64, 128, 8, 3))
"""BLOCK_N, BLOCK_K, warps, stages."""


@triton.jit
def grouped(
    x, w, scales, out, tile_expert, tile_rows, N, K, pairs_per_row,
    MXFP4: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[pair] = W[expert] x[pair // pairs_per_row] for the pairs of a tile."""
    tile = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    rows = tl.load(tile_rows + tile * BLOCK_T + tl.arange(0, BLOCK_T))
    tokens = tl.where(rows >= 0, rows, 0) // pairs_per_row
    k = tl.arange(0, BLOCK_K)
    at_x = x + tokens.to(tl.int64)[:, None] * K + k[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    valid_n = n < N
    for start in range(0, K, BLOCK_K):
        left = tl.load(at_x + start, mask=(start + k < K)[None, :], other=0.0)
        if MXFP4:
            half = tl.arange(0, BLOCK_K // 2)
            at_w = w + (expert * N + n[None, :]) * (K // 2) + start // 2 + half[:, None]
            valid = (start // 2 + half < K // 2)[:, None] & valid_n[None, :]
            codes = tl.load(at_w, mask=valid, other=0)
            group = tl.arange(0, BLOCK_K // 32)
            at_s = scales + (expert * N + n[:, None]) * (K // 32) + start // 32 + group[None, :]
            valid = (start // 32 + group < K // 32)[None, :] & valid_n[:, None]
            scale = tl.load(at_s, mask=valid, other=127)
            total = tl.dot_scaled(left, None, "bf16", codes, scale, "e2m1", total)
        else:
            at_w = w + (expert * N + n[None, :]) * K + start + k[:, None]
            valid = (start + k < K)[:, None] & valid_n[None, :]
            total = tl.dot(left, tl.load(at_w, mask=valid, other=0.0), total)
    valid = (rows >= 0)[:, None] & valid_n[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * N + n[None, :], total.to(tl.bfloat16), mask=valid)


@triton.jit
def activate(both, h, count, I, limit, alpha, offset, BLOCK: tl.constexpr):
    """h = SwiGLU of the halves of `both`, [pairs, 2 I]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = both + (i // I).to(tl.int64) * (2 * I) + i % I
    gate = tl.minimum(tl.load(at, mask=i < count).to(tl.float32), limit)
    up = tl.load(at + I, mask=i < count).to(tl.float32)
    up = tl.maximum(tl.minimum(up, limit), -limit)
    value = gate * tl.sigmoid(alpha * gate) * (up + offset)
    tl.store(h + i, value.to(tl.bfloat16), mask=i < count)


def tiles_of(ids: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Expert of each tile, and its pairs [tiles, tile], then -1."""
    flat, experts, rows = ids.flatten(), [], []
    for expert in flat.unique().tolist():
        for pairs in (flat == expert).nonzero().flatten().int().split(tile):
            experts.append(expert)
            rows.append(torch.nn.functional.pad(pairs, (0, tile - len(pairs)), value=-1))
    return torch.tensor(experts, dtype=torch.int32, device=ids.device), torch.stack(rows)


def weights(layout: SlotLayout, model: Model, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Random (codes, scales) of gate and up, and of down, in the checkpoint's order; for BF16 the
    weights twice."""
    made = []
    for N, K in ((2 * model.intermediate, model.hidden), (model.hidden, model.intermediate)):
        if layout.formats.name == "BF16":
            w = 0.02 * torch.randn((model.experts, N, K), device=like.device, dtype=torch.bfloat16)
            made.append((w, w))
        else:
            codes = like.new_empty((model.experts, N, K // 2)).random_(0, 256)
            made.append((codes, like.new_empty((model.experts, N, K // 32)).random_(119, 122)))
    return made


def calls(
    layout: SlotLayout,
    model: Model,
    batches: Sequence[Batch],
    parts: list[tuple[Tensor, Tensor]],
    config: tuple[int, int, int, int],
) -> list[Callable[[], object]]:
    """Both GEMMs and the activation, for each batch."""
    block_n, block_k, warps, stages = config
    pairs = batches[0].ids.numel()
    average = pairs / model.experts
    tile = next((t for t in (16, 32, 64) if average <= 0.9 * t), 128)
    shape: dict[str, Any] = {
        "MXFP4": layout.formats.name == "MXFP4", "BLOCK_T": tile, "BLOCK_N": block_n,
        "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    H, I = model.hidden, model.intermediate
    limit, alpha, offset = model.activation.parameters

    def of(batch: Batch) -> Callable[[], object]:
        experts, rows = tiles_of(batch.ids, tile)

        def run() -> Tensor:
            both = batch.x.new_empty((pairs, 2 * I))
            h, y = batch.x.new_empty((pairs, I)), batch.x.new_empty((pairs, H))
            grid = (triton.cdiv(2 * I, block_n), len(experts))
            tables = experts, rows
            grouped[grid](batch.x, *parts[0], both, *tables, 2 * I, H, model.top_k, **shape)
            blocks = (triton.cdiv(pairs * I, 1024),)
            activate[blocks](both, h, pairs * I, I, min(limit, 3e38), alpha, offset, BLOCK=1024)
            grid = (triton.cdiv(H, block_n), len(experts))
            grouped[grid](h, *parts[1], y, *tables, H, I, 1, **shape)
            return y

        return run

    return [of(batch) for batch in batches]
