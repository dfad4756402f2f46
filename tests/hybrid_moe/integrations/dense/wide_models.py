"""Tiny models whose layers are wide enough for every kind of dense layer to be taken: q, k and v,
latent attention, shared experts and dense MLPs, linear attention, DeepSeek-V4's grouped layer, a
linear router, tied embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.hybrid_moe.tiny_models import random_model

_COMMON: dict[str, Any] = {
    "vocab_size": 112, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def qwen3_moe() -> Any:
    return transformers.Qwen3MoeConfig(
        **_COMMON, num_key_value_heads=4, head_dim=16, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=96, intermediate_size=160, mlp_only_layers=[1],
        tie_word_embeddings=True,
    )  # fmt: skip


def gpt_oss() -> Any:
    return transformers.GptOssConfig(
        **_COMMON, num_key_value_heads=4, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
        intermediate_size=96, sliding_window=8,
    )  # fmt: skip


def deepseek_v3() -> Any:
    return transformers.DeepseekV3Config(
        **_COMMON, intermediate_size=96, moe_intermediate_size=64, num_key_value_heads=4,
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=64, kv_lora_rank=64, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=32,
    )  # fmt: skip


def deepseek_v4() -> Any:
    return transformers.DeepseekV4Config(
        **_COMMON, moe_intermediate_size=64, head_dim=64, q_lora_rank=64, n_routed_experts=4,
        num_experts_per_tok=2, o_groups=2, o_lora_rank=64, index_n_heads=2, index_head_dim=32,
        index_topk=8, sliding_window=8, partial_rotary_factor=0.5, swiglu_limit=0.5, hc_mult=2,
        mlp_layer_types=["hash_moe", "moe"],
        layer_types=["sliding_attention", "compressed_sparse_attention"],
    )  # fmt: skip


def qwen3_next() -> Any:
    return transformers.Qwen3NextConfig(
        **_COMMON, num_key_value_heads=4, head_dim=16, num_experts=64, num_experts_per_tok=2,
        moe_intermediate_size=32, shared_expert_intermediate_size=64, intermediate_size=96,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip


def afmoe() -> Any:
    return transformers.AfmoeConfig(
        **{**_COMMON, "hidden_size": 96}, num_key_value_heads=4, head_dim=16, num_experts=64,
        num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=64,
        intermediate_size=96, num_dense_layers=1, sliding_window=8, global_attn_every_n_layers=2,
    )  # fmt: skip


WIDE: dict[str, Callable[[], Any]] = {
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek_v3,
    "deepseek_v4": deepseek_v4,
    "qwen3_next": qwen3_next,
    "afmoe": afmoe,
}


def build_wide(family: str, dtype: torch.dtype = torch.bfloat16, seed: int = 5) -> Any:
    """A random model of a family."""
    return random_model(WIDE[family](), dtype, seed)
