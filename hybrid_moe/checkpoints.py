"""Open checkpoints, one for each path, shared by the layers that read from it.

A checkpoint's index is scanned once for all layers, not once for each.
"""

from __future__ import annotations

import threading
from pathlib import Path

from hybrid_moe.arguments import LayerShape
from hybrid_moe.loaders.checkpoint import Checkpoint
from hybrid_moe.loaders.layer import LayerSource
from hybrid_moe.tensors import CheckpointError

_open: dict[Path, Checkpoint] = {}
_lock = threading.Lock()


def checkpoint_at(path: Path) -> Checkpoint:
    """The checkpoint at the resolved `path`, opened if it is not yet.

    Raises:
        CheckpointError: it is damaged, or no checkpoint.
    """
    with _lock:
        if path not in _open:
            _open[path] = Checkpoint.open(path)
        return _open[path]


def release() -> None:
    """Forget all open checkpoints; a later load opens them anew."""
    with _lock:
        for checkpoint in _open.values():
            checkpoint.close()
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
