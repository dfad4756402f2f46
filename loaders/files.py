"""Which files a checkpoint consists of: one decision for everything that reads one.

It is Transformers' decision, so that experts never come from another model than the rest: the
single file comes first, then the index with its shards. Folders in which Transformers finds nothing
(experts alone, Mistral's `consolidated.safetensors`) are read as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.regular import (
    MAX_KEY_LENGTH,
    Stamp,
    is_utf8,
    read_json,
    shortened,
    stamp_of,
)

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_CONSOLIDATED = "consolidated.safetensors"
_SHARD = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})\.safetensors")
_NAME_BYTES = 255  # of a file's name on Linux
FOREIGN_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt", "*.h5")
"""Weights that this package does not read."""

ADAPTER = "adapter_"
"""Beginning of the names of an adapter's files, which is no part of the checkpoint."""


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint.

    Attributes:
        path: the folder or file that was opened.
        shards: the safetensors files.
        weight_map: tensor -> name of the file that holds it, of the index; empty without one.
        index: that index, None without one.
        rival: a file of another checkpoint in the same folder, which was passed over.
        stamps: of the files that the choice depends on; None for one that is absent.
    """

    path: Path
    shards: tuple[Path, ...]
    weight_map: Mapping[str, str] = field(default_factory=dict)
    index: Path | None = None
    rival: Path | None = None
    stamps: Mapping[Path, Stamp | None] = field(default_factory=dict)


def choose_files(
    path: Path, variant: str | None = None, named: object | None = None
) -> CheckpointFiles:
    """Choose the files of the checkpoint at `path`.

    Args:
        path: a safetensors file, or a folder.
        variant: as Transformers' `from_pretrained` takes it: "fp16" reads `model.fp16.safetensors`
            or the index of that variant, and nothing else.
        named: `transformers_weights` of `config.json`: the file or index to read.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError: no safetensors file, a shard is missing, or a damaged index.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: the path does not exist")
    if not path.is_dir():
        return CheckpointFiles(path, (path,))
    stamps = {path: stamp_of(path)}  # before anything is looked at: files come and go
    if named is not None:
        return _named_files(path, named, stamps)
    single = path / _with_variant(SINGLE_NAME, variant)
    index = path / _with_variant(INDEX_NAME, variant)
    if single.is_file():
        rival = next((file for file in _shards_beside(single)), None)
        return CheckpointFiles(path, (single,), rival=rival, stamps=stamps)
    if index.exists() or index.is_symlink():
        return _indexed(path, index, stamps)
    if variant is not None:
        raise CheckpointError(
            f"{path}: neither {single.name} nor {index.name} is here, which variant={variant!r} "
            "asks for"
        )
    files = _loose_files(path)
    if not files:
        index = path / f"{_CONSOLIDATED}.index.json"
        if index.is_file():
            return _indexed(path, index, stamps)
        files = _visible(path, f"{Path(_CONSOLIDATED).stem}*.safetensors")
    if not files:
        raise CheckpointError(f"{path}: no *.safetensors file in this directory{_others(path)}")
    _check_sets_complete(files)
    return CheckpointFiles(path, tuple(files), stamps=stamps)


def _with_variant(name: str, variant: str | None) -> str:
    """ "model.safetensors", "fp16" -> "model.fp16.safetensors"."""
    if variant is None:
        return name
    if Path(variant).name != variant:
        raise CheckpointError(f"variant={shortened(variant)} is no part of a file's name")
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}"


def _named_files(path: Path, named: object, stamps: Mapping[Path, Stamp | None]) -> CheckpointFiles:
    kinds = (".safetensors", ".safetensors.index.json")
    if not _is_file_name(named) or not str(named).endswith(kinds):
        raise CheckpointError(
            f"{path / 'config.json'}: transformers_weights={shortened(named)} is no name of a "
            "safetensors file or index in this directory"
        )
    file = path / str(named)
    if file.suffix == ".json":
        return _indexed(path, file, stamps)
    return CheckpointFiles(path, (file,), stamps=stamps)


def _is_file_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name not in ("", "..")
        and Path(name).name == name
        and is_utf8(name)
        and len(name.encode()) <= _NAME_BYTES
    )


def _visible(path: Path, pattern: str) -> list[Path]:
    """Files by name, without hidden ones: `._x` are what macOS writes beside x."""
    return sorted(file for file in path.glob(pattern) if not file.name.startswith("."))


def _shards_beside(single: Path) -> list[Path]:
    """Shards in the folder of a single file: a second model, or what is left of one."""
    beside = _visible(single.parent, f"{single.name.removesuffix('.safetensors')}-*.safetensors")
    return [file for file in beside if _SHARD.fullmatch(file.name) and file.is_file()]


def _loose_files(path: Path) -> list[Path]:
    """Files of a checkpoint without standard names; adapters and consolidated copies are none."""
    none = (ADAPTER, Path(_CONSOLIDATED).stem)
    return [file for file in _visible(path, "*.safetensors") if not file.name.startswith(none)]


def _others(path: Path) -> str:
    """What there is instead, for the message."""
    found = next((f for pattern in FOREIGN_WEIGHTS for f in _visible(path, pattern)), None)
    if found is None:
        return ""
    return (
        f"; {found.name} is not read: save the model with safetensors "
        "(Transformers' save_pretrained does)"
    )


def _check_sets_complete(files: Iterable[Path]) -> None:
    """Without an index only the names say how many shards there are: x-00004-of-00005."""
    sets: dict[tuple[Path, str, str], set[int]] = {}
    for file in files:
        match = _SHARD.fullmatch(file.name)
        if match is not None:
            sets.setdefault((file.parent, match[1], match[3]), set()).add(int(match[2]))
    for (folder, stem, of), numbers in sets.items():
        first = min({1, *numbers})  # some count from zero
        expected = range(first, first + int(of))
        missing = next((number for number in expected if number not in numbers), None)
        if missing is not None:
            name = f"{stem}-{missing:0{len(of)}d}-of-{of}.safetensors"
            raise CheckpointError(
                f"{folder / name}: this shard is missing: the names of the others speak of "
                f"{len(expected)} files, {len(numbers)} are here"
            )


def _indexed(path: Path, index: Path, stamps: Mapping[Path, Stamp | None]) -> CheckpointFiles:
    weight_map, found = _read_weight_map(index)
    shards = tuple(path / name for name in sorted(set(weight_map.values())))
    for file in shards:
        if not file.is_file():
            keys = [key for key, name in weight_map.items() if name == file.name]
            raise CheckpointError(
                f"{file}: this shard is missing; {index.name} says that it holds "
                f"{len(keys)} tensors, among them {keys[0]}"
            )
    return CheckpointFiles(path, shards, weight_map, index, stamps={**stamps, index: found})


def _read_weight_map(index: Path) -> tuple[dict[str, str], Stamp]:
    content, found = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is no table of tensors and files")
    for key, name in weight_map.items():
        if len(key) > MAX_KEY_LENGTH or not is_utf8(key):
            raise CheckpointError(f"{index}: {shortened(key)} is no name of a tensor")
        if not _is_file_name(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: {key} is in {shortened(name)}, which is no file name of a shard"
            )
    return weight_map, found
