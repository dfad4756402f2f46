"""The example model, and models of other families, as GGUF files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.numbers import Array, bf16_to_f32
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.formats.weight_format import LayerFormats, unpack_bits
from hybrid_moe.loaders import Checkpoint
from hybrid_moe.loaders.gguf.ggml_types import TYPES_BY_NAME
from tests.loaders.gguf.files import (
    FLOAT32,
    INT32,
    STRING,
    UINT32,
    Entry,
    GgufFile,
    array,
    scalar,
)

TINY = Path(__file__).parents[3] / "examples" / "tiny_moe" / "model"
"""Qwen3-MoE with MXFP4 experts, tied embeddings and a byte-level vocabulary."""


def mxfp4_blocks(matrix: Matrix) -> Array:
    """Planes as ggml's blocks, uint8 [N, bytes]: weight i beside weight i + 16."""
    assert matrix.scales is not None
    nibbles = unpack_bits(matrix.codes, 4).reshape(*matrix.scales.shape, 32)
    packed = nibbles[..., :16] | (nibbles[..., 16:] << 4)
    blocks = np.concatenate([matrix.scales[..., None], packed], axis=-1)
    return blocks.reshape(len(blocks), -1)


def numbers(kind: str, name: str, bits: Array) -> Entry:
    """BF16 bits as they are, or as float32."""
    data = bits if kind == "BF16" else bf16_to_f32(bits)
    return Entry(name, bits.shape, TYPES_BY_NAME[kind].number, data.tobytes())


def entries(folder: Path, architecture: gguf.MODEL_ARCH) -> Iterator[Entry]:
    """A checkpoint's tensors as llama.cpp's converter names and stores them: one-dimensional ones
    and routers in float32, experts in MXFP4."""
    checkpoint = Checkpoint.open(folder)
    layers = checkpoint.config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(architecture, layers)
    for key in checkpoint.index.tensors:
        if key not in checkpoint.expert_keys:
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            assert name is not None, key
            if key.endswith(".sinks"):
                name += ".weight"
            bits = checkpoint.index.read(key)
            kind = "F32" if bits.ndim == 1 or "ffn_gate_inp" in name else "BF16"
            yield numbers(kind, name, bits)
    for number, source in checkpoint.sources().items():
        experts = [source.expert(e, LayerFormats(MXFP4, MXFP4)) for e in range(source.num_experts)]
        for name in ("gate", "up", "down"):
            matrices = [getattr(tensors, name) for tensors in experts]
            stem, kind = f"blk.{number}.ffn_{name}_exps", TYPES_BY_NAME["MXFP4"].number
            blocks = np.stack([mxfp4_blocks(m) for m in matrices])
            shape = (*blocks.shape[:2], blocks.shape[2] // 17 * 32)
            yield Entry(f"{stem}.weight", shape, kind, blocks.tobytes())
            if matrices[0].bias is not None:
                bias = np.stack([m.bias for m in matrices])
                yield Entry(f"{stem}.bias", bias.shape, 0, bias.tobytes())


def metadata(folder: Path, architecture: str) -> Iterator[tuple[str, bytes]]:
    """`config.json` by llama.cpp's names."""
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    experts = config.get("num_experts") or config["num_local_experts"]
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    yield "general.architecture", scalar(STRING, architecture)
    for key, value in {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "expert_feed_forward_length": width,
        "expert_count": experts,
        "expert_used_count": config["num_experts_per_tok"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.sliding_window": config.get("sliding_window"),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.scaling.factor": rope.get("factor"),
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings"),
        "rope.scaling.yarn_beta_fast": rope.get("beta_fast"),
        "rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
    }.items():
        if value is not None:
            kind = FLOAT32 if isinstance(value, float) else UINT32
            yield f"{architecture}.{key}", scalar(kind, value)
    if rope["rope_type"] != "default":
        yield f"{architecture}.rope.scaling.type", scalar(STRING, rope["rope_type"])


def vocabulary(folder: Path) -> Iterator[tuple[str, bytes]]:
    """`tokenizer.json`, byte-level BPE, as a GGUF file has it."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model = tokenizer["model"]
    special = {token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    kinds = [3 if number in special else 1 for number in range(len(tokens))]
    config = json.loads((folder / "config.json").read_text())
    yield "tokenizer.ggml.model", scalar(STRING, "gpt2")
    yield "tokenizer.ggml.pre", scalar(STRING, "gpt-2")
    yield "tokenizer.ggml.tokens", array(STRING, tokens)
    yield "tokenizer.ggml.token_type", array(INT32, kinds)
    yield "tokenizer.ggml.merges", array(STRING, merges)
    for key, name in (("eos_token_id", "eos_token_id"), ("padding_token_id", "pad_token_id")):
        if config.get(name) is not None:
            yield f"tokenizer.ggml.{key}", scalar(UINT32, config[name])


def tiny_file() -> GgufFile:
    """The example model as llama.cpp would convert it."""
    keys = (*metadata(TINY, "qwen3moe"), *vocabulary(TINY))
    return GgufFile(keys, tuple(entries(TINY, gguf.MODEL_ARCH.QWEN3MOE)))
