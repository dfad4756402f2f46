"""Tiny checkpoints of each model family, and the values of their experts.

Where Transformers can write a family, its `save_pretrained` does, and the values are the module's
own parameters. Where it cannot (MXFP4 as DeepSeek-V4 and gpt-oss publish it), the files follow the
published names, shapes and dtypes, and the values are decoded with `ml_dtypes`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

F64 = npt.NDArray[np.float64]
Tensors = dict[str, torch.Tensor]

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCAB = 64, 96, 4, 2, 96


@dataclass(frozen=True)
class Experts:
    """The exact values of one layer's experts: gate, up [E, I, H], down [E, H, I], biases."""

    gate: F64
    up: F64
    down: F64
    gate_bias: F64 | None = None
    up_bias: F64 | None = None
    down_bias: F64 | None = None


@dataclass(frozen=True)
class FamilyFixture:
    """One written checkpoint.

    Attributes:
        name: key of `FAMILIES`.
        config: the model's configuration, as in `config.json`.
        directory: where it is.
        layers: values of the experts by layer.
        methods: format in which the experts of each layer are stored, "BF16" or "MXFP4".
    """

    name: str
    config: PretrainedConfig
    directory: Path
    layers: dict[int, Experts]
    methods: dict[int, str]
    num_experts: int = EXPERTS
    hidden: int = HIDDEN
    intermediate: int = INTERMEDIATE

    @property
    def method(self) -> str:
        """The one format of all layers, "STORED" where they differ."""
        methods = set(self.methods.values())
        return methods.pop() if len(methods) == 1 else "STORED"


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def _qwen3_moe() -> PretrainedConfig:
    return transformers.Qwen3MoeConfig(
        **_COMMON, intermediate_size=64, moe_intermediate_size=INTERMEDIATE, head_dim=32,
        num_key_value_heads=1, num_experts=EXPERTS,
    )  # fmt: skip


def _mixtral() -> PretrainedConfig:
    return transformers.MixtralConfig(
        **_COMMON, intermediate_size=INTERMEDIATE, num_key_value_heads=1, num_local_experts=EXPERTS
    )


def _minimax_m2() -> PretrainedConfig:
    return transformers.MiniMaxM2Config(
        **_COMMON, intermediate_size=INTERMEDIATE, num_key_value_heads=1, head_dim=32,
        num_local_experts=EXPERTS,
    )  # fmt: skip


def _deepseek_v3() -> PretrainedConfig:
    return transformers.DeepseekV3Config(
        **_COMMON, intermediate_size=64, moe_intermediate_size=INTERMEDIATE, num_key_value_heads=2,
        n_routed_experts=EXPERTS, n_group=1, topk_group=1, first_k_dense_replace=1,
        q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32,
    )  # fmt: skip


def _deepseek_v4() -> PretrainedConfig:
    return transformers.DeepseekV4Config(
        **_COMMON, moe_intermediate_size=INTERMEDIATE, head_dim=32, q_lora_rank=32,
        n_routed_experts=EXPERTS, o_groups=2, o_lora_rank=16, index_n_heads=2, index_head_dim=16,
        index_topk=8, sliding_window=8, partial_rotary_factor=0.5,
        mlp_layer_types=["hash_moe", "moe"],
        layer_types=["sliding_attention", "compressed_sparse_attention"],
    )  # fmt: skip


def _gpt_oss() -> PretrainedConfig:
    return transformers.GptOssConfig(
        **_COMMON, intermediate_size=INTERMEDIATE, num_key_value_heads=1, head_dim=32,
        num_local_experts=EXPERTS, layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
    )  # fmt: skip


