"""Open checkpoints, one for each path, shared by the layers that read from it.

A checkpoint's index is scanned once for all layers, not once for each. It is scanned again when a
file has changed since: offsets of an older file would read garbage from a newer one.
"""

from __future__ import annotations

from pathlib import Path

from hybrid_moe.formats.table import Method
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.formats.weight_format import LayerFormats, layer_formats
from hybrid_moe.loaders.checkpoint import Checkpoint
from hybrid_moe.loaders.expert_source import ExpertSource, held_formats
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


def formats_of(path: Path | None, layer: int, method: Method | None) -> LayerFormats:
    """The formats in which the experts of a layer are held under `method`.

    Args:
        path: the checkpoint; it is opened where the method alone does not say.
        layer: number of the layer.
        method: None for what the checkpoint stores.

    Raises:
        ValueError: no path where it takes one, or the layer's weights do not become that.
        CheckpointError: the layer is damaged or not there.
    """
    if method is not None and (len(method.formats) == 1 or path is None):
        made = method.formats[0] if len(method.formats) == 1 else method.made
        if made is not None:
            return layer_formats(made)
    if path is None:
        raise ValueError(
            f"{'without a method' if method is None else f'with method {method.name}'} a layer "
            "keeps the format that its checkpoint stores, which needs a weight_path"
        )
    return held_formats(checkpoint_at(path).layer(layer), method)


def checked_layer(
    path: Path,
    shape: LayerShape,
    formats: LayerFormats,
    method: Method | None,
    layout: GateUp | None = None,
) -> ExpertSource:
    """A layer that can be loaded as `shape` in `formats`; only headers are read.

    Args:
        method: what was asked for.
        layout: where gate and up lie in fused tensors, if the caller knows.

    Raises:
        ValueError: its weights do not become that, or its model has another layout.
        CheckpointError: it is damaged, does not fit, or nothing tells its layout.
    """
    source = checkpoint_at(path).layer(shape.layer_idx).with_layout(layout)
    _check_fits(source, shape)
    held = held_formats(source, method)
    if held != formats:
        raise CheckpointError(
            f"layer {source.layer} of {source.path} was {formats.name} when the wrapper was made "
            f"and is {held.name} now: the checkpoint has changed"
        )
    source.check_layout()
    return source


def _check_fits(source: ExpertSource, shape: LayerShape) -> None:
    """Raise `CheckpointError` unless the layer in the checkpoint has the sizes of `shape`.

    More ids than the checkpoint has experts are possible (a map may repeat experts), fewer are not.
    """
    for name, stored, given in (
        ("hidden_size", source.hidden, shape.hidden_size),
        ("moe_intermediate_size", source.intermediate, shape.moe_intermediate_size),
    ):
        if stored != given:
            raise CheckpointError(
                f"{name} is {given}, but layer {source.layer} of {source.path} has {stored} "
                f"(from {source.last_key}); give the checkpoint's own size, without a runtime's "
                "padding"
            )
    if shape.num_experts < source.num_experts:
        raise CheckpointError(
            f"num_experts is {shape.num_experts}, but layer {source.layer} of {source.path} "
            f"has {source.num_experts} experts (from {source.last_key})"
        )
