"""The repository's small model as SGLang can load it: BF16 experts, an output layer of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hybrid_moe.formats import MXFP4
from tests.sglang.paths import MXFP4_MODEL

LAYERS, EXPERTS, TOP_K = 4, 16, 4


def write_bf16_copy(target: Path) -> Path:
    """The model in `target`, every MXFP4 value as it is (BF16 holds them exactly).

    SGLang's Qwen3-MoE does not know tied embeddings, so they are written twice.
    """
    shutil.copytree(MXFP4_MODEL, target, ignore=shutil.ignore_patterns("*.safetensors"))
    stored = load_file(MXFP4_MODEL / "model.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    for key in [key for key in stored if not key.endswith("_scale")]:
        tensor, scale = stored[key], stored.get(f"{key}_scale")
        if scale is not None:
            values = MXFP4.dequantize(tensor.numpy(), scale.view(torch.uint8).numpy())
            tensor = torch.from_numpy(values).bfloat16()
            assert bool((tensor.float() == torch.from_numpy(values)).all())
        tensors[key] = tensor
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["tie_word_embeddings"] = False
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target
