"""Checkpoints of the tiny models: as Transformers saves them, and with MXFP4 experts under the
names and dtypes that each family publishes. Nothing here uses the project's own converter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hybrid_moe.formats.mx import MXFP4

FILE = "model.safetensors"


def save(model: Any, directory: Path) -> Path:
    """Write `model` with `save_pretrained`; returns the directory."""
    model.save_pretrained(directory)
    return directory


def to_mxfp4(directory: Path, family: str) -> Path:
    """Replace the experts in a saved checkpoint by MXFP4 ones, named as `family` publishes them."""
    tensors = load_file(directory / FILE)
    converted: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if re.search(r"\.experts\.", key) is None or key.endswith("_bias"):
            converted[key] = tensor
        elif family == "gpt_oss":
            converted.update(_gpt_oss(key, tensor))
        else:
            converted.update(_per_expert(key, tensor, family))
    save_file(converted, directory / FILE, {"format": "pt"})
    if family == "gpt_oss":
        edit_config(directory, quantization_config={"quant_method": "mxfp4"})
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    """Set entries of `config.json`."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(
    directory: Path, drop: str = "", add: dict[str, torch.Tensor] | None = None
) -> None:
    """Rewrite the file of weights without the key `drop` and with `add`."""
    tensors = load_file(directory / FILE)
    if drop:
        del tensors[drop]
    save_file(tensors | (add or {}), directory / FILE, {"format": "pt"})


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] -> uint8 codes [N, K/2], uint8 scales [N, K/32]."""
    codes, scales = MXFP4.encode(np.ascontiguousarray(weight.float().numpy()))
    assert scales is not None
    return torch.from_numpy(codes), torch.from_numpy(scales)


def _per_expert(key: str, tensor: torch.Tensor, family: str) -> Iterator[tuple[str, torch.Tensor]]:
    codes, scales = encode(tensor)
    stem = key.removesuffix(".weight")
    if family == "deepseek_v4":
        yield f"{stem}.weight", codes.view(torch.int8)
        yield f"{stem}.scale", scales.view(torch.float8_e8m0fnu)
    else:
        yield f"{stem}.weight", codes
        yield f"{stem}.weight_scale", scales


def _gpt_oss(key: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """[E, K, N] -> blocks [E, N, K/32, 16] and scales [E, N, K/32]."""
    encoded = [encode(expert.t()) for expert in tensor]
    codes, scales = (torch.stack(part) for part in zip(*encoded, strict=True))
    yield f"{key}_blocks", codes.reshape(*scales.shape, 16)
    yield f"{key}_scales", scales
