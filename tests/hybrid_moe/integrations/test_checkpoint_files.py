"""`from_pretrained`: its two readers take the same files, whatever Transformers' options say."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.integrations.transformers.registration import (
    check_directory,
    from_pretrained,
    offload,
)
from hybrid_moe.loaders.files import INDEX_NAME
from tests.hybrid_moe.checkpoints import save
from tests.hybrid_moe.tiny_models import build, logits, prompt

SINGLE = "model.safetensors"


def ours(directory: Path, **kwargs: Any) -> torch.Tensor:
    return logits(from_pretrained(directory, "BF16", threads=1, progress=False, **kwargs), prompt())


def plain(directory: Path, **kwargs: Any) -> torch.Tensor:
    """With weights as Transformers reads them, computed by the same kernels."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **kwargs)
    return logits(offload(model, "BF16", threads=1, progress=False), prompt())


def scaled(model: Any, factor: float) -> Any:
    """Another model of the same shapes: every weight is different."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def single_and_shards(folder: Path) -> dict[str, Any]:
    scaled(build("qwen3_moe"), 0.5).save_pretrained(folder, max_shard_size="60KB")
    save(build("qwen3_moe"), folder / "one")
    shutil.move(folder / "one" / SINGLE, folder)
    return {}


def saved_twice(folder: Path) -> dict[str, Any]:
    scaled(build("qwen3_moe"), 0.5).save_pretrained(folder, max_shard_size="60KB")
    build("qwen3_moe").save_pretrained(folder)
    assert (folder / INDEX_NAME).exists()
    return {}


def variant(folder: Path) -> dict[str, Any]:
    build("qwen3_moe").save_pretrained(folder)
    scaled(build("qwen3_moe"), 0.5).save_pretrained(folder, variant="fp16")
    return {"variant": "fp16"}


def variant_in_shards(folder: Path) -> dict[str, Any]:
    build("qwen3_moe").save_pretrained(folder)
    half = scaled(build("qwen3_moe"), 0.5)
    half.save_pretrained(folder, variant="fp16", max_shard_size="60KB")
    return {"variant": "fp16"}


def subfolder(folder: Path) -> dict[str, Any]:
    scaled(build("qwen3_moe"), 0.5).save_pretrained(folder)
    build("qwen3_moe").save_pretrained(folder / "sub")
    return {"subfolder": "sub"}


def named_in_the_configuration(folder: Path) -> dict[str, Any]:
    scaled(build("qwen3_moe"), 0.5).save_pretrained(folder)
    (folder / SINGLE).rename(folder / "half.safetensors")
    build("qwen3_moe").save_pretrained(folder)
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), "transformers_weights": "half.safetensors"}
    file.write_text(json.dumps(config))
    return {}


@pytest.mark.parametrize(
    "write",
    [single_and_shards, saved_twice, variant, variant_in_shards, subfolder,
     named_in_the_configuration],
)  # fmt: skip
def test_both_read_the_same_files(write: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    options = write(tmp_path)
    assert torch.equal(ours(tmp_path, **options), plain(tmp_path, **options))


NORM = "model.norm.weight"


def with_stale_copy(folder: Path, key: str, file: str) -> None:
    """Shards, with the norm and a wrong copy of `key` in `file`, which the index names for the
    norm alone."""
    build("qwen3_moe").save_pretrained(folder, max_shard_size="60KB")
    index = json.loads((folder / INDEX_NAME).read_text())
    wrong, norm = (load_file(folder / index["weight_map"][k])[k] for k in (key, NORM))
    save_file({key: torch.zeros_like(wrong), NORM: norm}, folder / file, {"format": "pt"})
    index["weight_map"][NORM] = file
    (folder / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize("file", ["a.safetensors", "z.safetensors"])
def test_the_index_decides_for_experts(file: str, tmp_path: Path) -> None:
    with_stale_copy(tmp_path, "model.layers.1.mlp.experts.0.up_proj.weight", file)
    save(build("qwen3_moe"), tmp_path / "right")
    assert torch.equal(ours(tmp_path), plain(tmp_path / "right"))


def test_an_index_that_transformers_would_not_follow(tmp_path: Path) -> None:
    with_stale_copy(tmp_path, "model.layers.1.mlp.gate.weight", "z.safetensors")
    with pytest.raises(CheckpointError, match=r"mlp\.gate\.weight: the index says .*z\.safetens"):
        ours(tmp_path)


def test_an_index_that_transformers_follows_by_chance(tmp_path: Path) -> None:
    with_stale_copy(tmp_path, "model.layers.1.mlp.gate.weight", "a.safetensors")
    save(build("qwen3_moe"), tmp_path / "right")
    assert torch.equal(ours(tmp_path), plain(tmp_path / "right"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_safetensors": False}, ValueError, "use_safetensors=False: experts are read from"),
        ({"gguf_file": "x.gguf"}, ValueError, "gguf_file: experts are read from safetensors"),
        ({"state_dict": {}}, ValueError, "state_dict: experts are read from safetensors"),
        ({"variant": "int8"}, CheckpointError, r"neither model\.int8\.safetensors nor model"),
        ({"variant": "../x"}, CheckpointError, r"variant='\.\./x' is no part of a file's name"),
        ({"subfolder": "none"}, FileNotFoundError, r"none' does not exist"),
    ],
)
def test_options_that_are_refused(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = save(build("qwen3_moe"), tmp_path / "qwen")
    with pytest.raises(error, match=message):
        ours(folder, **options)


def test_pytorch_files_alone(tmp_path: Path) -> None:
    folder = save(build("qwen3_moe"), tmp_path / "qwen")
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not read"):
        ours(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", SINGLE, INDEX_NAME])
def test_a_pipe_is_told_before_anything_waits_for_it(name: str, tmp_path: Path) -> None:
    folder = save(build("qwen3_moe"), tmp_path / "qwen")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: no regular file"):
        ours(folder)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: no regular file"):
        check_directory(folder)  # where `generate` begins, before it loads a tokenizer
