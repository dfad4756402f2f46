"""Open checkpoints, one for each path, shared by the layers that read from it.

A checkpoint's index is scanned once for all layers, not once for each. It is scanned again when a
file has changed since: offsets of an older file would read garbage from a newer one.
"""

from __future__ import annotations

from pathlib import Path

from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.loaders.checkpoint import Checkpoint
from hybrid_moe.loaders.layer_source import LayerSource
from hybrid_moe.loaders.layout import GateUp
from hybrid_moe.locks import ProcessLock
from hybrid_moe.runtime.arguments import LayerShape

_open: dict[Path, Checkpoint] = {}
_lock = ProcessLock()


def checkpoint_at(path: Path) -> Checkpoint:
    """The checkpoint at the resolved `path`, opened if it is not yet or has changed since.

    Raises:
        CheckpointError: it is damaged, or no checkpoint, or the directory holds two.
    """
    with _lock:
        checkpoint = _open.get(path)
        if checkpoint is None or not checkpoint.is_current:
            checkpoint = Checkpoint.open(path)
            _check_alone(checkpoint)
            _open[path] = checkpoint
        return checkpoint


def _check_alone(checkpoint: Checkpoint) -> None:
    """The engine reads the rest of the model by rules of its own: where a single file and shards
    lie in one directory, Transformers takes the file and SGLang the shards."""
    rival = checkpoint.index.rival
    if rival is not None:
        single = next(iter(checkpoint.index.tensors.values())).file
        raise CheckpointError(
            f"{checkpoint.index.path} holds two checkpoints, {single.name} and {rival.name} with "
            "its neighbours, and engines differ in which of them they read: remove one"
        )


def release() -> None:
    """Forget all open checkpoints; a later load opens them anew. Files close as soon as no load
    reads from them."""
    with _lock:
        _open.clear()


def stored_format(path: Path | None, layer: int) -> WeightFormat:
    """The format in which a checkpoint stores the experts of a layer.

    Raises:
        ValueError: no path.
        CheckpointError: the layer is damaged or not there.
    """
    if path is None:
        raise ValueError(
            "without a method a layer keeps the format that its checkpoint stores, which needs a "
            "weight_path"
        )
    return checkpoint_at(path).layer(layer).format


def checked_layer(
    path: Path, shape: LayerShape, fmt: WeightFormat, layout: GateUp | None = None
) -> LayerSource:
    """A layer that can be loaded as `shape` in `fmt`; only headers are read.

    Args:
        layout: where gate and up lie in fused tensors, if the caller knows.

    Raises:
        ValueError: its weights do not become `fmt`, or its model has another layout.
        CheckpointError: it is damaged, does not fit, or nothing tells its layout.
    """
    source = checkpoint_at(path).layer(shape.layer_idx).with_layout(layout)
    _check_fits(source, shape)
    source.check_format(fmt)
    source.check_layout()
    return source


def _check_fits(source: LayerSource, shape: LayerShape) -> None:
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
