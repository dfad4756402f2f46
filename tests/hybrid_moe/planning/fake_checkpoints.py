"""Checkpoints of large models as headers alone: sparse files of the right size without data.

Names, shapes and dtypes are those of the published releases, and so are the entries of
`config.json` that sizes depend on (from the models' cards and configuration classes). The files
take kilobytes on disk, and whoever reads a weight gets zeros.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_moe.loaders.writer import PlannedTensor

SHARD_BYTES = 5_000_000_000
Config = dict[str, Any]
Tensors = Iterator[tuple[str, str, tuple[int, ...]]]


@dataclass(frozen=True)
class FakeModel:
    """A published model: its configuration, and its tensors as (key, dtype, shape)."""

    config: Config
    tensors: Callable[[Config], Tensors]


def write_headers(directory: Path, model: FakeModel, config: Config | None = None) -> Path:
    """Write `config.json` and sparse shards; `config` replaces entries of the model's."""
    directory.mkdir(parents=True, exist_ok=True)
    merged = {**model.config, **(config or {})}
    (directory / "config.json").write_text(json.dumps(merged))
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in (PlannedTensor(*row) for row in model.tensors(merged)):
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / name, shard)
        weight_map.update((tensor.key, name) for tensor in shard)
    index = json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)
    return directory


