"""The files beside a checkpoint's weights: configuration, tokenizer, licence."""

from __future__ import annotations

import logging
from pathlib import Path

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.loaders.files import ADAPTER, FOREIGN_WEIGHTS

logger = logging.getLogger(__name__)

_WEIGHTS = ("*.safetensors", "*.safetensors.index*.json", "*.bin.index*.json", *FOREIGN_WEIGHTS)


def companion_files(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint that are no weights, by their path within `folder`.

    Hidden files are left out. Links are followed within the folder, and within the cache of
    huggingface_hub, which keeps every file as a link.

    Raises:
        CheckpointError: a link leads elsewhere: who made the checkpoint does not decide which of
            the reader's files end up in a copy of it.
    """
    inside = [folder.resolve()]
    caches = (place.parent for place in inside[0].parents if place.name == "snapshots")
    inside += [cache / "blobs" for cache in caches]
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or _is_weights(name):
            continue
        if file.is_symlink():
            target = file.resolve()
            if not any(target.is_relative_to(place) for place in inside):
                raise CheckpointError(
                    f"{file} links to {target}, outside of the checkpoint: put the file itself "
                    "there, or remove the link"
                )
            if file.is_dir():
                logger.warning("%s: links to directories are not followed", file)
        if file.is_file():
            found[name.as_posix()] = file
    return found


def _is_weights(name: Path) -> bool:
    return not name.name.startswith(ADAPTER) and any(name.match(p) for p in _WEIGHTS)
