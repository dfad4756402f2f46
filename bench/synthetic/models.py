"""The models whose synthetic checkpoints can be made: `config.json` and tensors as published.

Dimensions are those of openai/gpt-oss-20b and Qwen/Qwen3-30B-A3B on the hub. Weights are drawn so
that every matrix keeps the size of what it multiplies: inputs of variance 1 give outputs of
variance 1. So the residual grows by about 1 a layer, nothing overflows, and a router of random rows
spreads tokens over its experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from hybrid_moe.loaders.writer import PlannedTensor

GROUP = 32
E2M1_RMS = 2.926
"""Root mean square of the 16 values that 4 random bits stand for: sqrt(68.5 / 8)."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint, and what fills it.

    Attributes:
        plan: key, dtype and shape.
        fill: "normal" (BF16, cut off, not rounded), "ones" (BF16), "codes" (random nibbles) or
            "scales" (random E8M0 bytes).
        scale: standard deviation of "normal"; of "scales" that of the weights, with "codes".
    """

    plan: PlannedTensor
    fill: Literal["normal", "ones", "codes", "scales"]
    scale: float = 1.0


@dataclass(frozen=True)
class Synthetic:
    """A model. `tensors` derives from `config` alone."""

    name: str
    config: Mapping[str, Any]
    tensors: Callable[[Mapping[str, Any]], Iterator[Tensor]]

    def with_vocabulary(self, size: int) -> Synthetic:
        """The same with embeddings and `lm_head` of `size` rows, under a name of its own."""
        if size == self.config["vocab_size"]:
            return self
        return replace(self, name=f"{self.name}-{size}", config={**self.config, "vocab_size": size})

    def list_tensors(self) -> list[Tensor]:
        """All of them, in the order of the files."""
        return list(self.tensors(self.config))


def _linear(key: str, rows: int, inputs: int, bias: bool = False) -> Iterator[Tensor]:
    yield Tensor(PlannedTensor(f"{key}.weight", "BF16", (rows, inputs)), "normal", inputs**-0.5)
    if bias:
        yield Tensor(PlannedTensor(f"{key}.bias", "BF16", (rows,)), "normal", 0.1)


def _norm(key: str, size: int) -> Tensor:
    return Tensor(PlannedTensor(f"{key}.weight", "BF16", (size,)), "ones")


def _attention(config: Mapping[str, Any], key: str) -> Iterator[Tensor]:
    hidden, head, bias = config["hidden_size"], config["head_dim"], config["attention_bias"]
    queries = head * config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]
    yield from _linear(f"{key}.q_proj", queries, hidden, bias)
    yield from _linear(f"{key}.k_proj", keys, hidden, bias)
    yield from _linear(f"{key}.v_proj", keys, hidden, bias)
    yield from _linear(f"{key}.o_proj", hidden, queries, bias)


def _outside_layers(config: Mapping[str, Any]) -> Iterator[Tensor]:
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    table = PlannedTensor("model.embed_tokens.weight", "BF16", (vocabulary, hidden))
    yield Tensor(table, "normal", 1.0)
    yield _norm("model.norm", hidden)
    yield from _linear("lm_head", vocabulary, hidden)


def gpt_oss_tensors(config: Mapping[str, Any]) -> Iterator[Tensor]:
    """gpt-oss's release: fused experts `*_blocks` [E, N, K/32, 16] and `*_scales` [E, N, K/32],
    rows of gate and up in turn."""
    H, I, E = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield from _attention(config, f"{layer}.self_attn")
        sinks = PlannedTensor(f"{layer}.self_attn.sinks", "BF16", (config["num_attention_heads"],))
        yield Tensor(sinks, "normal", 1.0)
        yield _norm(f"{layer}.input_layernorm", H)
        yield _norm(f"{layer}.post_attention_layernorm", H)
        yield from _linear(f"{layer}.mlp.router", E, H, bias=True)
        for name, N, K in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
            stem = f"{layer}.mlp.experts.{name}"
            groups = (E, N, K // GROUP)
            yield Tensor(PlannedTensor(f"{stem}_blocks", "U8", (*groups, GROUP // 2)), "codes")
            yield Tensor(PlannedTensor(f"{stem}_scales", "U8", groups), "scales", K**-0.5)
            yield Tensor(PlannedTensor(f"{stem}_bias", "BF16", (E, N)), "normal", 0.1)
    yield from _outside_layers(config)


def qwen3_moe_tensors(config: Mapping[str, Any]) -> Iterator[Tensor]:
    """Qwen3-MoE with MXFP4 experts, as `hybrid-moe convert` writes it: each expert for itself,
    `weight` [N, K/2] and `weight_scale` [N, K/32]."""
    H, I, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield from _attention(config, f"{layer}.self_attn")
        yield _norm(f"{layer}.self_attn.q_norm", head)
        yield _norm(f"{layer}.self_attn.k_norm", head)
        yield _norm(f"{layer}.input_layernorm", H)
        yield _norm(f"{layer}.post_attention_layernorm", H)
        yield from _linear(f"{layer}.mlp.gate", config["num_experts"], H)
        for expert in range(config["num_experts"]):
            for name, N, K in (("gate_proj", I, H), ("up_proj", I, H), ("down_proj", H, I)):
                stem = f"{layer}.mlp.experts.{expert}.{name}"
                yield Tensor(PlannedTensor(f"{stem}.weight", "U8", (N, K // 2)), "codes")
                scales = PlannedTensor(f"{stem}.weight_scale", "U8", (N, K // GROUP))
                yield Tensor(scales, "scales", K**-0.5)
    yield from _outside_layers(config)


def scale_byte(std: float) -> int:
    """The E8M0 byte with which random codes have about this standard deviation."""
    return 127 + round(math.log2(std / E2M1_RMS))


_GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": None,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "pad_token_id": None,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_theta": 150000.0,
        "rope_type": "yarn",
        "truncate": False,
    },
    "sliding_window": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}
_SMALL = {
    **_GPT_OSS_20B,
    "hidden_size": 512,
    "intermediate_size": 256,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 4096,
}
_QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "hybrid_moe": {"experts": "MXFP4", "group": GROUP},
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

MODELS: Mapping[str, Synthetic] = MappingProxyType(
    {
        model.name: model
        for model in (
            Synthetic("gpt-oss-20b", _GPT_OSS_20B, gpt_oss_tensors),
            Synthetic("qwen3-30b-a3b", _QWEN3_30B, qwen3_moe_tensors),
            Synthetic("small", _SMALL, gpt_oss_tensors),
        )
    }
)
"""By name. "small" is gpt-oss's architecture in a size for tests."""
