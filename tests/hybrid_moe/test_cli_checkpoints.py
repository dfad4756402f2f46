"""Damaged checkpoints on the command line: every command says the same one paragraph."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hybrid_moe.cli import app
from hybrid_moe.loaders.files import INDEX_NAME
from tests.hybrid_moe.tiny_models import build

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 4567890\n"
SHARD = "model-00002-of-00008.safetensors"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE in shards. Do not change it."""
    folder = tmp_path_factory.mktemp("shards") / "qwen"
    build("qwen3_moe").save_pretrained(folder, max_shard_size="60KB")
    assert (folder / SHARD).exists()
    return folder


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def renamed_in_index(folder: Path) -> None:
    file = folder / INDEX_NAME
    file.write_text(file.read_text().replace(SHARD, "../x.safetensors"))


def without_index(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    (folder / SHARD).unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "lost shard": (lambda f: (f / SHARD).unlink(), "this shard is missing"),
    "lost shard and index": (without_index, "this shard is missing"),
    "pointer": (lambda f: (f / SHARD).write_text(LFS), "git-lfs pointer"),
    "cut": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-9]), "truncated"),
    "pipe": (lambda f: pipe(f / INDEX_NAME), "no regular file"),
    "pipe as configuration": (lambda f: pipe(f / "config.json"), "no regular file"),
    "no index": (lambda f: (f / INDEX_NAME).write_text("[1"), "damaged"),
    "NaN": (lambda f: (f / INDEX_NAME).write_text('{"weight_map": NaN}'), "NaN is no value"),
    "wrong map": (lambda f: (f / INDEX_NAME).write_text(json.dumps({"weight_map": 3})), "no table"),
    "leads outside": (renamed_in_index, "no file name"),
}
COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "inspect": lambda folder: ["inspect", str(folder)],
    "convert": lambda folder: ["convert", "--model", str(folder), "--out", f"{folder} out"],
    "plan": lambda folder: ["plan", str(folder), "--ram-bandwidth", "20", "--gmacs", "50"],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_one_paragraph(command: str, damage: str, shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "m")
    apply, message = DAMAGES[damage]
    apply(folder)
    result = CliRunner().invoke(app, COMMANDS[command](folder))
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("hybrid-moe: ") and str(folder) in line and message in line
    assert not Path(f"{folder} out").exists()
