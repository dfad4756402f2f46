"""The repository's small model as SGLang can load it: with an output layer of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hybrid_moe.formats.mx import MXFP4
from tests.sglang.paths import MXFP4_MODEL

LAYERS, EXPERTS, TOP_K = 4, 16, 4


def write_copy(target: Path, dequantize: bool) -> Path:
    """The model in `target`, its experts in BF16 (which holds every MXFP4 value exactly) or as
    they are. SGLang's Qwen3-MoE does not know tied embeddings, so they are written twice."""
    shutil.copytree(MXFP4_MODEL, target, ignore=shutil.ignore_patterns("*.safetensors"))
    stored = load_file(MXFP4_MODEL / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    tensors = without_codes(stored) if dequantize else stored
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["tie_word_embeddings"] = False
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target


def without_codes(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, MXFP4 ones as BF16."""
    tensors = {}
    for key in [key for key in stored if not key.endswith("_scale")]:
        tensors[key] = stored[key]
        scale = stored.get(f"{key}_scale")
        if scale is not None:
            codes = stored[key].numpy()
            values = torch.from_numpy(MXFP4.dequantize(codes, scale.view(torch.uint8).numpy()))
            tensors[key] = values.bfloat16()
            assert torch.equal(tensors[key].float(), values)
    return tensors
