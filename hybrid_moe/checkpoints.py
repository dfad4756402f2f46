"""Open checkpoints, one for each path, shared by the layers that read from it.

A checkpoint's index is scanned once for all layers, not once for each. It is scanned again when a
file has changed since: offsets of an older file would read garbage from a newer one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hybrid_moe.arguments import LayerShape
from hybrid_moe.loaders.checkpoint import Checkpoint
from hybrid_moe.loaders.layer import LayerSource
from hybrid_moe.loaders.safetensors import INDEX_NAME
from hybrid_moe.locks import ProcessLock
from hybrid_moe.tensors import CheckpointError

Stamp = tuple[tuple[int, int, int] | None, ...]
"""Inode, size and time of change of each file; None for a file that does not exist."""


@dataclass(frozen=True)
class _Opened:
    """A checkpoint, the files it was read from, and their stamp at that time."""

    checkpoint: Checkpoint
    files: tuple[Path, ...]
    stamp: Stamp


_open: dict[Path, _Opened] = {}
_lock = ProcessLock()


def checkpoint_at(path: Path) -> Checkpoint:
    """The checkpoint at the resolved `path`, opened if it is not yet or has changed since.

    Raises:
        CheckpointError: it is damaged, or no checkpoint.
    """
    with _lock:
        opened = _open.get(path)
        if opened is None or _stamp(opened.files) != opened.stamp:
            checkpoint = Checkpoint.open(path)
            shards = {tensor.file for tensor in checkpoint.index.tensors.values()}
            # the folder itself, since files come and go
            files = (path, path / "config.json", path / INDEX_NAME, *sorted(shards))
            opened = _open[path] = _Opened(checkpoint, files, _stamp(files))
        return opened.checkpoint


def _stamp(files: tuple[Path, ...]) -> Stamp:
    return tuple(_stamp_of(file) for file in files)


def _stamp_of(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def release() -> None:
    """Forget all open checkpoints; a later load opens them anew. Files close as soon as no load
    reads from them."""
    with _lock:
        _open.clear()


def check_sizes(source: LayerSource, shape: LayerShape) -> None:
    """Raise `CheckpointError` unless the layer in the checkpoint has the sizes of `shape`.

    More ids than the checkpoint has experts are possible (a map may repeat experts), fewer are not.
    """
    for name, stored, given in (
        ("hidden_size", source.hidden, shape.hidden_size),
        ("moe_intermediate_size", source.intermediate, shape.moe_intermediate_size),
    ):
        if stored != given:
            raise CheckpointError(
                f"{name} is {given}, but layer {source.layer} of {source.index.path} has {stored} "
                f"(from {source.last_key}); give the checkpoint's own size, without a runtime's "
                "padding"
            )
    if shape.num_experts < source.num_experts:
        raise CheckpointError(
            f"num_experts is {shape.num_experts}, but layer {source.layer} of {source.index.path} "
            f"has {source.num_experts} experts (from {source.last_key})"
        )
