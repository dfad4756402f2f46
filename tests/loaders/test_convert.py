"""`convert_checkpoint`: experts become MXFP4 under published names, all else stays as it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.loaders import Checkpoint, convert_checkpoint
from hybrid_moe.loaders import convert as convert_module
from tests.families import EXPERTS, HIDDEN, INTERMEDIATE, FamilyFixture, decode_mxfp4, write_family

Family = Callable[[str], FamilyFixture]

WRITTEN: dict[str, dict[str, tuple[str, list[int]]]] = {
    "qwen3_moe": {
        "model.layers.1.mlp.experts.3.up_proj.weight": ("U8", [INTERMEDIATE, HIDDEN // 2]),
        "model.layers.1.mlp.experts.3.up_proj.weight_scale": ("U8", [INTERMEDIATE, HIDDEN // 32]),
    },
    "qwen3_moe_fused": {
        "model.layers.1.mlp.experts.3.down_proj.weight": ("U8", [HIDDEN, INTERMEDIATE // 2]),
        "model.layers.1.mlp.experts.3.down_proj.weight_scale": ("U8", [HIDDEN, INTERMEDIATE // 32]),
    },
    "mixtral": {
        "model.layers.0.block_sparse_moe.experts.0.w1.weight": ("U8", [INTERMEDIATE, HIDDEN // 2]),
        "model.layers.0.block_sparse_moe.experts.0.w1.weight_scale": (
            "U8", [INTERMEDIATE, HIDDEN // 32],
        ),
    },
    "deepseek_v3": {
        "model.layers.1.mlp.experts.0.gate_proj.weight": ("U8", [INTERMEDIATE, HIDDEN // 2]),
    },
    "deepseek_v4": {
        "model.layers.0.ffn.experts.1.w2.weight": ("I8", [HIDDEN, INTERMEDIATE // 2]),
        "model.layers.0.ffn.experts.1.w2.scale": ("F8_E8M0", [HIDDEN, INTERMEDIATE // 32]),
    },
    "gpt_oss": {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": (
            "U8", [EXPERTS, 2 * INTERMEDIATE, HIDDEN // 32, 16],
        ),
        "model.layers.0.mlp.experts.down_proj_scales": (
            "U8", [EXPERTS, HIDDEN, INTERMEDIATE // 32],
        ),
        "model.layers.0.mlp.experts.gate_up_proj_bias": ("BF16", [EXPERTS, 2 * INTERMEDIATE]),
    },
    "privacy_filter": {
        "model.layers.1.mlp.experts.3.gate_proj.weight": ("U8", [INTERMEDIATE, HIDDEN // 2]),
        "model.layers.1.mlp.experts.3.up_proj.bias": ("F32", [INTERMEDIATE]),
        "model.layers.1.mlp.experts.3.down_proj.bias": ("F32", [HIDDEN]),
    },
    "qwen3_moe_mixed": {
        "model.layers.0.mlp.experts.3.up_proj.weight": ("U8", [INTERMEDIATE, HIDDEN // 2]),
        "model.layers.1.mlp.experts.3.up_proj.weight": ("U8", [INTERMEDIATE, HIDDEN // 2]),
    },
    "deepseek_v3_draft": {
        "model.layers.1.mlp.experts.0.gate_proj.weight": ("U8", [INTERMEDIATE, HIDDEN // 2]),
        "model.layers.2.mlp.experts.0.gate_proj.weight": ("BF16", [INTERMEDIATE, HIDDEN]),
    },
}  # fmt: skip
"""Some of what must be written for each family, with dtype and shape."""


WRITTEN_INT8: dict[str, dict[str, tuple[str, list[int]]]] = {
    "qwen3_moe": {
        "model.layers.1.mlp.experts.3.up_proj.weight": ("I8", [INTERMEDIATE, HIDDEN]),
        "model.layers.1.mlp.experts.3.up_proj.weight_scale": ("F16", [INTERMEDIATE, HIDDEN // 32]),
    },
    "deepseek_v4": {
        "model.layers.0.ffn.experts.1.w2.weight": ("I8", [HIDDEN, INTERMEDIATE]),
        "model.layers.0.ffn.experts.1.w2.scale": ("F16", [HIDDEN, INTERMEDIATE // 32]),
    },
    "gpt_oss": {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": (
            "I8", [EXPERTS, 2 * INTERMEDIATE, HIDDEN // 32, 32],
        ),
        "model.layers.0.mlp.experts.down_proj_scales": (
            "F16", [EXPERTS, HIDDEN, INTERMEDIATE // 32],
        ),
    },
}  # fmt: skip
"""The same for method="INT8"."""


def assert_converted(fixture: FamilyFixture, directory: Path, fmt: WeightFormat = MXFP4) -> None:
    """The experts in `directory` are those of `fixture`, quantized."""
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.layers == tuple(fixture.layers)
    for number, layer in fixture.layers.items():
        source = checkpoint.layer(number)
        assert source.formats == (fmt, fmt)
        for expert in range(EXPERTS):
            tensors = source.expert(expert)
            for name in ("gate", "up", "down"):
                matrix = getattr(tensors, name)
                if fixture.methods[number] == "MXFP4":  # kept as it was
                    kept = decode_mxfp4(matrix.codes, matrix.scales)
                    assert np.array_equal(kept, getattr(layer, name)[expert])
                    continue
                w = getattr(layer, name)[expert].astype(np.float32)
                codes, scales = fmt.encode(w)
                assert np.array_equal(matrix.codes, codes)
                assert np.array_equal(matrix.scales, scales)
                if fmt is MXFP4:
                    # at most a third of the group's maximum away: 8 * 2^e saturates to 6
                    error = np.abs(decode_mxfp4(codes, scales) - w).reshape(len(w), -1, 32)
                    assert (error.max(-1) <= np.abs(w).reshape(error.shape).max(-1) / 3).all()
                bias = getattr(layer, f"{name}_bias")
                assert (matrix.bias is None) == (bias is None)
                assert bias is None or np.array_equal(matrix.bias, bias[expert])


def test_threads_where_affinity_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = write_family("qwen3_moe", tmp_path / "source")

    def refuse(_: int) -> set[int]:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_getaffinity", refuse)
    convert_checkpoint(fixture.directory, tmp_path / "converted", progress=False)
    assert_converted(fixture, tmp_path / "converted")


@pytest.mark.parametrize(
    ("fmt", "name"),
    [(MXFP4, name) for name in WRITTEN] + [(INT8, name) for name in WRITTEN_INT8],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_convert(family: Family, fmt: WeightFormat, name: str, tmp_path: Path) -> None:
    fixture, steps = family(name), []
    target = tmp_path / "converted"
    convert_checkpoint(
        fixture.directory,
        target,
        fmt.name,
        progress=lambda done, total: steps.append((done, total)),
        threads=2,
    )
    assert_converted(fixture, target, fmt)
    before, after = Checkpoint.open(fixture.directory), Checkpoint.open(target)
    for key, (dtype, shape) in (WRITTEN if fmt is MXFP4 else WRITTEN_INT8)[name].items():
        assert (after.index.info(key).dtype, list(after.index.info(key).shape)) == (dtype, shape)
    others = [key for key in before.index.tensors if key not in before.expert_keys]
    assert set(others) == set(after.index.tensors) - after.expert_keys
    official = (
        load_file(target / "model.safetensors"),
        load_file(fixture.directory / "model.safetensors"),
    )
    for key in others:
        assert torch.equal(official[0][key], official[1][key])
    assert official[0].keys() == after.index.tensors.keys()
    total = sum(tensor.nbytes for tensor in after.index.tensors.values())
    assert steps[-1] == (total, total)
    config = json.loads((target / "config.json").read_text())
    assert config.pop("hybrid_moe") == {"experts": fmt.name, "group": 32}
    assert (config.pop("quantization_config", None) is not None) == (
        fmt is MXFP4 and name in ("gpt_oss", "deepseek_v4")
    )
    assert config == json.loads((fixture.directory / "config.json").read_text())
    files = [{file.name for file in folder.iterdir()} for folder in (target, fixture.directory)]
    assert files[0] == files[1] >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_convert_wider_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    fixture = write_family("qwen3_moe", tmp_path / "source", dtype=dtype)
    convert_checkpoint(fixture.directory, tmp_path / "converted", progress=False)
    assert_converted(fixture, tmp_path / "converted")
    norm = Checkpoint.open(tmp_path / "converted").index.info("model.norm.weight")
    assert norm.dtype == {torch.float32: "F32", torch.float16: "F16"}[dtype]


def test_shards_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "_COPY_BYTES", 1000)  # the embedding is copied in pieces
    fixture = write_family("qwen3_moe", tmp_path / "source", max_shard_size="100KB")
    assert len(list(fixture.directory.glob("*.safetensors"))) > 1
    extra = fixture.directory / "tokenizers" / "tokenizer.json"
    extra.parent.mkdir()
    for name, text in (("tokenizer.json", "{}"), ("pytorch_model.bin", "x"), (".cache", "x")):
        (fixture.directory / name).write_text(text)
        (extra.parent / name).write_text(text)
    target = tmp_path / "converted"
    target.mkdir()
    convert_checkpoint(fixture.directory, target, progress=False, shard_bytes=50_000)
    assert_converted(fixture, target)
    shards = sorted(target.glob("*.safetensors"))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert [s.name for s in shards] == [
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    merged: dict[str, Any] = {}
    for shard in shards:
        tensors = load_file(shard)
        assert sum(t.nbytes for t in tensors.values()) <= 50_000
        merged.update(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())
    for key, tensor in Checkpoint.open(fixture.directory).index.tensors.items():
        if tensor.dtype == "BF16" and "experts" not in key:
            data = Checkpoint.open(fixture.directory).index.read(key)
            assert np.array_equal(data, merged[key].view(torch.uint16).numpy())
    assert {str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()} == {
        *(shard.name for shard in shards),
        "config.json", "generation_config.json", "model.safetensors.index.json",
        "tokenizer.json", "tokenizers/tokenizer.json",
    }  # fmt: skip


def test_a_failed_conversion_leaves_nothing(family: Family, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "converted"
    shutil.copytree(family("qwen3_moe").directory, source)
    (source / "sub").mkdir()
    (source / "sub" / "file").write_text("x")
    tensors = load_file(source / "model.safetensors")
    key = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensors[key][0, 0] = float("inf")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{key} in .*NaN or infinite"):
        convert_checkpoint(source, target, progress=False)
    assert list(target.iterdir()) == []
    tensors[key][0, 0] = 0
    save_file(tensors, source / "model.safetensors")
    convert_checkpoint(source, target, progress=False)
    assert (target / "sub" / "file").read_text() == "x"


def in_a_cache(source: Path, root: Path) -> Path:
    """`source` as huggingface_hub keeps it: blobs, and links to them in a snapshot."""
    snapshot, blobs = root / "models--a--b" / "snapshots" / "0123", root / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(file for file in source.rglob("*") if file.is_file())):
        shutil.copy(file, blobs / str(number))
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    return snapshot


def test_links_of_a_cache_and_within_the_folder_are_followed(
    family: Family, tmp_path: Path
) -> None:
    plain = shutil.copytree(family("qwen3_moe").directory, tmp_path / "plain")
    (plain / "sub").mkdir()
    (plain / "sub" / "merges.txt").write_text("m")
    cached = in_a_cache(plain, tmp_path)
    (plain / "vocab.txt").write_text("v")
    (plain / "also.txt").symlink_to("sub/merges.txt")
    convert_checkpoint(plain, tmp_path / "from plain", progress=False)
    convert_checkpoint(cached, tmp_path / "from cache", progress=False)
    assert (tmp_path / "from plain" / "also.txt").read_text() == "m"
    assert not (tmp_path / "from plain" / "also.txt").is_symlink()
    assert (tmp_path / "from cache" / "sub" / "merges.txt").read_text() == "m"
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        left, right = tmp_path / "from plain" / name, tmp_path / "from cache" / name
        assert left.read_bytes() == right.read_bytes()


@pytest.mark.parametrize("kind", ["plain", "cache", "false cache", "chain"])
def test_links_to_other_places_are_refused(kind: str, family: Family, tmp_path: Path) -> None:
    source = shutil.copytree(family("qwen3_moe").directory, tmp_path / "plain")
    secret = tmp_path / "other" / "secret"
    secret.parent.mkdir()
    secret.write_text("s")
    target: Path | str = secret
    if kind == "cache":
        source = in_a_cache(source, tmp_path)
    elif kind == "false cache":  # blobs that lead elsewhere make no file the cache's
        source = in_a_cache(source, tmp_path)
        (source.parents[1] / "blobs").rename(tmp_path / "moved")
        (source.parents[1] / "blobs").symlink_to(secret.parent)
        for link in source.iterdir():
            shutil.copy(tmp_path / "moved" / link.readlink().name, secret.parent)
        target = "../../blobs/secret"
    elif kind == "chain":
        (source / "near").symlink_to(secret)
        target = "near"
    (source / "notes").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"links to .*, outside of the checkpoint"):
        convert_checkpoint(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_pipes_are_no_companions(family: Family, tmp_path: Path) -> None:
    source = shutil.copytree(family("qwen3_moe").directory, tmp_path / "source")
    os.mkfifo(source / "pipe")
    convert_checkpoint(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "pipe").exists()


def test_an_adapter_stays_whole(family: Family, tmp_path: Path) -> None:
    source = shutil.copytree(family("qwen3_moe").directory, tmp_path / "source")
    (source / "adapter_config.json").write_text("{}")
    save_file({"lora_A.weight": torch.ones(2)}, source / "adapter_model.safetensors")
    convert_checkpoint(source, tmp_path / "out", progress=False)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_all_is_durable_before_it_has_its_name(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(family("qwen3_moe").directory, tmp_path / "source")
    (source / "sub").mkdir()
    (source / "sub" / "merges.txt").write_text("m")
    target = tmp_path / "new" / "out"
    events: list[tuple[str, Path]] = []
    sync, rename = os.fsync, Path.replace

    def spy_sync(descriptor: int) -> None:
        sync(descriptor)
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))

    def spy_rename(file: Path, name: Path) -> Path:
        events.append(("rename", file))
        return rename(file, name)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(Path, "replace", spy_rename)
    convert_checkpoint(source, target, progress=False, shard_bytes=100_000)
    renamed = [file for event, file in events if event == "rename"]
    written = {file for file in target.rglob("*") if file.is_file()}
    assert {file.with_name(file.name.removesuffix(".partial")) for file in renamed} == written
    assert renamed[-1].name == "config.json.partial" and len(written) > 4
    first, last = (events.index(("rename", renamed[i])) for i in (0, -1))
    assert {("sync", file) for file in renamed} <= set(events[:first])
    after = {folder for event, folder in events[last:] if event == "sync"}
    assert after == {target, target / "sub", target.parent}


def test_an_interrupted_conversion_removes_its_files(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        (writer,) = (arg for arg in args if hasattr(arg, "add_file"))
        writer.add_file("sub/deeper/file", b"x")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "_add_files", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(family("mixtral").directory, tmp_path / "converted", progress=False)
    assert list((tmp_path / "converted").iterdir()) == []


def test_what_is_refused(family: Family, tmp_path: Path) -> None:
    source = family("qwen3_moe").directory
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("x")
    refused: list[tuple[Path, Path, str, type[Exception], str]] = [
        (tmp_path / "none", tmp_path / "out", "MXFP4", FileNotFoundError, "no checkpoint at"),
        (full / "file", tmp_path / "out", "MXFP4", NotADirectoryError, "directory is needed"),
        (source, source, "MXFP4", ValueError, "name another directory"),
        (source, source / "sub", "MXFP4", ValueError, "name another directory"),
        (source, full, "MXFP4", ValueError, "is not empty"),
        (source, full / "file", "MXFP4", ValueError, "is a file"),
        (source, tmp_path / "out", "INT3", ValueError, "unknown method 'INT3'"),
        (source, tmp_path / "out", "BF16", ValueError, "not to BF16"),
        (
            family("qwen3_moe_mixed").directory,
            tmp_path / "out",
            "INT8",
            ValueError,
            "MXFP4, which does not become INT8",
        ),
        (family("gpt_oss_mxfp4").directory, tmp_path / "out", "MXFP4", ValueError, "MXFP4 already"),
        (full, tmp_path / "out", "MXFP4", CheckpointError, r"no \*\.safetensors"),
    ]
    for src, dst, method, error, message in refused:
        with pytest.raises(error, match=message):
            convert_checkpoint(src, dst, method, progress=False)
        assert not (tmp_path / "out").exists()
    save_file({"w": torch.zeros(1)}, full / "model.safetensors")
    with pytest.raises(ValueError, match="has no routed experts"):
        convert_checkpoint(full, tmp_path / "out", progress=False)


def test_too_little_room(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="bytes will be written, 1000 are free"):
        convert_checkpoint(family("qwen3_moe").directory, tmp_path / "converted", progress=False)
