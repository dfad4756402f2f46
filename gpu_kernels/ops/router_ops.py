"""Gating and FP8 kernels as operators of torch: see `ops`."""

# No `from __future__ import annotations`: torch reads an operator's schema from its annotations.

import torch

from hybrid_moe.gpu_kernels import act_quant as quant_kernel
from hybrid_moe.gpu_kernels import gating_soft as soft_kernel
from hybrid_moe.gpu_kernels import gating_switch as switch_kernel
from hybrid_moe.gpu_kernels import gating_topk as topk_kernel
from hybrid_moe.gpu_kernels import weight_dequant as dequant_kernel
from hybrid_moe.gpu_kernels.gating import Gating
from hybrid_moe.gpu_kernels.gating_soft import SoftRouting
from hybrid_moe.gpu_kernels.gating_switch import SwitchRouting

Tensor = torch.Tensor


def gating_topk(
    logits: Tensor, gating: Gating, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`gating_topk.gating_topk` as one node of a graph."""
    ids, weights = torch.ops.hybrid_moe.gpu_gating_topk.default(
        logits,
        bias,
        dtype,
        gating.scoring,
        gating.top_k,
        gating.renormalise,
        gating.scaling,
        gating.groups,
        gating.kept_groups,
    )
    return ids, weights


@torch.library.custom_op("hybrid_moe::gpu_gating_topk", mutates_args=())
def _gating_topk(
    logits: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None,
    scoring: str,
    top_k: int,
    renormalise: bool,
    scaling: float,
    groups: int,
    kept_groups: int,
) -> tuple[Tensor, Tensor]:
    gating = Gating(scoring, top_k, renormalise, scaling, groups, kept_groups)
    return topk_kernel.gating_topk(logits, gating, bias, dtype)


@_gating_topk.register_fake
def _(
    logits: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None,
    scoring: str,
    top_k: int,
    renormalise: bool,
    scaling: float,
    groups: int,
    kept_groups: int,
) -> tuple[Tensor, Tensor]:
    shape = logits.shape[0], top_k
    return (
        logits.new_empty(shape, dtype=torch.int32),
        logits.new_empty(shape, dtype=torch.float32),
    )


def gating_switch(logits: Tensor, capacity: int, dtype: torch.dtype | None = None) -> SwitchRouting:
    """`gating_switch.gating_switch` as one node of a graph."""
    return SwitchRouting(*torch.ops.hybrid_moe.gpu_gating_switch.default(logits, capacity, dtype))


@torch.library.custom_op("hybrid_moe::gpu_gating_switch", mutates_args=())
def _gating_switch(
    logits: Tensor, capacity: int, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    routing = switch_kernel.gating_switch(logits, capacity, dtype)
    return routing.ids, routing.probabilities, routing.routed, routing.kept


@_gating_switch.register_fake
def _(
    logits: Tensor, capacity: int, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, S, E = logits.shape
    return (
        logits.new_empty((B, S), dtype=torch.int32),
        logits.new_empty((B, S), dtype=torch.float32),
        logits.new_empty((B, E), dtype=torch.int32),
        logits.new_empty((B, E), dtype=torch.int32),
    )


def gating_soft(logits: Tensor) -> SoftRouting:
    """`gating_soft.gating_soft` as one node of a graph."""
    return SoftRouting(*torch.ops.hybrid_moe.gpu_gating_soft.default(logits))


@torch.library.custom_op("hybrid_moe::gpu_gating_soft", mutates_args=())
def _gating_soft(logits: Tensor) -> tuple[Tensor, Tensor]:
    routing = soft_kernel.gating_soft(logits)
    return routing.dispatch, routing.combine


@_gating_soft.register_fake
def _(logits: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(logits, dtype=torch.float32),
        torch.empty_like(logits, dtype=torch.float32),
    )


def act_quant(x: Tensor, scale_fmt: str | None = None) -> tuple[Tensor, Tensor]:
    """`act_quant.act_quant` as one node of a graph."""
    y, s = torch.ops.hybrid_moe.gpu_act_quant.default(x, scale_fmt)
    return y, s


@torch.library.custom_op("hybrid_moe::gpu_act_quant", mutates_args=())
def _act_quant(x: Tensor, scale_fmt: str | None) -> tuple[Tensor, Tensor]:
    return quant_kernel.act_quant(x, scale_fmt)


@_act_quant.register_fake
def _(x: Tensor, scale_fmt: str | None) -> tuple[Tensor, Tensor]:
    blocks = -(-x.shape[-1] // quant_kernel.BLOCK)
    return (
        torch.empty_like(x, dtype=torch.float8_e4m3fn),
        x.new_empty((*x.shape[:-1], blocks), dtype=torch.float32),
    )


def weight_dequant(x: Tensor, s: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`weight_dequant.weight_dequant` as one node of a graph."""
    weights: Tensor = torch.ops.hybrid_moe.gpu_weight_dequant.default(x, s, dtype)
    return weights


@torch.library.custom_op("hybrid_moe::gpu_weight_dequant", mutates_args=())
def _weight_dequant(x: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    return dequant_kernel.weight_dequant(x, s, dtype)


@_weight_dequant.register_fake
def _(x: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)
