"""Folders of files, held against Transformers' own choice, and JSON texts against `json`.

Where Transformers finds safetensors, the loaders choose the same ones, or refuse for one of
`REASONS`; tensors come from the file that the index says.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from safetensors.numpy import save
from transformers.modeling_utils import _get_resolved_checkpoint_files

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.regular import read_json
from hybrid_moe.loaders.safetensors import SafetensorsIndex

REASONS = {
    "shard of the index is missing": "this shard is missing",
    "damaged index": r"index.*\.json: (damaged|no JSON object|weight_map is|.* no file name)",
    "index at odds with a shard": "says that it is in .* but it is not",
    "damaged file": "truncated|too few|damaged|no safetensors|belong to no tensor",
}
"""Why a folder that Transformers begins to load may be refused, as patterns of the message."""

JSON_REASONS = {
    "NaN": "NaN is no value",
    "two values": "appears twice, with different values",
    "no object": "no JSON object",
}
"""Why a text that `json` reads may be refused."""

_NAMES = (
    "model.safetensors", "model.fp16.safetensors", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "model-00003-of-00003.safetensors", "extra.safetensors",
    "._model.safetensors", ".hidden.safetensors", "consolidated.safetensors",
    "adapter_model.safetensors", "model-overlay.safetensors", "pytorch_model.bin", "weights.gguf",
)  # fmt: skip
_INDICES = ("model.safetensors.index.json", "model.safetensors.index.fp16.json")
_KEYS = ("a", "b", "c", "lm_head.weight")
_TEXTS = (
    '{"a": 1}', '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": 1, "a": 1}', "[]", "3", "", "{", "\0",
    '{"weight_map": {}}', '{"a": [Infinity, -Infinity]}', "[" * 5000, '{"a":' * 2000 + "1",
    '\ufeff{"a": 1}', '{"a": "\\ud800"}', '{"weight_map": [1]}', '{"weight_map": {"a": 1}}',
    '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "model.bin"}}', "nul",
)  # fmt: skip


def check_json(rng: Random, folder: Path) -> bool:
    """One text through `read_json`; returns whether it was read."""
    text = rng.choice(_TEXTS)
    for _ in range(rng.choice((0, 0, 1, 2))):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(('"', "{", "}", ",", "NaN", "1", "\0", " ", "é")) + text[at:]
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        content += b"\xff"
    file = folder / "config.json"
    file.write_bytes(content)
    expected: Any = None
    try:
        expected = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        expected = CheckpointError
    try:
        value, _ = read_json(file)
    except CheckpointError as error:
        named = any(re.search(pattern, str(error)) for pattern in JSON_REASONS.values())
        assert expected is CheckpointError or named, str(error)
        return False
    assert value == expected
    return True


def check_folder(rng: Random, folder: Path) -> bool:
    """One folder through both choices; returns whether the loaders read it."""
    variant = "fp16" if rng.random() < 0.15 else None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    contents = {name: _file(rng) for name in rng.sample(_NAMES, rng.choice((0, 1, 2, 3, 4)))}
    for name, tensors in contents.items():
        data = save(tensors)
        (folder / name).write_bytes(data[: rng.randrange(len(data))] if _seldom(rng) else data)
    for name in rng.sample(_INDICES, rng.choice((0, 1, 1))):
        (folder / name).write_text(_index(rng, contents))
    theirs = _theirs(folder, variant)
    try:
        index = SafetensorsIndex.open(folder, variant=variant)
    except CheckpointError as error:
        named = any(re.search(pattern, str(error)) for pattern in REASONS.values())
        assert theirs is None or named, str(error)
        return False
    used = {tensor.file for tensor in index.tensors.values()}
    if theirs is not None:
        assert used <= set(theirs)
        assert set(index.tensors) <= {key for file in theirs for key in contents[file.name]}
    else:  # without names that Transformers knows
        assert not any(file.name.startswith((".", "adapter")) for file in used)
    for key, tensor in index.tensors.items():
        assert math.isclose(float(index.read(key)[0]), float(contents[tensor.file.name][key][0]))
    index.close()
    return True


def _seldom(rng: Random) -> bool:
    return rng.random() < 0.05


def _file(rng: Random) -> dict[str, np.ndarray]:
    keys = rng.sample(_KEYS, rng.choice((0, 1, 1, 2)))
    return {key: np.array([rng.random()], np.float32) for key in keys}


def _index(rng: Random, contents: dict[str, dict[str, np.ndarray]]) -> str:
    if _seldom(rng):
        return rng.choice(_TEXTS)
    shards = {n: keys for n, keys in contents.items() if n.endswith(".safetensors")}
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    if _seldom(rng):
        weight_map[rng.choice(_KEYS)] = rng.choice(_NAMES)
    return json.dumps({"metadata": {}, "weight_map": weight_map})


def _theirs(folder: Path, variant: str | None) -> list[Path] | None:
    """The safetensors that Transformers would read; None where it finds none or fails."""
    try:
        files, _ = _get_resolved_checkpoint_files(
            str(folder), variant, None, None, None, False, None, {"local_files_only": True}
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return None
    found = [Path(file) for file in files or ()]
    return found if found and found[0].suffix == ".safetensors" else None