def _privacy_filter() -> PretrainedConfig:
    """Experts with biases whose gate and up are halves, unlike gpt-oss's of the same names."""
    return transformers.OpenAIPrivacyFilterConfig(
        **{**_COMMON, "pad_token_id": 0}, intermediate_size=INTERMEDIATE, num_key_value_heads=1,
        head_dim=32, num_local_experts=EXPERTS,
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How a family is written.

    Attributes:
        config: makes the configuration.
        rewrite: turns the tensors that Transformers wrote into the published ones, and gives the
            new values of the experts that it changed; None keeps what Transformers wrote.
        quantized: layers whose experts it makes MXFP4; None for all.
        native: Transformers writes its modules' own (fused) names, not those of the hub.
        auto: the class of Transformers that makes the model.
        extra: what the published `config.json` says beyond the configuration.
    """

    config: Callable[[], PretrainedConfig]
    rewrite: Callable[[Tensors, dict[int, Experts], np.random.Generator], Any] | None = None
    quantized: tuple[int, ...] | None = None
    native: bool = False
    extra: tuple[tuple[str, Any], ...] = ()
    auto: Any = AutoModelForCausalLM


def random_mxfp4(
    rng: np.random.Generator, *shape: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], F64]:
    """Random codes [..., N, K/2], scales [..., N, K/32] and their values [..., N, K]."""
    codes = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8)
    scales = rng.integers(119, 125, (*shape[:-1], shape[-1] // 32), np.uint8)
    return codes, scales, decode_mxfp4(codes, scales)


def decode_mxfp4(codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> F64:
    """MXFP4 values by `ml_dtypes` alone: codes [..., K/2], scales [..., K/32] -> [..., K]."""
    nibbles = np.empty((*codes.shape[:-1], codes.shape[-1] * 2), np.uint8)
    nibbles[..., 0::2] = codes & 15
    nibbles[..., 1::2] = codes >> 4
    factors = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * np.repeat(factors, 32, -1)


def _split(gate_up: F64, interleaved: bool) -> tuple[F64, F64]:
    if interleaved:
        return gate_up[:, 0::2], gate_up[:, 1::2]
    half = gate_up.shape[1] // 2
    return gate_up[:, :half], gate_up[:, half:]


def _publish_per_expert(
    block: str,
    names: tuple[str, str, str],
    scale: str,
    codes: torch.dtype,
    scales: torch.dtype,
    weight: str = "weight",
) -> Callable[[Tensors, dict[int, Experts], np.random.Generator], dict[int, Experts]]:
    """Replace each expert's BF16 matrices by MXFP4 ones."""

    def rewrite(
        tensors: Tensors, layers: dict[int, Experts], rng: np.random.Generator
    ) -> dict[int, Experts]:
        values = {}
        for layer in layers:
            projections = []
            for name, N, K in zip(
                names,
                (INTERMEDIATE, INTERMEDIATE, HIDDEN),
                (HIDDEN, HIDDEN, INTERMEDIATE),
                strict=True,
            ):
                code, factor, value = random_mxfp4(rng, EXPERTS, N, K)
                for expert in range(EXPERTS):
                    stem = f"model.layers.{layer}.{block}.{expert}.{name}."
                    assert tensors.pop(stem + "weight").shape == (N, K)
                    tensors[stem + weight] = torch.from_numpy(code[expert]).view(codes)
                    tensors[stem + scale] = torch.from_numpy(factor[expert]).view(scales)
                projections.append(value)
            values[layer] = Experts(*projections)
        return values

    return rewrite


def _publish_deepseek_v4(
    tensors: Tensors, layers: dict[int, Experts], rng: np.random.Generator
) -> dict[int, Experts]:
    """As deepseek-ai publishes it: no `model.` before the keys, int8 codes, E8M0 scales."""
    write = _publish_per_expert(
        "ffn.experts", ("w1", "w3", "w2"), "scale", torch.int8, torch.float8_e8m0fnu
    )
    values = write(tensors, layers, rng)
    for key in list(tensors):
        tensors[key.removeprefix("model.").replace("embed_tokens.", "embed.")] = tensors.pop(key)
    return values


def _publish_fused_fp4(
    tensors: Tensors, layers: dict[int, Experts], rng: np.random.Generator
) -> dict[int, Experts]:
    """DeepSeek-V4's experts as the FP4 modules of Transformers hold them."""
    values = {}
    for layer in layers:
        stem = f"model.layers.{layer}.mlp.experts."
        parts = []
        for name, N, K in (
            ("gate_up_proj", 2 * INTERMEDIATE, HIDDEN),
            ("down_proj", HIDDEN, INTERMEDIATE),
        ):
            codes, scales, value = random_mxfp4(rng, EXPERTS, N, K)
            assert tensors.pop(stem + name).shape == (EXPERTS, N, K)
            tensors[stem + name] = torch.from_numpy(codes).view(torch.int8)
            tensors[f"{stem}{name}_scale_inv"] = torch.from_numpy(scales).view(torch.float8_e8m0fnu)
            parts.append(value)
        values[layer] = Experts(*_split(parts[0], interleaved=False), parts[1])
    return values


def _publish_gpt_oss(
    tensors: Tensors, layers: dict[int, Experts], rng: np.random.Generator
) -> dict[int, Experts]:
    """As openai publishes it: blocks [E, N, K/32, 16] and scales [E, N, K/32], uint8."""
    values = {}
    for layer, bf16 in layers.items():
        stem = f"model.layers.{layer}.mlp.experts."
        parts = []
        for name, N, K in (
            ("gate_up_proj", 2 * INTERMEDIATE, HIDDEN),
            ("down_proj", HIDDEN, INTERMEDIATE),
        ):
            codes, scales, value = random_mxfp4(rng, EXPERTS, N, K)
            assert tensors.pop(stem + name).shape == (EXPERTS, K, N)
            tensors[f"{stem}{name}_blocks"] = torch.from_numpy(
                codes.reshape(EXPERTS, N, K // 32, 16)
            )
            tensors[f"{stem}{name}_scales"] = torch.from_numpy(scales)
            parts.append(value)
        values[layer] = Experts(
            *_split(parts[0], interleaved=True),
            parts[1],
            bf16.gate_bias,
            bf16.up_bias,
            bf16.down_bias,
        )
    return values


def _add_draft_layer(
    tensors: Tensors, layers: dict[int, Experts], rng: np.random.Generator
) -> dict[int, Experts]:
    """As deepseek-ai publishes it: the draft layer is one more layer, with a few tensors more."""
    for key in [key for key in tensors if key.startswith("model.layers.1.")]:
        tensors[key.replace(".layers.1.", ".layers.2.")] = torch.zeros_like(tensors[key])
    for name, shape in (("eh_proj", (HIDDEN, 2 * HIDDEN)), ("enorm", (HIDDEN,))):
        tensors[f"model.layers.2.{name}.weight"] = torch.zeros(shape, dtype=torch.bfloat16)
    return {}


_GPT_OSS_QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}

_QWEN3_NAMES = ("gate_proj", "up_proj", "down_proj")

BITS = {"BF16": 16.0, "INT8": 8.5, "MXFP4": 4.25}
"""Of a weight in each format, scales included."""

FAMILIES: dict[str, Family] = {
    "qwen3_moe": Family(_qwen3_moe),
    "qwen3_moe_fused": Family(_qwen3_moe, native=True),
    "qwen3_moe_mxfp4": Family(
        _qwen3_moe,
        _publish_per_expert(
            "mlp.experts", _QWEN3_NAMES, "weight_scale", torch.uint8, torch.uint8
        ),
    ),
    "qwen3_moe_packed_mxfp4": Family(
        _qwen3_moe,
        _publish_per_expert(
            "mlp.experts", _QWEN3_NAMES, "weight_scale", torch.uint8, torch.uint8, "weight_packed"
        ),
    ),
    "qwen3_moe_mixed": Family(
        _qwen3_moe,
        _publish_per_expert(
            "mlp.experts", _QWEN3_NAMES, "weight_scale", torch.uint8, torch.uint8
        ),
        quantized=(0,),
    ),
    "mixtral": Family(_mixtral),
    "minimax_m2": Family(_minimax_m2),
    "minimax_m2_mxfp4": Family(
        _minimax_m2,
        _publish_per_expert(
            "block_sparse_moe.experts", ("w1", "w3", "w2"), "weight_scale_inv",
            torch.uint8, torch.float8_e8m0fnu,
        ),
    ),
    "deepseek_v3": Family(_deepseek_v3),
    "deepseek_v3_draft": Family(
        _deepseek_v3, _add_draft_layer, quantized=(), extra=(("num_nextn_predict_layers", 1),)
    ),
    "deepseek_v4": Family(_deepseek_v4),
    "deepseek_v4_mxfp4": Family(
        _deepseek_v4, _publish_deepseek_v4, extra=(("expert_dtype", "fp4"),)
    ),
    "deepseek_v4_fused_mxfp4": Family(_deepseek_v4, _publish_fused_fp4, native=True),
    "gpt_oss": Family(_gpt_oss),
    "privacy_filter": Family(
        _privacy_filter, auto=transformers.AutoModelForTokenClassification
    ),
    "gpt_oss_mxfp4": Family(
        _gpt_oss, _publish_gpt_oss, extra=(("quantization_config", _GPT_OSS_QUANTIZATION),)
    ),
}  # fmt: skip
"""Every fixture by name. Those named `*_mxfp4` store MXFP4 experts, the others BF16, but for the
first layer of `qwen3_moe_mixed`."""


def make_model(
    config: PretrainedConfig, seed: int, dtype: torch.dtype, auto: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """A model with random weights; also those that Transformers would start at zero."""
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or name.endswith(("bias", "router.weight", "gate.weight")):
                parameter.normal_(0.0, 0.05)
    return model.eval()


def expert_values(model: PreTrainedModel) -> dict[int, Experts]:
    """The experts of every layer, from the parameters of the modules."""
    layers = {}
    for number, layer in enumerate(model.model.layers):
        experts = getattr(layer.mlp, "experts", None)
        if experts is None:
            continue
        gate_up, down = (
            p.detach().double().numpy() for p in (experts.gate_up_proj, experts.down_proj)
        )
        if not hasattr(experts, "gate_up_proj_bias"):
            layers[number] = Experts(*_split(gate_up, interleaved=False), down)
            continue
        # gpt-oss: x @ W with W [E, H, 2I], gate and up in turn; its relatives have them apart
        interleaved = not experts.is_concatenated
        bias = experts.gate_up_proj_bias.detach().double().numpy()
        layers[number] = Experts(
            *_split(gate_up.transpose(0, 2, 1), interleaved),
            down.transpose(0, 2, 1),
            *_split(bias, interleaved),
            experts.down_proj_bias.detach().double().numpy(),
        )
    return layers


def write_family(
    name: str,
    directory: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
) -> FamilyFixture:
    """Write the checkpoint `name` of `FAMILIES` into `directory`."""
    family = FAMILIES[name]
    config = family.config()
    model = make_model(config, seed, dtype, family.auto)
    layers = expert_values(model)
    model.save_pretrained(
        directory, max_shard_size=max_shard_size, save_original_format=not family.native
    )
    methods = dict.fromkeys(layers, "BF16")
    if family.rewrite is not None:
        quantized = tuple(layers) if family.quantized is None else family.quantized
        methods |= dict.fromkeys(quantized, "MXFP4")
        file = directory / "model.safetensors"
        tensors = load_file(file)
        subset = {number: layers[number] for number in quantized}
        layers = layers | family.rewrite(tensors, subset, np.random.default_rng(seed))
        save_file(tensors, file, metadata={"format": "pt"})
    if family.extra:
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **dict(family.extra)}))
    return FamilyFixture(name, config, directory, layers, methods)
