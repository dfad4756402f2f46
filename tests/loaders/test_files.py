"""Which files are the checkpoint: the same for every reader, and errors that name the file."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders import Checkpoint, SafetensorsIndex, convert_checkpoint, inspect_checkpoint
from hybrid_moe.loaders.files import INDEX_NAME
from hybrid_moe.planning.model import read_model
from hybrid_moe.runtime import checkpoint_cache
from tests.families import FamilyFixture, write_family

Family = Callable[[str], FamilyFixture]
SINGLE = "model.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 4567890\n"


def put(folder: Path, name: str, **values: float) -> None:
    save_file({key: np.array([value]) for key, value in values.items()}, folder / name)


def write_index(folder: Path, name: str = INDEX_NAME, **weight_map: str) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def values(index: SafetensorsIndex) -> dict[str, float]:
    return {key: float(index.read(key)[0]) for key in index.tensors}


def shards(folder: Path) -> None:
    put(folder, "model-00001-of-00002.safetensors", a=1)
    put(folder, "model-00002-of-00002.safetensors", b=2)
    write_index(folder, a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors")


def shards_without_index(folder: Path) -> None:
    shards(folder)
    (folder / INDEX_NAME).unlink()


def stale_index(folder: Path) -> None:
    put(folder, SINGLE, a=5)
    write_index(folder, a="model-00001-of-00002.safetensors")


def single_and_shards(folder: Path) -> None:
    shards(folder)
    put(folder, SINGLE, a=5)


def overlay(folder: Path) -> None:
    put(folder, "model-00001-of-00001.safetensors", a=1, b=2, old=3)
    put(folder, "model-overlay.safetensors", b=7)
    put(folder, "model-later.safetensors", a=8, c=9)
    write_index(
        folder, a="model-00001-of-00001.safetensors", b="model-overlay.safetensors",
        c="model-later.safetensors",
    )  # fmt: skip


def files_beside(folder: Path) -> None:
    put(folder, SINGLE, a=1)
    for name in ("consolidated", "adapter_model", "extra"):
        put(folder, f"{name}.safetensors", a=2, b=2)
    (folder / "._model.safetensors").write_bytes(b"\0\5\26\7" + bytes(100))


def sidecars_of_shards(folder: Path) -> None:
    shards_without_index(folder)
    put(folder, "consolidated.safetensors", a=2)
    for file in list(folder.glob("*.safetensors")):
        (folder / f"._{file.name}").write_bytes(b"\0\5\26\7" + bytes(100))


def consolidated(folder: Path) -> None:
    put(folder, "consolidated.safetensors", a=1)


def consolidated_shards(folder: Path) -> None:
    put(folder, "consolidated-00001-of-00002.safetensors", a=1)
    put(folder, "consolidated-00002-of-00002.safetensors", a=3, b=2)
    write_index(
        folder, "consolidated.safetensors.index.json",
        a="consolidated-00001-of-00002.safetensors", b="consolidated-00002-of-00002.safetensors",
    )  # fmt: skip


def variants(folder: Path) -> None:
    put(folder, SINGLE, a=1)
    put(folder, "model.fp16.safetensors", a=2)
    put(folder, "model.int8-00001-of-00001.safetensors", a=3)
    write_index(
        folder, "model.safetensors.index.int8.json", a="model.int8-00001-of-00001.safetensors"
    )


def named_in_config(folder: Path) -> None:
    put(folder, SINGLE, a=1)
    put(folder, "other.safetensors", a=2)
    (folder / "config.json").write_text('{"transformers_weights": "other.safetensors"}')


def counted_from_zero(folder: Path) -> None:
    put(folder, "x-00000-of-00002.safetensors", a=1)
    put(folder, "x-00001-of-00002.safetensors", b=2)


def loose_layers(folder: Path) -> None:
    put(folder, "layer0.safetensors", a=1)
    put(folder, "layer1.safetensors", b=2)


GOOD: dict[str, tuple[Callable[[Path], None], str | None, dict[str, float]]] = {
    "shards": (shards, None, {"a": 1, "b": 2}),
    "shards without index": (shards_without_index, None, {"a": 1, "b": 2}),
    "index that is left over": (stale_index, None, {"a": 5}),
    "single file and shards": (single_and_shards, None, {"a": 5}),
    "overlay": (overlay, None, {"a": 1, "b": 7, "c": 9}),
    "files beside": (files_beside, None, {"a": 1}),
    "sidecars": (sidecars_of_shards, None, {"a": 1, "b": 2}),
    "consolidated": (consolidated, None, {"a": 1}),
    "consolidated shards": (consolidated_shards, None, {"a": 1, "b": 2}),
    "no variant": (variants, None, {"a": 1}),
    "variant": (variants, "fp16", {"a": 2}),
    "variant in shards": (variants, "int8", {"a": 3}),
    "named in the configuration": (named_in_config, None, {"a": 2}),
    "counted from zero": (counted_from_zero, None, {"a": 1, "b": 2}),
    "loose files": (loose_layers, None, {"a": 1, "b": 2}),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_read(name: str, tmp_path: Path) -> None:
    write, variant, expected = GOOD[name]
    write(tmp_path)
    assert values(Checkpoint.open(tmp_path, variant=variant).index) == expected


def without(name: str, write: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        write(folder)
        (folder / name).unlink()

    return apply


def with_text(name: str, text: str, write: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        write(folder)
        (folder / name).write_text(text)

    return apply


def pipe(name: str, write: Callable[[Path], None] = shards) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        write(folder)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return apply


def large(name: str, write: Callable[[Path], None] = shards) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        write(folder)
        with (folder / name).open("wb") as stream:
            stream.truncate((64 << 20) + 1)

    return apply


SECOND = "model-00002-of-00002.safetensors"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard of an index": (without(SECOND, shards), f"{SECOND}: this shard is missing"),
    "missing shard by the names": (
        without(SECOND, shards_without_index),
        rf"{SECOND}: this shard is missing: .* 2 files, 1 are here",
    ),
    "zeroth shard missing": (
        without("x-00001-of-00002.safetensors", counted_from_zero),
        r"x-00001-of-00002\.safetensors: this shard is missing",
    ),
    "PyTorch files": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
        r"no \*\.safetensors file.*pytorch_model\.bin is not read: save the model with safetensors",
    ),
    "adapter alone": (
        lambda folder: put(folder, "adapter_model.safetensors", a=1),
        r"no \*\.safetensors file",
    ),
    "pointer in place of weights": (
        lambda folder: (folder / SINGLE).write_text(LFS),
        rf"{SINGLE}: this is a git-lfs pointer.*run `git lfs pull`",
    ),
    "pointer in place of a shard": (with_text(SECOND, LFS, shards), f"{SECOND}: this is a git-lfs"),
    "pointer in place of the index": (
        with_text(INDEX_NAME, LFS, shards), f"{INDEX_NAME}: this is a git-lfs",
    ),
    "pointer in place of the configuration": (
        with_text("config.json", LFS, shards), r"config\.json: this is a git-lfs",
    ),
    "pipe in place of the index": (pipe(INDEX_NAME), f"{INDEX_NAME}: no regular file"),
    "pipe in place of the configuration": (pipe("config.json"), r"config\.json: no regular file"),
    "large index": (large(INDEX_NAME), f"{INDEX_NAME}: 67108865 bytes are too many"),
    "large configuration": (large("config.json"), r"config\.json: 67108865 bytes are too many"),
    "weights outside": (
        with_text("config.json", '{"transformers_weights": "../x.safetensors"}', shards),
        r"config\.json: transformers_weights='\.\./x\.safetensors' is no name",
    ),
    "weights that are no text": (
        with_text("config.json", '{"transformers_weights": [1]}', shards),
        r"config\.json: transformers_weights=\[1\] is no name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    write, message = BAD[name]
    write(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


JSON_TEXTS: dict[str, tuple[str, str]] = {
    "cut": ('{"a": 1', "damaged: "),
    "empty": ("", "damaged: "),
    "list": ("[]", "no JSON object"),
    "number": ("3", "no JSON object"),
    "NaN": ('{"a": [NaN]}', "damaged: NaN is no value"),
    "two values": ('{"a": {"b": 1, "b": 2}}', "damaged: key 'b' appears twice, with different"),
    "long key twice": ('{"%s": 1, "%s": 2}' % (("k" * 10_000,) * 2), "appears twice"),
    "deep": ('{"a":' * 100_000, "damaged: nested too deeply"),
    "byte order mark": ("\ufeff{}", "byte order mark; save it as UTF-8 without"),
    "UTF-16": ('{"a": 1}'.encode("utf-16").decode("latin-1"), "damaged: "),
    "huge number": ('{"a": ' + "1" * 10_000 + "}", "damaged: "),
}
WEIGHT_MAPS: dict[str, tuple[Any, str]] = {
    "none": (None, "weight_map is no table"),
    "list": ([["a", SINGLE]], "weight_map is no table"),
    "text": (SINGLE, "weight_map is no table"),
    "number in it": ({"a": 3}, "a is in 3, which is no file name of a shard"),
    "list in it": ({"a": [SECOND]}, "a is in .* no file name of a shard"),
    "other weights": ({"a": "pytorch_model.bin"}, "a is in 'pytorch_model.bin', which is no"),
    "absolute": ({"a": "/x.safetensors"}, "which is no file name"),
    "folder": ({"a": "x/y.safetensors"}, "which is no file name"),
    "NUL": ({"a": "\0.safetensors"}, "this shard is missing|no file name"),
    "long name": ({"a": "x" * 5000 + ".safetensors"}, "which is no file name"),
    "half a character": ({"a": "\ud800.safetensors"}, "which is no file name"),
    "long key": ({"k" * 5000: SECOND}, "is no name of a tensor"),
}


@pytest.mark.parametrize("file", ["config.json", INDEX_NAME])
@pytest.mark.parametrize("name", JSON_TEXTS)
def test_damaged_json(name: str, file: str, tmp_path: Path) -> None:
    shards(tmp_path)
    text, message = JSON_TEXTS[name]
    (tmp_path / file).write_text(text, "utf-8")
    with pytest.raises(CheckpointError, match=rf"{file}: .*{message}") as caught:
        Checkpoint.open(tmp_path)
    assert len(str(caught.value)) < 1000


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match=r"config\.json: damaged: 'utf-8' codec"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", WEIGHT_MAPS)
def test_damaged_weight_map(name: str, tmp_path: Path) -> None:
    shards(tmp_path)
    weight_map, message = WEIGHT_MAPS[name]
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert INDEX_NAME in str(caught.value) and len(str(caught.value)) < 1000


def test_infinity_and_equal_values_are_read(tmp_path: Path) -> None:
    """Transformers writes infinities, and some published configurations repeat a key."""
    put(tmp_path, SINGLE, a=1)
    (tmp_path / "config.json").write_text('{"limit": [0.0, Infinity], "x": 1, "x": 1}')
    assert Checkpoint.open(tmp_path).config == {"limit": [0.0, float("inf")], "x": 1}


def test_ignored_tensors_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overlay(tmp_path)
    for _ in range(2):
        index = SafetensorsIndex.open(tmp_path)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "2 tensors in its shards, which it assigns to other files, are ignored" in told[0]
    assert "1 tensors in its shards, which it does not list, are ignored, such as old" in told[1]
    assert index.stale == {
        "a": tmp_path / "model-later.safetensors",
        "b": tmp_path / "model-00001-of-00001.safetensors",
    }


def test_two_checkpoints_in_one_folder_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    single_and_shards(tmp_path)
    Checkpoint.open(tmp_path)
    assert "holds two checkpoints, model.safetensors and model-00001-of-00002" in caplog.text


# Every entrance ---------------------------------------------------------------------------------


def inspected(folder: Path) -> str:
    return "; ".join(inspect_checkpoint(folder).problems)


def converted(folder: Path) -> str:
    convert_checkpoint(folder, folder.parent / "converted", progress=False)
    return ""


def planned(folder: Path) -> str:
    read_model(folder)
    return ""


def wrapped(folder: Path) -> str:
    try:
        checkpoint_cache.checkpoint_at(folder)
    finally:
        checkpoint_cache.release()
    return ""


ENTRANCES = (inspected, converted, planned, wrapped)


def problem(entrance: Callable[[Path], str], folder: Path) -> str:
    try:
        return entrance(folder)
    except CheckpointError as error:
        return str(error)


@pytest.fixture(scope="module")
def in_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of two layers in many small shards. Do not change it."""
    folder = tmp_path_factory.mktemp("shards") / "qwen"
    write_family("qwen3_moe", folder, max_shard_size="60KB")
    return folder


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("index", [False, True])
def test_a_lost_shard(
    entrance: Callable[[Path], str], index: bool, in_shards: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(in_shards, tmp_path / "m")
    if not index:
        (folder / INDEX_NAME).unlink()
    lost = sorted(folder.glob("*.safetensors"))[2]
    lost.unlink()
    assert f"{lost}: this shard is missing" in problem(entrance, folder)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(
    ("family_name", "lost", "message"),
    [
        ("qwen3_moe", "layers.1.mlp.experts", "layer 1 .* no routed experts under a known name"),
        ("qwen3_moe", "layers.0.mlp", "layer 0 .* no routed experts under a known name"),
        ("qwen3_moe", "layers.1.", "layer 1 .* no tensors, though .*num_hidden_layers=2"),
        ("mixtral", "layers.1.block_sparse_moe.experts", "layer 1 .* no routed experts"),
        ("gpt_oss_mxfp4", "layers.1.mlp.experts", "layer 1 .* no routed experts"),
        ("qwen3_moe_fused", "layers.0.mlp.experts", "layer 0 .* no routed experts"),
        ("deepseek_v4", "layers.1.mlp.experts", "layer 1 .* no routed experts"),
    ],
)
def test_a_lost_layer(
    entrance: Callable[[Path], str],
    family_name: str,
    lost: str,
    message: str,
    family: Family,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(family(family_name).directory, tmp_path / "m")
    tensors = load_file(folder / SINGLE)
    names = {lost, lost.replace("mlp.experts", "ffn.experts")}
    kept = {key: t for key, t in tensors.items() if not any(name in key for name in names)}
    assert len(kept) < len(tensors)
    save_torch(kept, folder / SINGLE, metadata={"format": "pt"})
    assert re.search(message, problem(entrance, folder))


def test_dense_layers_need_no_experts(family: Family) -> None:
    checkpoint = Checkpoint.open(family("deepseek_v3").directory)
    assert checkpoint.layers == (1,) and checkpoint.missing_layers == ()
