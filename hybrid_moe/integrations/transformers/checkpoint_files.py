"""The options of Transformers' `from_pretrained` that choose files, for both readers of a model.

Transformers reads everything but the experts. What it is told to read, the loaders read too, and
where the two would read different files the model is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders import Checkpoint, SafetensorsIndex
from hybrid_moe.loaders.find_model import find_model

_OTHER_WEIGHTS = {
    "gguf_file": "a GGUF file",
    "state_dict": "tensors in memory",
}
"""Options under which Transformers reads other weights than the folder's safetensors."""


def take_subfolder(directory: str | Path, kwargs: dict[str, Any]) -> Path:
    """The folder that `subfolder` in `kwargs` selects; the option is taken out."""
    return find_model(directory) / (kwargs.pop("subfolder", None) or "")


def open_checkpoint(path: Path, kwargs: dict[str, Any]) -> Checkpoint:
    """Open what Transformers' `from_pretrained` reads from the folder `path` with `kwargs`.

    Raises:
        ValueError: an option asks for weights that are no safetensors.
        CheckpointError: the checkpoint is damaged or incomplete, or Transformers would read a
            tensor from another of its files than the index says.
    """
    for name, what in _OTHER_WEIGHTS.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: experts are read from safetensors, not from {what}")
    if kwargs.get("use_safetensors") is False:
        raise ValueError("use_safetensors=False: experts are read from safetensors alone")
    checkpoint = Checkpoint.open(path, variant=kwargs.get("variant"))
    for key, last in checkpoint.index.stale.items():
        chosen = checkpoint.index.info(key).file
        if key in checkpoint.expert_keys or last.name < chosen.name:
            continue  # Transformers takes the last
        if not _same(checkpoint.index, SafetensorsIndex.open(last), key):
            raise CheckpointError(
                f"{key}: the index says that it is in {chosen}, Transformers would read the copy "
                f"in {last}: remove one of them"
            )
    return checkpoint


def _same(one: SafetensorsIndex, other: SafetensorsIndex, key: str) -> bool:
    """Whether both hold the same tensor under `key`."""
    left, right = one.info(key), other.info(key)
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return bool(np.array_equal(_bytes(one.read(key)), _bytes(other.read(key))))


def _bytes(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)
