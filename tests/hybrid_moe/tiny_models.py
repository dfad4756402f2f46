"""Tiny random models of each family, as Transformers builds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from hybrid_moe.integrations.transformers.registration import offload

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}


def qwen3_moe() -> Any:
    return transformers.Qwen3MoeConfig(
        **COMMON, head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=96,
        intermediate_size=160, decoder_sparse_step=1, norm_topk_prob=True, tie_word_embeddings=True,
    )  # fmt: skip


def mixtral() -> Any:
    return transformers.MixtralConfig(
        **COMMON, num_local_experts=4, num_experts_per_tok=2, intermediate_size=96
    )


def gpt_oss() -> Any:
    return transformers.GptOssConfig(
        **COMMON, head_dim=16, num_local_experts=8, num_experts_per_tok=2, intermediate_size=64,
        sliding_window=16, swiglu_limit=0.5,
    )  # fmt: skip


def deepseek_v4() -> Any:
    return transformers.DeepseekV4Config(
        **{**COMMON, "num_key_value_heads": 1, "num_hidden_layers": 3}, head_dim=32,
        partial_rotary_factor=0.5, q_lora_rank=32, o_groups=2, o_lora_rank=32, n_routed_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=32, swiglu_limit=0.25, index_n_heads=2,
        index_head_dim=16, index_topk=8, sliding_window=16, hc_mult=2,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention",
                     "heavily_compressed_attention"],
        mlp_layer_types=["hash_moe", "moe", "moe"],
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "gpt_oss": gpt_oss,
    "deepseek_v4": deepseek_v4,
}
"""Clamp limits are far below the published ones, so that tiny random experts reach them."""


SEEDS = {"qwen3_moe": 132, "mixtral": 49, "gpt_oss": 104, "deepseek_v4": 60}
"""Models that decide clearly. A random model now and then has two experts or two tokens that tie
within the roundings that its own arithmetic makes, and then no two correct implementations agree.
With these seeds, BF16 or MXFP4 experts, every choice of an expert and of a token while `prompt()`
is continued by `NEW_TOKENS` tokens leads the next by more than 1.9% of the largest logit, which is
five roundings of BF16, measured on the eager implementation."""

NEW_TOKENS = 10


def build(family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A random model of a family."""
    return random_model(FAMILIES[family](), dtype, SEEDS[family])


def offload_experts(model: Any, method: str, threads: int | None = None) -> Any:
    """`offload` with linear layers and attention as they were, so that they keep their bits."""
    attention = model.config._attn_implementation
    offload(model, method, threads, dense="torch", progress=False)
    model.set_attn_implementation(attention)
    return model


def random_model(config: Any, dtype: torch.dtype, seed: int) -> Any:
    """A model with weights large enough that every layer, experts and router matter."""
    torch.manual_seed(seed)
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            elif "bias" in name:
                parameter.normal_(std=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # hash routing: token -> its experts
                buffer.random_(0, config.n_routed_experts)
    return model.eval()


def prompt(length: int = 6) -> torch.Tensor:
    """Token ids [1, length]."""
    return torch.arange(length)[None] * 7 % COMMON["vocab_size"]  # type: ignore[operator]


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[length, vocabulary] in float32."""
    result: torch.Tensor = model(input_ids=ids).logits[0].float()
    return result


@torch.no_grad()
def greedy(model: Any, ids: torch.Tensor, count: int = NEW_TOKENS) -> list[int]:
    """The `count` tokens that follow `ids`, likeliest each."""
    out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                         attention_mask=torch.ones_like(ids), pad_token_id=0)  # fmt: skip
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens
