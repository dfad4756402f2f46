"""A GGUF file's metadata as the `config.json` that it stands for.

Only what `inspect`, `plan` and the loaders ask of a model is here. What Transformers builds a model
from comes from its own reader of GGUF, see `integrations.transformers`.

Source: `gguf.constants.Keys` and Transformers' `GGUF_CONFIG_MAPPING`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hybrid_moe.loaders.gguf.header_bytes import LeftOut, Value

ARCHITECTURE = "general.architecture"

MODEL_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "llama": "mixtral",
        "qwen2moe": "qwen2_moe",
        "qwen3moe": "qwen3_moe",
        "qwen3next": "qwen3_next",
        "qwen35moe": "qwen3_5_moe_text",
        "gpt-oss": "gpt_oss",
        "minimax-m2": "minimax_m2",
        "deepseek2": "deepseek_v3",
        "glm4moe": "glm4_moe",
        "ernie4_5-moe": "ernie4_5_moe",
        "phimoe": "phimoe",
        "olmoe": "olmoe",
        "dots1": "dots1",
        "llama4": "llama4_text",
        "granitemoe": "granitemoe",
    }
)
"""Architecture -> `model_type` of a model with experts ("llama" has them in Mixtral alone); others
are called what GGUF calls them."""

_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_shared_count": "n_shared_experts",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        "leading_dense_block_count": "first_k_dense_replace",
        "nextn_predict_layers": "num_nextn_predict_layers",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.kv_lora_rank": "kv_lora_rank",
        "attention.q_lora_rank": "q_lora_rank",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attention.sliding_window": "sliding_window",
        "full_attention_interval": "full_attention_interval",
        "vocab_size": "vocab_size",
    }
)
"""Key behind the architecture -> name in `config.json`."""

_OWN_NAMES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "mixtral": {"num_experts": "num_local_experts"},
        "gpt_oss": {"num_experts": "num_local_experts"},
        "minimax_m2": {"num_experts": "num_local_experts"},
        "phimoe": {"num_experts": "num_local_experts"},
        "granitemoe": {"num_experts": "num_local_experts"},
        "llama4_text": {"num_experts": "num_local_experts"},
        "deepseek_v3": {"num_experts": "n_routed_experts"},
        "glm4_moe": {"num_experts": "n_routed_experts"},
        "dots1": {"num_experts": "n_routed_experts"},
    }
)
"""`model_type` -> names that the family has of its own."""

_MLA = ("kv_lora_rank", "head_dim")
"""Where the first is there, the second is the compressed key's and no head's."""


def config_of(metadata: Mapping[str, Value]) -> dict[str, Any]:
    """What the metadata states, by the names of `config.json`; empty without an architecture."""
    architecture = metadata.get(ARCHITECTURE)
    if not isinstance(architecture, str) or not architecture:
        return {}
    model_type = MODEL_TYPES.get(architecture, architecture)
    own = _OWN_NAMES.get(model_type, {})
    config: dict[str, Any] = {"model_type": model_type}
    for key, name in _NAMES.items():
        value = metadata.get(f"{architecture}.{key}")
        if value is not None and not isinstance(value, LeftOut):
            config[own.get(name, name)] = list(value) if isinstance(value, tuple) else value
    if all(name in config for name in _MLA):
        del config[_MLA[1]]
    drafts = config.get("num_nextn_predict_layers")
    layers = config.get("num_hidden_layers")
    if type(drafts) is int and type(layers) is int and 0 < drafts < layers:
        config["num_hidden_layers"] = layers - drafts  # llama.cpp counts them
    config["rope_parameters"] = rope_of(metadata)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if "vocab_size" not in config and isinstance(tokens, LeftOut):
        config["vocab_size"] = tokens.count
    return config


_YARN: Mapping[str, str] = MappingProxyType(
    {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
)


def rope_of(metadata: Mapping[str, Value]) -> dict[str, Any]:
    """What the metadata says of rotary embeddings, as Transformers' `rope_parameters`."""
    stem = f"{metadata.get(ARCHITECTURE)}.rope."
    kind = metadata.get(f"{stem}scaling.type")
    rope: dict[str, Any] = {"rope_type": kind if kind in ("yarn", "linear") else "default"}
    theta = metadata.get(f"{stem}freq_base")
    rope["rope_theta"] = theta if isinstance(theta, float) else 10000.0  # llama.cpp's default
    if rope["rope_type"] == "default":
        return rope
    for key, name in _YARN.items():
        value = metadata.get(f"{stem}scaling.{key}")
        if type(value) in (int, float):
            rope[name] = value
    if metadata.get(ARCHITECTURE) == "gpt-oss":
        rope["truncate"] = False  # as the family has it; GGUF has no key for it
    return rope