def _write_shard(file: Path, tensors: list[PlannedTensor]) -> None:
    header, end = {}, 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.key] = {
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


# Families ---------------------------------------------------------------------------------------


def _fp8(key: str, N: int, K: int) -> Tensors:
    """An FP8 matrix and its E8M0 scales, one for 128 x 128."""
    yield f"{key}.weight", "F8_E4M3", (N, K)
    yield f"{key}.scale", "F8_E8M0", (-(-N // 128), -(-K // 128))


def _mxfp4(key: str, N: int, K: int, dtypes: tuple[str, str], scale: str) -> Tensors:
    yield f"{key}.weight", dtypes[0], (N, K // 2)
    yield f"{key}.{scale}", dtypes[1], (N, K // 32)


def _deepseek_v4_layer(c: Config, stem: str, ratio: int, hashed: bool) -> Tensors:
    H, I, D, q = c["hidden_size"], c["moe_intermediate_size"], c["head_dim"], c["q_lora_rank"]
    heads, groups, rank = c["num_attention_heads"], c["o_groups"], c["o_lora_rank"]
    index, E = c["index_head_dim"], c["n_routed_experts"]
    yield f"{stem}.attn_norm.weight", "BF16", (H,)
    yield f"{stem}.ffn_norm.weight", "BF16", (H,)
    for part in ("attn", "ffn"):
        yield f"{stem}.hc_{part}_fn", "F32", (24, 4 * H)
        yield f"{stem}.hc_{part}_base", "F32", (24,)
        yield f"{stem}.hc_{part}_scale", "F32", (3,)
    yield f"{stem}.attn.attn_sink", "F32", (heads,)
    yield f"{stem}.attn.q_norm.weight", "BF16", (q,)
    yield f"{stem}.attn.kv_norm.weight", "BF16", (D,)
    yield from _fp8(f"{stem}.attn.wq_a", q, H)
    yield from _fp8(f"{stem}.attn.wq_b", heads * D, q)
    yield from _fp8(f"{stem}.attn.wkv", D, H)
    yield from _fp8(f"{stem}.attn.wo_a", groups * rank, heads * D // groups)
    yield from _fp8(f"{stem}.attn.wo_b", H, groups * rank)
    for name, size in (("compressor", D), ("indexer.compressor", index)):
        if ratio == 0 or (name != "compressor" and ratio != 4):
            continue
        width = size * (2 if ratio == 4 else 1)
        yield f"{stem}.attn.{name}.ape", "F32", (ratio, width)
        yield f"{stem}.attn.{name}.norm.weight", "BF16", (size,)
        yield f"{stem}.attn.{name}.wkv.weight", "BF16", (width, H)
        yield f"{stem}.attn.{name}.wgate.weight", "BF16", (width, H)
    if ratio == 4:
        yield from _fp8(f"{stem}.attn.indexer.wq_b", c["index_n_heads"] * index, q)
        yield f"{stem}.attn.indexer.weights_proj.weight", "BF16", (c["index_n_heads"], H)
    yield f"{stem}.ffn.gate.weight", "BF16", (E, H)
    if hashed:
        yield f"{stem}.ffn.gate.tid2eid", "I64", (c["vocab_size"], c["num_experts_per_tok"])
    else:
        yield f"{stem}.ffn.gate.bias", "F32", (E,)
    for name, N, K in (("w1", I, H), ("w3", I, H), ("w2", H, I)):
        yield from _fp8(f"{stem}.ffn.shared_experts.{name}", N, K)
        for e in range(E):
            key = f"{stem}.ffn.experts.{e}.{name}"
            yield from _mxfp4(key, N, K, ("I8", "F8_E8M0"), "scale")


def _deepseek_v4(c: Config) -> Tensors:
    H, V = c["hidden_size"], c["vocab_size"]
    yield "embed.weight", "BF16", (V, H)
    yield "head.weight", "BF16", (V, H)
    yield "norm.weight", "BF16", (H,)
    for layer in range(c["num_hidden_layers"]):
        hashed = layer < c["num_hash_layers"]
        yield from _deepseek_v4_layer(c, f"layers.{layer}", c["compress_ratios"][layer], hashed)
    yield from _deepseek_v4_layer(c, "mtp.0", 0, False)
    yield from _fp8("mtp.0.e_proj", H, H)
    yield from _fp8("mtp.0.h_proj", H, H)


def _gqa_layer(c: Config, stem: str, bias: bool) -> Tensors:
    H, D = c["hidden_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * D, c["num_key_value_heads"] * D
    for name, N, K in (("q", q, H), ("k", kv, H), ("v", kv, H), ("o", H, q)):
        yield f"{stem}.self_attn.{name}_proj.weight", "BF16", (N, K)
        if bias:
            yield f"{stem}.self_attn.{name}_proj.bias", "BF16", (N,)
    yield f"{stem}.input_layernorm.weight", "BF16", (H,)
    yield f"{stem}.post_attention_layernorm.weight", "BF16", (H,)


def _ends(c: Config) -> Tensors:
    H, V = c["hidden_size"], c["vocab_size"]
    yield "model.embed_tokens.weight", "BF16", (V, H)
    yield "lm_head.weight", "BF16", (V, H)
    yield "model.norm.weight", "BF16", (H,)


def _gpt_oss(c: Config) -> Tensors:
    H, I, E = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    yield from _ends(c)
    for layer in range(c["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        yield from _gqa_layer(c, stem, bias=True)
        yield f"{stem}.self_attn.sinks", "BF16", (c["num_attention_heads"],)
        yield f"{stem}.mlp.router.weight", "BF16", (E, H)
        yield f"{stem}.mlp.router.bias", "BF16", (E,)
        for name, N, K in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
            yield f"{stem}.mlp.experts.{name}_blocks", "U8", (E, N, K // 32, 16)
            yield f"{stem}.mlp.experts.{name}_scales", "U8", (E, N, K // 32)
            yield f"{stem}.mlp.experts.{name}_bias", "BF16", (E, N)


def _qwen3_moe(c: Config) -> Tensors:
    """BF16 as published, or FP8 or what `hybrid-moe convert` writes where the configuration says
    so; of FP8 only the experts."""
    H, I, E = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"]
    yield from _ends(c)
    for layer in range(c["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        yield from _gqa_layer(c, stem, bias=False)
        for name in ("q", "k"):
            yield f"{stem}.self_attn.{name}_norm.weight", "BF16", (c["head_dim"],)
        yield f"{stem}.mlp.gate.weight", "BF16", (E, H)
        for e in range(E):
            for name, N, K in (("gate_proj", I, H), ("up_proj", I, H), ("down_proj", H, I)):
                key = f"{stem}.mlp.experts.{e}.{name}"
                if c.get("quantization_config"):
                    yield f"{key}.weight", "F8_E4M3", (N, K)
                    yield f"{key}.weight_scale_inv", "F32", (-(-N // 128), -(-K // 128))
                elif "hybrid_moe" in c:
                    yield from _mxfp4(key, N, K, ("U8", "U8"), "weight_scale")
                else:
                    yield f"{key}.weight", "BF16", (N, K)


_QWEN3 = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960,
}  # fmt: skip
_GPT_OSS = {
    "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
    "num_experts_per_tok": 4, "max_position_embeddings": 131072,
    "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip


def _sizes(layers: int, **more: Any) -> Config:
    return {"num_hidden_layers": layers, **more}


def _gpt_oss_sizes(layers: int, experts: int) -> Config:
    types = ["sliding_attention", "full_attention"] * (layers // 2)
    return _sizes(layers, num_local_experts=experts, layer_types=types)


_CONVERTED = {"hybrid_moe": {"experts": "MXFP4", "group": 32}}
_FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
_QWEN3_30B = _QWEN3 | _sizes(
    48, hidden_size=2048, moe_intermediate_size=768, num_attention_heads=32
)
_QWEN3_235B = _QWEN3 | _sizes(
    94, hidden_size=4096, moe_intermediate_size=1536, num_attention_heads=64
)

MODELS: dict[str, FakeModel] = {
    "DeepSeek-V4-Flash": FakeModel(
        {
            "model_type": "deepseek_v4", "vocab_size": 129280, "hidden_size": 4096,
            "moe_intermediate_size": 2048, "num_hidden_layers": 43, "num_attention_heads": 64,
            "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64,
            "q_lora_rank": 1024, "o_groups": 8, "o_lora_rank": 1024, "index_n_heads": 64,
            "index_head_dim": 128, "index_topk": 512, "sliding_window": 128,
            "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 6,
            "num_hash_layers": 3, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
            "max_position_embeddings": 1048576, "expert_dtype": "fp4",
        },
        _deepseek_v4,
    ),
    "gpt-oss-120b": FakeModel(_GPT_OSS | _gpt_oss_sizes(36, 128), _gpt_oss),
    "gpt-oss-20b": FakeModel(_GPT_OSS | _gpt_oss_sizes(24, 32), _gpt_oss),
    "Qwen3-30B-A3B": FakeModel(_QWEN3_30B, _qwen3_moe),
    "Qwen3-30B-A3B-MXFP4": FakeModel(_QWEN3_30B | _CONVERTED, _qwen3_moe),
    "Qwen3-30B-A3B-FP8": FakeModel(_QWEN3_30B | _FP8, _qwen3_moe),
    "Qwen3-235B-A22B": FakeModel(_QWEN3_235B, _qwen3_moe),
    "Qwen3-235B-A22B-MXFP4": FakeModel(_QWEN3_235B | _CONVERTED, _qwen3_moe),
}  # fmt: skip
"""By the directory's name. `*-MXFP4` is what `hybrid-moe convert` makes of the other."""
